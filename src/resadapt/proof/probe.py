"""Probes: an input on which a model's outputs are recorded and compared."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from resadapt.base.fingerprint import raw_bytes
from resadapt.base.quiet import call, generate, undisturbed
from resadapt.files.adapter_file import ProbeRecord
from resadapt.injection.slots import backbone_modules, is_leaf

__all__ = ["default_form", "farthest", "input_digest", "outputs_of", "probe_input", "record_probe", "same"]

_MOST = 4096
_SIZES = {nn.Conv1d: (64,), nn.Conv2d: (64, 64), nn.Conv3d: (4, 32, 32)}


def default_form(model: nn.Module) -> Any:
    """Guesses the form of a model's input from its first leaf, if that is a convolution; None if it is not."""
    first = next((module for _, module in backbone_modules(model) if is_leaf(module)), None)
    for kind, size in _SIZES.items():
        if isinstance(first, kind):
            return {"shape": [2, first.in_channels, *size], "dtype": str(first.weight.dtype).removeprefix("torch.")}
    return None


def probe_input(model: nn.Module, form: Any) -> object:
    """Makes the input of a form on the model's device."""
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    return _mapped(generate(form), lambda tensor: tensor.to(device))


def outputs_of(model: nn.Module, inputs: object) -> dict[str, Tensor]:
    """Runs a model in evaluation mode and returns every tensor of its output by its place there; the model is left as it was."""
    own = _mapped(inputs, torch.clone)  # which the model may change in place
    with undisturbed(model):
        return dict(_flat(call(model, own)))


def input_digest(inputs: object) -> str:
    """Returns a digest over all tensors of an input."""
    whole = hashlib.sha256()
    for place, tensor in _flat(inputs):
        whole.update(f"{place} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        whole.update(raw_bytes(tensor))
    return whole.hexdigest()


def record_probe(source: str, form: Any, inputs: object, outputs: Mapping[str, Tensor]) -> tuple[ProbeRecord, dict[str, Tensor]]:
    """Returns what a file keeps of a probe: a record, and at most 4096 evenly spaced elements of each output."""
    steps = {place: max(1, -(-tensor.numel() // _MOST)) for place, tensor in outputs.items()}
    described = {place: {"shape": list(tensor.shape), "step": steps[place]} for place, tensor in outputs.items()}
    samples = {f"probe.{place}": sample(tensor, steps[place]) for place, tensor in outputs.items()}
    return ProbeRecord(source, form, input_digest(inputs), described), samples


def sample(tensor: Tensor, step: int) -> Tensor:
    """Returns every step-th element in row-major order."""
    return tensor.detach().cpu().contiguous().reshape(-1)[::step]


def farthest(record: ProbeRecord, stored: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> tuple[float, bool]:
    """Compares outputs with those that a file recorded, perhaps on another machine.

    Returns:
        The largest difference relative to the largest output, and whether it is within the square root of the dtype's epsilon
        (3e-4 for float32), which leaves room for other processors' rounding but not for other weights.
    """
    if {place: list(tensor.shape) for place, tensor in outputs.items()} != {p: o["shape"] for p, o in record.outputs.items()}:
        return float("nan"), False
    worst, ok = 0.0, True
    for place, tensor in outputs.items():
        old, new = stored[f"probe.{place}"], sample(tensor, record.outputs[place]["step"])
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            return float("nan"), False
        if not old.numel() or torch.equal(old, new):
            continue
        inexact = tensor.is_floating_point() or tensor.is_complex()
        difference = float((old - new).abs().max() / old.abs().max()) if inexact else math.inf
        allowed = torch.finfo(tensor.dtype).eps ** 0.5 if inexact else 0.0
        worst = difference if math.isnan(difference) else max(worst, difference)
        ok = ok and difference <= allowed
    return worst, ok


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Tells whether two outputs have the same tensors, bit for bit."""
    return one.keys() == other.keys() and all(
        (one[k].dtype, one[k].shape) == (other[k].dtype, other[k].shape) and raw_bytes(one[k]) == raw_bytes(other[k]) for k in one
    )


def _flat(value: object, place: str = "output") -> list[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        return [(place, value)]
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    return [pair for key, item in items for pair in _flat(item, f"{place}.{key}")]


def _mapped(value: object, function: Callable[[Tensor], Tensor]) -> object:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _mapped(item, function) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_mapped(item, function) for item in value)  # type: ignore[call-arg, attr-defined]
    return value
