"""Modules import in one direction only, and nothing but the runtime packages."""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "resadapt"
RUNTIME = {"torch", "torchvision", "typing_extensions"}
OPTIONAL = {"huggingface_hub", "lightning", "onnxruntime", "safetensors"}

# Rooms by floor, from the ground up: a module may import from the floors below its own. The rooms
# of one floor do not know each other. Inside a room a module may import from the rows before its
# own, and those of one row do not know each other.
FLOORS: tuple[dict[str, tuple[tuple[str, ...], ...]], ...] = (
    {
        "base": (
            ("version", "errors", "html_table", "tensors", "overlay", "evaluation"),
            ("spec", "inputs", "module_record", "attributes", "autocast"),
            ("undisturbed", "fingerprint", "other_inputs"),
        ),
        "adapters": (
            ("summing",),
            ("family",),
            ("pointwise", "convolutions", "registry"),
            ("own_forward",),
            ("folding",),
            ("pooled", "series", "bottleneck", "ssf", "mona", "conv", "lora", "parallel"),
            ("",),
        ),
    },
    {
        "injection": (
            ("mixture", "own_dtype"),
            ("recomputation",),
            ("slots",),
            ("walk",),
            ("freeze", "private"),
            ("ledger",),
            ("lost",),
            ("watch", "intercept"),
            ("hooks", "channels"),
            ("measure",),
            ("building",),
            ("select",),
            ("switching",),
            ("installation", "set_info", "sharing"),
            ("sets",),
        ),
        "files": (("container", "atomic"), ("location",), ("adapter_file",)),
    },
    {
        "parameters": (("trainable",), ("suggest", "summary")),
        "lean": (
            ("stand_in", "samples", "bits", "constants"),
            ("functions", "prefix", "folding", "estimate"),
            ("layers", "feature_rows"),
            ("optimize", "cache"),
        ),
        "deploy": (
            ("adapted", "stock_copy", "same_outputs", "norm_pairs"),
            ("folded_weights",),
            ("inference_copy", "fold"),
        ),
        "proof": (
            ("report", "probe", "drift", "state"),
            ("reconstruction", "evidence", "loading", "combine", "card", "training_state"),
            ("compare",),
            ("verify",),
        ),
    },
    {"types": (("",),), "lightning": (("",),)},
    {
        "": (("",),),
        "cli": (
            ("text",),
            ("models", "output"),
            ("adapted",),
            ("inspect", "verify", "diff", "convert", "fold", "export", "families"),
            ("main",),
        ),
    },
    {"__main__": (("",),)},
)
PLACES = {
    (room, module): (floor, row)
    for floor, rooms in enumerate(FLOORS)
    for room, rows in rooms.items()
    for row, modules in enumerate(rows)
    for module in modules
}


def place(name: str) -> tuple[str, str]:
    """The room of a module and its name there; a room of one module is that module."""
    room, _, module = name.partition(".")
    return room, module


@functools.cache
def module_files() -> dict[str, Path]:
    """Every module of the package by its dotted name below the package, the root's being empty;
    rooms without code left out.
    """
    files = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if len(ast.parse(path.read_text()).body) > 1:
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that a source imports anywhere, for types or inside a function too; a relative
    one as '.'.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." if node.level else str(node.module)


def may_import(name: str, target: str) -> bool:
    """Whether a module may import another one of the package."""
    (floor, row), (target_floor, target_row) = PLACES[place(name)], PLACES[place(target)]
    return target_floor < floor or (place(target)[0] == place(name)[0] and target_row < row)


def problems(name: str, source: str) -> list[str]:
    """What is wrong with a module's imports."""
    tree = ast.parse(source)
    found = []
    for target in imports(tree):
        package, _, inner = target.partition(".")
        if package == "resadapt":
            if place(inner) not in PLACES:
                found.append(f"{name} imports {target}, which has no place")
            elif not may_import(name, inner):
                found.append(f"{name} may not import {target}")
        elif target == ".":
            found.append(f"{name} imports relatively: write the full name")
        elif package not in sys.stdlib_module_names | RUNTIME | OPTIONAL:
            found.append(f"{name} imports {target}, which is no runtime package")
    at_import = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    early = {target.partition(".")[0] for node in at_import for target in imports(node)}
    return found + [
        f"{name} imports {package} before it is needed" for package in sorted(early & OPTIONAL)
    ]


NAMES = [".".join(filter(None, each)) for each in PLACES]


def test_every_module_has_one_place() -> None:
    assert sorted(module_files()) == sorted(NAMES)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_imports_point_one_way(name: str) -> None:
    assert problems(name, module_files()[name].read_text()) == []


@pytest.mark.parametrize(
    ("name", "source", "complaint"),
    [
        (
            "injection.slots",
            "from resadapt.injection.hooks import attach",
            "injection.slots may not import resadapt.injection.hooks",
        ),
        (
            "injection.private",
            "from resadapt.injection.freeze import x",
            "injection.private may not import resadapt.injection.freeze",
        ),
        (
            "injection.sets",
            "def f():\n    import resadapt.files.container",
            "injection.sets may not import resadapt.files.container",
        ),
        (
            "proof.probe",
            "from resadapt.parameters.summary import summary",
            "proof.probe may not import resadapt.parameters.summary",
        ),
        ("injection.sets", "from resadapt import errors", "injection.sets may not import resadapt"),
        (
            "parameters.summary",
            "if TYPE_CHECKING:\n    from resadapt.proof.report import Check",
            "parameters.summary may not import resadapt.proof.report",
        ),
        (
            "injection.sets",
            "from resadapt.utils import helper",
            "injection.sets imports resadapt.utils, which has no place",
        ),
        (
            "injection.sets",
            "from .slots import SLOT",
            "injection.sets imports relatively: write the full name",
        ),
        (
            "injection.sets",
            "import numpy as np",
            "injection.sets imports numpy, which is no runtime package",
        ),
        (
            "files.container",
            "import safetensors.torch",
            "files.container imports safetensors before it is needed",
        ),
    ],
)
def test_a_wrong_import_is_found(name: str, source: str, complaint: str) -> None:
    assert problems(name, source) == [complaint]


def test_the_architecture_page_shows_these_rooms() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\d+) \| `([\w.]+)` \| ([^|]*)\|", page, re.MULTILINE)
    shown = [
        (int(floor), room, tuple(re.findall(r"`(\w+)`", modules))) for floor, room, modules in rows
    ]
    expected = [
        (floor, room or "__init__", tuple(module for row in rows for module in row if module))
        for floor, rooms in enumerate(FLOORS)
        for room, rows in rooms.items()
    ]
    assert shown == expected
