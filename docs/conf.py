"""Sphinx configuration. The build is strict (-W -n) and needs no network."""

import doctest

from resadapt import __version__

project = "resadapt"
author = "The resadapt developers"
copyright = author
version = release = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.doctest", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"resadapt {__version__}"
html_static_path: list[str] = []

myst_heading_anchors = 3

# tour.ipynb, a link to the notebook in examples/, is executed in each build.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_output_stderr = "remove"  # tqdm's word about notebooks

# Docstrings write `name` for code, in the manner of plain text.
default_role = "literal"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
autodoc_mock_imports = ["lightning"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100

# The pages' examples only: those of docstrings run under pytest.
doctest_test_doctest_blocks = ""
doctest_default_flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
doctest_global_setup = """
import os
import tempfile

import torch

torch.set_num_threads(1)
scratch = tempfile.TemporaryDirectory()
home = os.getcwd()
os.chdir(scratch.name)
"""
doctest_global_cleanup = """
os.chdir(home)
scratch.cleanup()
"""

# Names of Python and torch are not linked, because looking them up needs the network; type
# variables have no page.
nitpick_ignore_regex = [
    (r"py:class", r"(collections|os|pathlib|torch|typing)\..*"),
    (r"py:class", r"resadapt\.[\w.]+\.(Adapter|Model)T"),
]
