"""Counts the files that a reader of README's four lines opens, and how often they jump back.

    .venv/bin/python tools/trace_readme.py [--json] [--list]

Runs inject, parameter_groups, one training step, save and load on a small ResNet under
`sys.setprofile`, and counts for each of them alone and for all together:

files
    Source files of the package with at least one function that runs.
functions
    Functions that run, told apart by file and qualified name. Lambdas and comprehensions count;
    the bodies of modules, which run once at import, and generated functions do not.
jumps back
    A reader reads every function when it is first entered, in that order. Each time the next
    function is in another file than the one before it, and that file was opened earlier, the
    reader jumps back. A function is read once, so each counts at most once.
calls back
    Distinct calls, caller to callee, into another file that was opened before. The caller is the
    nearest function of the package on the stack: frames of torch in between are passed over.

Python 3.12 and newer run comprehensions inside the function around them, which makes the numbers a
little smaller: compare numbers of one version of Python only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch
from torch import nn
from torchvision.models import resnet18

import resadapt

PACKAGE = Path(resadapt.__file__).parent
PREFIX = f"{PACKAGE}{os.sep}"


class Function(NamedTuple):
    """A function of the package."""

    file: str
    name: str

    def __str__(self) -> str:
        """Shows it as ``file:name``."""
        return f"{self.file}:{self.name}"


# Distinct calls in the order in which they are first made; the caller is None outside the package.
Calls = dict[tuple[Function | None, Function], None]


@dataclass
class Reading:
    """What a reader of some calls goes through; the module's docstring defines the terms."""

    files: list[str] = field(default_factory=list)
    functions: set[Function] = field(default_factory=set)
    jumps_back: list[Function] = field(default_factory=list)
    calls_back: list[tuple[Function, Function]] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Returns the length of each field."""
        return {name.replace("_", " "): len(value) for name, value in vars(self).items()}


def read(calls: Calls) -> Reading:
    """Follows calls in their order."""
    reading = Reading()
    here = None
    for caller, callee in calls:
        opened = callee.file in reading.files
        if caller is not None and caller.file != callee.file and opened:
            reading.calls_back.append((caller, callee))
        if callee not in reading.functions:
            if callee.file != here and opened:
                reading.jumps_back.append(callee)
            reading.functions.add(callee)
            here = callee.file
        if not opened:
            reading.files.append(callee.file)
    return reading


def _function(code: CodeType) -> Function | None:
    """Returns the function of a code object, None outside the package and for bodies of modules."""
    if not code.co_filename.startswith(PREFIX) or code.co_name == "<module>":
        return None
    # Python 3.10 has no qualified names; the line tells functions of one name apart.
    name = getattr(code, "co_qualname", f"{code.co_name}@{code.co_firstlineno}")
    return Function(code.co_filename[len(PREFIX) :], name)


@contextmanager
def recorded(calls: Calls) -> Iterator[None]:
    """Adds every call of a function of the package, made in this thread, to `calls`."""

    def note(frame: FrameType, event: str, _argument: object) -> None:
        if event != "call" or (callee := _function(frame.f_code)) is None:
            return
        caller, outer = None, frame.f_back
        while outer is not None and caller is None:
            caller, outer = _function(outer.f_code), outer.f_back
        calls.setdefault((caller, callee))

    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(None)


def backbone() -> nn.Module:
    """Builds README's backbone."""
    torch.manual_seed(0)
    model: nn.Module = resnet18(num_classes=3)
    return model


def trace_readme(folder: Path) -> dict[str, Calls]:
    """Runs README's lines, and returns the calls of each."""
    steps = ("inject", "parameter groups", "training step", "save", "load")
    traced: dict[str, Calls] = {step: {} for step in steps}
    model, other, path = backbone(), backbone(), folder / "adapters.pt"
    with recorded(traced["inject"]):
        resadapt.inject_adapters(model, head="fc")
    with recorded(traced["parameter groups"]):
        groups = resadapt.parameter_groups(model, lr=1e-4, head_lr=5e-4)
    optimizer = torch.optim.AdamW(groups)
    images, labels = torch.randn(4, 3, 64, 64), torch.arange(4) % 3
    with recorded(traced["training step"]):
        loss = nn.functional.cross_entropy(model.train()(images), labels)
        torch.autograd.backward(loss)
        optimizer.step()
    with recorded(traced["save"]):
        resadapt.save_adapters(model, path, rebuild=backbone)
    with recorded(traced["load"]):
        resadapt.load_adapters(other, path)
    return traced


def table(counts: dict[str, dict[str, int]]) -> str:
    """Returns counts as lines of text, a row each."""
    columns = list(next(iter(counts.values())))
    lines = [f"{'':18}" + "".join(f"{column:>12}" for column in columns)]
    for name, row in counts.items():
        lines.append(f"{name:18}" + "".join(f"{row[column]:12}" for column in columns))
    return "\n".join(lines)


def pairs(calls: Calls) -> list[tuple[str, str]]:
    """Returns caller and callee of each call as text."""
    return [(str(caller or "README"), str(callee)) for caller, callee in calls]


def listing(name: str, calls: Calls) -> str:
    """Returns the files, the calls in their order, and which of them jump back."""
    reading = read(calls)
    lines = ["", name, *(f"  {file}" for file in reading.files)]
    entered: set[Function] = set()
    for caller, callee in calls:
        jump = callee in reading.jumps_back and callee not in entered
        entered.add(callee)
        lines.append(f"  {'back' if jump else '':6}{caller or 'README'} -> {callee}")
    return "\n".join(lines)


def main() -> None:
    """Traces, and prints what was counted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print JSON in place of a table")
    parser.add_argument("--list", action="store_true", help="list the files and calls as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        traced = trace_readme(Path(folder))
    traced["all"] = {call: None for calls in traced.values() for call in calls}
    counts = {name: read(calls).counts() for name, calls in traced.items()}
    sources = list(PACKAGE.rglob("*.py"))
    package = {
        "files": len(sources),
        "lines": sum(source.read_bytes().count(b"\n") for source in sources),
        "public names": len(resadapt.__all__),
    }
    if options.json:
        result: dict[str, Any] = {"counts": counts, "package": package}
        if options.list:
            result["files"] = {name: read(calls).files for name, calls in traced.items()}
            result["calls"] = {name: pairs(calls) for name, calls in traced.items()}
        print(json.dumps(result, indent=2))
        return
    print(table(counts))
    print("\npackage: {files} files, {lines} lines, {public names} public names".format(**package))
    if options.list:
        print("\n".join(listing(name, calls) for name, calls in traced.items()))


if __name__ == "__main__":
    main()
