"""Modules import in one direction only, and nothing but the runtime packages."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "resadapt"
ROOT_MODULE = "__init__"
RUNTIME = {"torch", "torchvision", "typing_extensions"}
OPTIONAL = {"safetensors"}

# A module may import from rows above its own; those of one row do not know each other.
LAYERS = (
    ("version", "errors", "spec", "quiet", "fingerprint", "adapters.pooled"),
    ("slots", "adapters", "container"),
    ("select", "freeze", "hooks", "ledger", "adapter_file"),
    ("installation", "probe"),
    ("sets", "parameters", "drift", "checkpoint"),
    ("compare",),
    ("verify",),
    (ROOT_MODULE,),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def module_files() -> dict[str, Path]:
    """Every module of the package by its dotted name below the package."""
    files = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        files[".".join(parts if parts == (ROOT_MODULE,) or parts[-1] != ROOT_MODULE else parts[:-1])] = path
    return files


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that a source imports anywhere, for types or inside a function too; a relative one as '.'."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." if node.level else str(node.module)


def problems(name: str, source: str) -> list[str]:
    """What is wrong with a module's imports."""
    tree = ast.parse(source)
    found = []
    for target in imports(tree):
        package, _, inner = target.partition(".")
        if package == "resadapt":
            known = inner or ROOT_MODULE
            if known not in LEVEL:
                found.append(f"{name} imports {target}, which is in no layer")
            elif LEVEL[known] >= LEVEL[name]:
                found.append(f"{name} (layer {LEVEL[name]}) imports {known} (layer {LEVEL[known]})")
        elif target == ".":
            found.append(f"{name} imports relatively: write the full name")
        elif package not in sys.stdlib_module_names | RUNTIME | OPTIONAL:
            found.append(f"{name} imports {target}, which is no runtime package")
    at_import = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    early = {target.partition(".")[0] for node in at_import for target in imports(node)}
    return found + [f"{name} imports {package} before it is needed" for package in sorted(early & OPTIONAL)]


def test_every_module_has_one_layer() -> None:
    assert sorted(module_files()) == sorted(name for names in LAYERS for name in names)


@pytest.mark.parametrize("name", sorted(LEVEL))
def test_imports_point_one_way(name: str) -> None:
    assert problems(name, module_files()[name].read_text()) == []


@pytest.mark.parametrize(
    ("name", "source", "complaint"),
    [
        ("slots", "from resadapt.hooks import attach", "slots (layer 1) imports hooks (layer 2)"),
        ("hooks", "from resadapt.freeze import within", "hooks (layer 2) imports freeze (layer 2)"),
        ("sets", "def f():\n    import resadapt.verify", "sets (layer 4) imports verify (layer 6)"),
        ("sets", "from resadapt import errors", "sets (layer 4) imports __init__ (layer 7)"),
        ("sets", "if TYPE_CHECKING:\n    from resadapt.compare import Check", "sets (layer 4) imports compare (layer 5)"),
        ("sets", "from resadapt.utils import helper", "sets imports resadapt.utils, which is in no layer"),
        ("sets", "from .slots import SLOT", "sets imports relatively: write the full name"),
        ("sets", "import numpy as np", "sets imports numpy, which is no runtime package"),
        ("container", "import safetensors.torch", "container imports safetensors before it is needed"),
    ],
)
def test_a_wrong_import_is_found(name: str, source: str, complaint: str) -> None:
    assert problems(name, source) == [complaint]


def test_the_architecture_page_shows_these_layers() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", page, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(len(LAYERS)))
    assert [tuple(re.findall(r"`([\w.]+)`", names)) for _, names in rows] == list(LAYERS)
