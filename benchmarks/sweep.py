"""Every ConvNet of timm and torchvision, from the injection to the folded copy: what works.

One row a model, with random weights, in a process of its own. Rows that are already in the results
are kept, so an interrupted sweep goes on where it stopped. An hour or two on one core.

$ .venv/bin/python benchmarks/sweep.py
$ .venv/bin/python benchmarks/sweep.py --again "timm/resnet*"
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from backbones import CASES, Case, layers_of
from measuring import RESULTS, markdown, on_one_core, write
from torch import Tensor, nn

from resadapt import (
    InjectionError,
    adapter_state_dict,
    check_backbone,
    fold_adapters,
    inference_copy,
    inject_adapters,
    list_adapters,
    load_adapters,
    optimize_backbone,
    parameter_groups,
    remove_adapters,
    save_adapters,
    trainable_parameters,
)
from resadapt.base.inputs import map_tensors, named_in

STEPS = ("inject", "train", "save", "reload", "copy", "optimize", "remove", "fold")
WITHOUT = "not needed"
NEEDED = "needed"
SECONDS = 900
FOLDED = 4
"""Convolutions with adapters that are folded."""
CLOSE = 1e-6
"""Largest difference after copying, optimizing and folding, relative to the largest value."""


class Wrong(Exception):
    """A step gave a wrong result without an error."""


def sweep(name: str) -> dict[str, Any]:
    """The row of a model: for each step its seconds, or why it did not work."""
    on_one_core()
    case = CASES[name]
    row: dict[str, Any] = {"steps": {}, "warnings": []}
    started = time.perf_counter()
    case.build()  # an error here is not ours
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _Subject(case, Path(folder) / "set.pt", row).run()
    row["warnings"] = sorted(
        {_line(w.message) for w in caught if w.category.__module__.startswith("resadapt.")}
    )
    row["seconds"] = round(time.perf_counter() - started, 1)
    return row


class _Subject:
    """A model, and what each step finds out about it."""

    def __init__(self, case: Case, path: Path, row: dict[str, Any]) -> None:
        self.case, self.path, self.row = case, path, row
        self.model, self.inputs = case.build(), case.inputs()
        self.before, self.plain = _picture(self.model), _outputs(self.model, self.inputs)
        self.trained: dict[str, Tensor] = {}

    def run(self) -> None:
        """Takes all steps; those after an injection that fails are left out."""
        for step in STEPS:
            started = time.perf_counter()
            try:
                getattr(self, f"_{step}")()
                self.row["steps"][step] = round(time.perf_counter() - started, 2)
            except Exception as error:
                kind = "" if isinstance(error, Wrong) else f"{type(error).__name__}: "
                self.row["steps"][step] = f"{kind}{_line(error)}"
                if step == "inject":
                    break

    def _inject(self) -> None:
        layers = layers_of(self.model, self.case)
        head = _head_of(self.model)
        # A rectifier may let nothing through, so nothing would move.
        options: dict[str, Any] = {"family": "bottleneck", "activation": "gelu", "head": head}
        try:
            inject_adapters(self.model, layers, 8, **options)
            self.row["example"] = WITHOUT
        except InjectionError as error:
            if "example_input" not in str(error):
                raise
            self.row["example"] = NEEDED
            inject_adapters(self.model, layers, 8, **options, example_input=self.inputs)
        self.row["sites"] = len(list_adapters(self.model)[0].sites)
        if wrong := _wrong_channels(self.model, self.inputs):
            raise Wrong(f"adapts another dimension: {', '.join(wrong)}")
        _same(_outputs(self.model, self.inputs), self.plain, "outputs before training", 0.0)

    def _train(self) -> None:
        start = adapter_state_dict(self.model)
        optimizer = torch.optim.AdamW(parameter_groups(self.model, 1e-3))
        self.model.train()
        for _ in range(3):
            optimizer.zero_grad()
            torch.autograd.backward(_total(self.case.call(self.model, self.inputs)))
            optimizer.step()
        self.model.eval()
        self.trained = adapter_state_dict(self.model)
        if still := [key for key, value in self.trained.items() if torch.equal(value, start[key])]:
            raise Wrong(f"{len(still)} of {len(start)} tensors did not move, such as {still[0]}")
        if drifted := check_backbone(self.model).drifted:
            raise Wrong(f"{len(drifted)} drifted, such as {drifted[0]}")

    def _save(self) -> None:
        found = save_adapters(
            self.model, self.path, probe=self.inputs, rebuild=self.case.build
        ).checks
        if open_ := [c for c in found if c.outcome != "passed" and c.name != "metric"]:
            raise Wrong("; ".join(f"{c.name} {c.outcome}: {c.detail}" for c in open_))

    def _reload(self) -> None:
        reloaded = load_adapters(self.case.build(), self.path)
        live = _outputs(self.model, self.inputs)
        _same(_outputs(reloaded, self.inputs), live, "outputs", 0.0)

    def _copy(self) -> None:
        copied = inference_copy(self.model)
        live = _outputs(self.model, self.inputs)
        _same(_outputs(copied, self.inputs), live, "outputs", CLOSE)

    def _optimize(self) -> None:
        model, inputs, close = _precise(self.model, self.inputs)
        expected, gradients = _outputs(model, inputs), self._gradients(model, inputs)
        optimize_backbone(model)
        _same(_outputs(model, inputs), expected, "outputs", close)
        _same(self._gradients(model, inputs), gradients, "gradients", close)

    def _gradients(self, model: nn.Module, inputs: Any) -> dict[str, Tensor]:
        parameters = list(trainable_parameters(model.eval()))
        total = _total(self.case.call(model, inputs))
        found = torch.autograd.grad(total, parameters, allow_unused=True)
        return {str(n): grad for n, grad in enumerate(found) if grad is not None}

    def _remove(self) -> None:
        remove_adapters(self.model)
        after = _picture(self.model)
        if changed := [
            key for key in self.before | after if self.before.get(key) != after.get(key)
        ]:
            raise Wrong(f"{len(changed)} not as before, such as {changed[0]}")
        _same(_outputs(self.model, self.inputs), self.plain, "outputs", 0.0)

    def _fold(self) -> None:
        model, inputs, close = _precise(self.model, self.inputs)
        layers = _convolutions(model, self.case.inside)
        inject_adapters(model, layers, 4, family="lora", dropout=0.0)
        with torch.no_grad():
            for parameter in trainable_parameters(model):
                parameter.add_(0.01 * torch.randn_like(parameter))
        expected = _outputs(model, inputs)
        _same(_outputs(fold_adapters(model), inputs), expected, "outputs", close)


def _precise(model: nn.Module, inputs: Any) -> tuple[nn.Module, Any, float]:
    """A copy in float64 if the model runs in it, the inputs, and how close values should be.

    Networks with random weights may amplify rounding a thousandfold.
    """
    double, precise = copy.deepcopy(model).double(), map_tensors(inputs, Tensor.double)
    try:
        _outputs(double, precise)
    except RuntimeError:  # the model makes tensors in float32
        return copy.deepcopy(model), inputs, 1e-3
    return double, precise, CLOSE


def _head_of(model: nn.Module) -> tuple[str, ...]:
    """The last fully connected layer, unless it is inside a block."""
    linear = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    return tuple(linear[-1:]) if linear and linear[-1].count(".") <= 1 else ()


def _convolutions(model: nn.Module, inside: str) -> list[str]:
    """A few convolutions of the whole depth, stock ones if there are any."""
    found = {
        name: type(module) in (nn.Conv2d, nn.Conv3d)
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Conv3d) and name.startswith(inside)
    }
    names = [name for name, stock in found.items() if stock] or list(found)
    return sorted({names[n * (len(names) - 1) // (FOLDED - 1)] for n in range(FOLDED)})


def _wrong_channels(model: nn.Module, inputs: Any) -> list[str]:
    """The sites whose square maps have the channels in another place than the adapter takes."""
    sites = {site.name: site for site in list_adapters(model)[0].sites}
    shapes: dict[str, tuple[int, ...]] = {}

    def keep(name: str, _module: nn.Module, _args: object, output: Any) -> None:
        tensors = [tensor for _, tensor in named_in(output)]
        if tensors and tensors[0].ndim == 4:
            shapes[name] = tuple(tensors[0].shape)

    handles = [
        model.get_submodule(name).register_forward_hook(partial(keep, name)) for name in sites
    ]
    _outputs(model, inputs)
    for handle in handles:
        handle.remove()
    wrong = []
    for name, (_, first, height, last) in shapes.items():
        if (height == last) != (first == height):  # else nobody can tell
            dim, channels = (1, first) if height == last else (-1, last)
            if (sites[name].channel_dim, sites[name].channels) != (dim, channels):
                wrong.append(f"{name} gives {shapes[name]}, taken as {sites[name].shape_text}")
    return wrong


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    return dict(named_in(model.eval()(*arguments)))


def _same(
    found: dict[str, Tensor], expected: dict[str, Tensor], what: str, tolerance: float
) -> None:
    """Asks for equal bits, or for values that are close."""
    if found.keys() != expected.keys() or not found:
        raise Wrong(f"{what} have other names")
    for key, tensor in expected.items():
        other = found[key]
        if torch.equal(tensor, other):
            continue
        if tensor.shape != other.shape:
            raise Wrong(f"{what} have another shape")
        if not tensor.isfinite().all():
            raise Wrong(f"{what} are not finite")
        largest = float(tensor.abs().max())
        difference = float((tensor - other).abs().max())
        if not difference <= tolerance * largest:
            raise Wrong(f"{what} differ by {difference / (largest or 1):.0e} of the largest value")


def _total(output: Any) -> Tensor:
    """A loss in which every output counts, each value with another weight."""
    return torch.stack(
        [
            (tensor * torch.linspace(-1, 1, tensor.numel()).reshape(tensor.shape)).mean()
            + tensor.square().mean()
            for _, tensor in named_in(output)
            if tensor.requires_grad
        ]
    ).sum()


def _picture(model: nn.Module) -> dict[str, Any]:
    """What removal brings back."""
    model.eval()
    found: dict[str, Any] = {
        f"tensor {key}": value.cpu().numpy().tobytes() for key, value in model.state_dict().items()
    }
    found |= {f"flag {key}": value.requires_grad for key, value in model.named_parameters()}
    for name, module in model.named_modules():
        hooks = [len(value) for key, value in module.__dict__.items() if key.endswith("_hooks")]
        found[f"module {name}"] = (type(module), sorted(module.__dict__), hooks)
    return found


def _line(error: object) -> str:
    """A message in one line of a table."""
    return " ".join(str(error).split()).replace("|", "/")[:300]


def versions() -> dict[str, str]:
    """The versions that rows are compared within."""
    found = {}
    for package in ("resadapt", "torch", "torchvision", "timm"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def in_a_process(name: str) -> dict[str, Any]:
    """The row of a model from a process of its own, which may crash or hang."""
    command = [sys.executable, __file__, "--one", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"steps": {}, "warnings": [], "error": f"took more than {SECONDS} s"}
    if done.returncode == 0:
        row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return row
    last = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
    return {"steps": {}, "warnings": [], "error": _line(last)}


def table(result: dict[str, Any]) -> str:
    """The rows in Markdown, and below them what did not work."""
    rows = result["rows"]
    lines, notes = [], []
    for name, row in rows.items():
        cells = [_cell(row["steps"].get(step)) for step in STEPS]
        sites = str(row.get("sites", ""))
        lines.append(
            [name, sites, row.get("example", ""), *cells, f"{row.get('seconds', 0):.0f} s"]
        )
        failed = [(s, text) for s, text in row["steps"].items() if isinstance(text, str)]
        failed += [("error", row["error"])] if "error" in row else []
        failed += [("warning", text) for text in row["warnings"]]
        notes += [f"- {name}, {step}: {text}" for step, text in failed]
    whole = sum(
        len(row["steps"]) == len(STEPS)
        and not any(isinstance(s, str) for s in row["steps"].values())
        for row in rows.values()
    )
    without = sum(row.get("example") == WITHOUT for row in rows.values())
    found = ", ".join(f"{package} {number}" for package, number in result["versions"].items())
    about = (
        f"{whole} of {len(rows)} models pass every step, {without} without `example_input`. "
        f"{result['what']}. {found}.\n"
    )
    heading = ("model", "sites", "`example_input`", *STEPS, "all")
    parts = [about, markdown(heading, lines)]
    return "\n".join(parts + (["\n".join(notes) + "\n"] if notes else []))


def _cell(found: object) -> str:
    return "" if found is None else "**fails**" if isinstance(found, str) else "yes"


def collect(names: Iterable[str], again: str, measure: Callable[[str], dict[str, Any]]) -> None:
    """Sweeps over models, and writes the results after each."""
    path, now = RESULTS / "sweep.json", versions()
    kept = json.loads(path.read_text()) if path.exists() else {}
    rows = kept["rows"] if kept.get("versions") == now else {}
    for name in names:
        if name not in rows or (again and fnmatch(name, again)):
            rows[name] = measure(name)
            result = {
                "what": "Random weights, small pictures, three steps of training",
                "versions": now,
                "rows": {each: rows[each] for each in CASES if each in rows},
            }
            write("sweep", result, table(result))
            print(name, *(f"{step}: {_cell(found)}" for step, found in rows[name]["steps"].items()))


def main() -> None:
    """Sweep over all models, or one in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="*", help='models, such as "timm/*"')
    parser.add_argument("--again", default="", help="models whose rows are made anew")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(sweep(options.one)))
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    collect((n for n in CASES if fnmatch(n, options.only)), options.again, in_a_process)


if __name__ == "__main__":
    main()
