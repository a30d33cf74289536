"""The documentation is executed, complete, and names nothing that does not exist."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import resadapt

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md")])


def test_the_code_in_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    printed = "\n".join(str(names["report"]).splitlines()[1:])
    shown = re.sub(r"\d", "9", (ROOT / "README.md").read_text())
    # The file's size and the numbers in it may differ between versions of torch; the rest is what
    # is printed.
    assert re.sub(r"\d", "9", printed) in shown


def test_the_examples_in_the_pages_run(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-b",
        "doctest",
        "-W",
        "-n",
        "-q",
        "-D",
        "nb_execution_mode=off",  # `make docs` executes the notebook
        "-d",
        tmp_path / "trees",
        DOCS,
        tmp_path / "out",
    ]
    # One thread: a test of numbers, not of speed, beside other tests on the same cores.
    done = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = (tmp_path / "out" / "output.txt").read_text()
    for page in (
        "index",
        "getting_started",
        "families",
        "from_peft",
        "sets",
        "freezing",
        "precision",
        "checkpoints",
        "frameworks",
        "file_format",
        "codec_example",
    ):
        assert f"Document: {page}\n" in results
    assert re.search(r"^ +0 failures in tests$", results, re.MULTILINE)


def test_the_tables_of_families_are_what_the_code_says() -> None:
    # In a process of its own: here other tests may have registered families.
    command = [sys.executable, DOCS / "make_tables.py", "--check"]
    done = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_figures_show_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    figures = runpy.run_path(str(DOCS / "make_figures.py"))
    assert figures["main"](["--check"]), capsys.readouterr().out
    used = {path for page in PAGES for path in re.findall(r"pictures/(\w+)\.svg", page.read_text())}
    assert used == {path.stem for path in (DOCS / "pictures").glob("*.svg")}
    page = (DOCS / "freezing.md").read_text()
    for curves in figures["drift_data"]().values():  # they end with the numbers of the page's run
        last = "{} of 48 right, reloaded {}\n".format(*(values[-1] for values in curves.values()))
        assert last in page
    assert figures["svg_of"]("drift") == figures["svg_of"]("drift")  # the same bytes in each run


def test_the_reference_has_every_public_name() -> None:
    listed = re.findall(
        r"^\.\. auto\w+:: (\w+)(?:\(\))?$", (DOCS / "reference.md").read_text(), re.MULTILINE
    )
    public = [*resadapt.__all__, *resadapt.types.__all__, "AdapterCheckpoint"]
    assert sorted(listed) == sorted(public)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", DOCS / "promises.md"], ids=lambda page: page.name
)
def test_files_that_the_readme_names_exist(page: Path) -> None:
    text = page.read_text()
    for path in re.findall(r"`((?:tests|examples|docs)/[\w./*]+)`", text):
        assert list(ROOT.glob(path)) or path == "docs/_build/html", path
    for name in re.findall(r"`(test_[\w*]+\.py)`", text):  # wherever it is under tests
        assert list((ROOT / "tests").rglob(name)), name
