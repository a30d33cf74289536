"""Probes: an input on which a model's outputs are compared and recorded."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from resadapt.base.autocast import AUTOCAST_DTYPES
from resadapt.base.errors import AdapterError
from resadapt.base.inputs import generate, guesses, map_tensors, named_in
from resadapt.base.tensors import dtype_name, raw_bytes, same_bits
from resadapt.base.undisturbed import outputs_of
from resadapt.files.adapter_file import ProbeRecord
from resadapt.injection.walk import backbone_modules

__all__ = [
    "Probe",
    "ProbeRun",
    "compare_with_record",
    "input_digest",
    "probe_forms",
    "record_probe",
    "run_again",
    "run_probe",
    "same",
]

_MAX_RECORDED = 4096


@dataclass(frozen=True)
class Probe:
    """An input for a model, and the precision that the model runs in.

    Args:
        inputs: The input.
        form: The form that the input was generated from; None for the user's input.
        autocast: The dtype of autocast; None runs without autocast.
    """

    inputs: object
    form: Any = None
    autocast: torch.dtype | None = None

    @property
    def source(self) -> str:
        """Origin of the input, as recorded in a file."""
        return "given" if self.form is None else "generated"

    def outputs(self, model: nn.Module) -> dict[str, Tensor]:
        """Runs a model on the input, and returns the tensors of the output by their places."""
        return outputs_of(model, self.inputs, self.autocast)


@dataclass(frozen=True)
class ProbeRun:
    """The outputs of a model on a probe.

    Args:
        probe: The probe, None if the model accepts none.
        outputs: The tensors in the model's output, by position.
        unusable: Why the outputs cannot be compared; empty if they can.
    """

    probe: Probe | None
    outputs: dict[str, Tensor] = field(default_factory=dict)
    unusable: str = ""


def probe_forms(model: nn.Module, *known: Any) -> list[Any]:
    """Returns possible forms of a model's input: known forms, then guesses.

    The guesses are made from the first convolution.
    """
    return [form for form in known if form is not None] + guesses(
        module for _, module in backbone_modules(model)
    )


def run_probe(
    model: nn.Module, given: object, forms: list[Any], autocast: torch.dtype | None = None
) -> ProbeRun:
    """Runs a model on the first probe that the model accepts.

    Args:
        model: The model.
        given: The user's input; None generates an input.
        forms: Forms to generate an input from.
        autocast: The dtype of autocast; None runs without autocast.

    Raises:
        AdapterError: The model does not accept the given input.
    """
    if given is not None:
        try:
            return _judged(model, Probe(given, autocast=autocast))
        except AdapterError:
            raise
        except Exception as error:
            raise AdapterError(
                f"The model cannot be called with probe=: {type(error).__name__}: {error}"
            ) from error
    refusal = "no input could be generated for this model: pass probe="
    device = next((tensor.device for tensor in nn.Module.parameters(model)), torch.device("cpu"))
    for form in forms:
        try:
            inputs = map_tensors(generate(form), lambda tensor: tensor.to(device))
            return _judged(model, Probe(inputs, form, autocast))
        except AdapterError:
            raise
        except Exception as error:
            refusal = (
                f"the model does not accept the generated input {form} "
                f"({type(error).__name__}): pass probe="
            )
    return ProbeRun(None, unusable=refusal)


def run_again(model: nn.Module, probe: Probe) -> ProbeRun:
    """Runs a model on a probe that another model accepted."""
    try:
        return _judged(model, probe)
    except Exception as error:
        return ProbeRun(None, unusable=f"{type(error).__name__}: {error}")


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Tells whether two models' outputs are equal, bit for bit."""
    return one.keys() == other.keys() and all(same_bits(one[key], other[key]) for key in one)


def input_digest(inputs: object) -> str:
    """Returns a digest over all tensors of an input."""
    digest = hashlib.sha256()
    for place, tensor in named_in(inputs):
        digest.update(f"{place} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def record_probe(run: ProbeRun) -> tuple[ProbeRecord | None, dict[str, Tensor]]:
    """Returns a probe's record for a file, and at most 4096 elements of each output.

    The elements are evenly spaced.
    """
    if run.probe is None or run.unusable:
        return None, {}
    steps = {
        place: max(1, -(-tensor.numel() // _MAX_RECORDED)) for place, tensor in run.outputs.items()
    }
    described = {
        place: {"shape": list(tensor.shape), "step": steps[place]}
        for place, tensor in run.outputs.items()
    }
    samples = {
        f"probe.{place}": _sample(tensor, steps[place]) for place, tensor in run.outputs.items()
    }
    probe = run.probe
    autocast = None if probe.autocast is None else dtype_name(probe.autocast)
    digest = input_digest(probe.inputs)
    return ProbeRecord(probe.source, probe.form, digest, described, autocast), samples


def compare_with_record(
    record: ProbeRecord, stored: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
) -> tuple[float, bool]:
    """Compares outputs with those recorded in a file, possibly on another machine.

    Returns:
        The largest difference relative to the largest output, and whether it is within the square
        root of the epsilon of the dtype or of autocast's dtype (3e-4 for float32), which allows for
        the rounding of other processors but not for other weights.
    """
    if {place: list(tensor.shape) for place, tensor in outputs.items()} != {
        p: o["shape"] for p, o in record.outputs.items()
    }:
        return math.nan, False
    worst, ok = 0.0, True
    for place, tensor in outputs.items():
        old, new = _real(stored[f"probe.{place}"]), _sample(tensor, record.outputs[place]["step"])
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            return math.nan, False
        inexact, allowed = new.is_floating_point(), 0.0
        if inexact:
            dtypes = {new.dtype, AUTOCAST_DTYPES.get(record.autocast or "", new.dtype)}
            allowed = max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5
            old, new = old.double(), new.double()  # not every dtype can be subtracted
        if not old.numel() or torch.equal(old, new):
            continue
        difference = float((old - new).abs().max() / old.abs().max()) if inexact else math.inf
        worst = difference if math.isnan(difference) else max(worst, difference)
        ok = ok and difference <= allowed
    return worst, ok


def _judged(model: nn.Module, probe: Probe) -> ProbeRun:
    """Runs a model on a probe, and returns the reason if the outputs cannot be compared."""
    outputs = probe.outputs(model)
    where = "the probe" if probe.form is None else f"the generated input {probe.form}"
    unusable = ""
    if not sum(tensor.numel() for tensor in outputs.values()):
        unusable = f"the model returned no values on {where}: pass a probe= on which it does"
    elif any(_has_nan(tensor) for tensor in outputs.values()):
        unusable = f"the outputs on {where} contain NaN: pass a probe= with finite outputs"
    return ProbeRun(probe, outputs, unusable)


def _sample(tensor: Tensor, step: int) -> Tensor:
    """Returns every step-th element in row-major order, complex values as real and imaginary."""
    return _real(tensor.detach().cpu().contiguous().reshape(-1)[::step])


def _real(elements: Tensor) -> Tensor:
    return (
        torch.view_as_real(elements.resolve_conj()).flatten()
        if elements.is_complex()
        else elements.resolve_neg()
    )


def _has_nan(tensor: Tensor) -> bool:
    if tensor.is_floating_point():
        tensor = tensor.float()  # isnan does not support the smallest dtypes
    return bool(tensor.isnan().any())
