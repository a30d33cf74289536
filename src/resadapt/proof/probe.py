"""Probes: an input on which a model's outputs are compared and recorded."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from resadapt.base.errors import AdapterError
from resadapt.base.inputs import generate, guesses, map_tensors, named_in
from resadapt.base.tensors import raw_bytes, same_bits
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

_MOST_RECORDED = 4096


@dataclass(frozen=True)
class Probe:
    """An input for a model.

    Args:
        inputs: The input.
        form: The form that it was made from; None if the user gave it.
    """

    inputs: object
    form: Any = None

    @property
    def source(self) -> str:
        """Where the input is from, as a file says it."""
        return "given" if self.form is None else "generated"


@dataclass(frozen=True)
class ProbeRun:
    """What a model returned on a probe.

    Args:
        probe: The probe, None if there was none that the model takes.
        outputs: The tensors in its output, by their places there.
        unusable: Why the outputs prove nothing; empty if they prove something.
    """

    probe: Probe | None
    outputs: dict[str, Tensor] = field(default_factory=dict)
    unusable: str = ""


def probe_forms(model: nn.Module, *known: Any) -> list[Any]:
    """Returns the forms that a model's input may have.

    Those that are known, then guesses by its first convolution.
    """
    return [form for form in known if form is not None] + guesses(
        module for _, module in backbone_modules(model)
    )


def run_probe(model: nn.Module, given: object, forms: list[Any]) -> ProbeRun:
    """Runs a model on the first probe that it takes.

    Args:
        model: The model.
        given: An input of the user's; None makes one.
        forms: Forms to make an input from.

    Raises:
        AdapterError: The model does not take the given input.
    """
    if given is not None:
        try:
            return _judged(Probe(given), outputs_of(model, given))
        except AdapterError:
            raise
        except Exception as error:
            raise AdapterError(
                f"The model cannot be called with probe=: {type(error).__name__}: {error}"
            ) from error
    refusal = "no input could be made for this model: pass probe="
    device = next((tensor.device for tensor in nn.Module.parameters(model)), torch.device("cpu"))
    for form in forms:
        try:
            probe = Probe(map_tensors(generate(form), lambda tensor: tensor.to(device)), form)
            return _judged(probe, outputs_of(model, probe.inputs))
        except AdapterError:
            raise
        except Exception as error:
            refusal = f"the model does not take the input {form} that was made for it ({type(error).__name__}): pass probe="
    return ProbeRun(None, unusable=refusal)


def run_again(model: nn.Module, probe: Probe) -> ProbeRun:
    """Runs a model on a probe that another one took."""
    try:
        return _judged(probe, outputs_of(model, probe.inputs))
    except Exception as error:
        return ProbeRun(None, unusable=f"{type(error).__name__}: {error}")


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Tells whether two models' outputs have the same tensors, bit for bit."""
    return one.keys() == other.keys() and all(same_bits(one[key], other[key]) for key in one)


def input_digest(inputs: object) -> str:
    """Returns a digest over all tensors of an input."""
    whole = hashlib.sha256()
    for place, tensor in named_in(inputs):
        whole.update(f"{place} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        whole.update(raw_bytes(tensor))
    return whole.hexdigest()


def record_probe(run: ProbeRun) -> tuple[ProbeRecord | None, dict[str, Tensor]]:
    """Returns what a file keeps of a probe.

    A record, and at most 4096 evenly spaced elements of each output.
    """
    if run.probe is None or run.unusable:
        return None, {}
    steps = {
        place: max(1, -(-tensor.numel() // _MOST_RECORDED)) for place, tensor in run.outputs.items()
    }
    described = {
        place: {"shape": list(tensor.shape), "step": steps[place]}
        for place, tensor in run.outputs.items()
    }
    samples = {
        f"probe.{place}": _sample(tensor, steps[place]) for place, tensor in run.outputs.items()
    }
    return ProbeRecord(
        run.probe.source, run.probe.form, input_digest(run.probe.inputs), described
    ), samples


def compare_with_record(
    record: ProbeRecord, stored: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
) -> tuple[float, bool]:
    """Compares outputs with those that a file recorded, perhaps on another machine.

    Returns:
        The largest difference relative to the largest output, and whether it is within the square
        root of the dtype's epsilon (3e-4 for float32), which leaves room for other processors'
        rounding but not for other weights.
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
            allowed = torch.finfo(new.dtype).eps ** 0.5
            old, new = old.double(), new.double()  # not every dtype can be subtracted
        if not old.numel() or torch.equal(old, new):
            continue
        difference = float((old - new).abs().max() / old.abs().max()) if inexact else math.inf
        worst = difference if math.isnan(difference) else max(worst, difference)
        ok = ok and difference <= allowed
    return worst, ok


def _judged(probe: Probe, outputs: dict[str, Tensor]) -> ProbeRun:
    """Returns a run of a probe, with the reason if its outputs would prove nothing."""
    where = "the probe" if probe.form is None else f"the input {probe.form} that was made for it"
    unusable = ""
    if not sum(tensor.numel() for tensor in outputs.values()):
        unusable = f"the model returned no numbers on {where}: pass a probe= on which it does"
    elif any(_has_nan(tensor) for tensor in outputs.values()):
        unusable = (
            f"the outputs on {where} contain NaN, which proves nothing: pass a probe= without"
        )
    return ProbeRun(probe, outputs, unusable)


def _sample(tensor: Tensor, step: int) -> Tensor:
    """Returns every step-th element in row-major order; of complex ones real and imaginary part."""
    return _real(tensor.detach().cpu().contiguous().reshape(-1)[::step])


def _real(elements: Tensor) -> Tensor:
    return (
        torch.view_as_real(elements.resolve_conj()).flatten()
        if elements.is_complex()
        else elements.resolve_neg()
    )


def _has_nan(tensor: Tensor) -> bool:
    if tensor.is_floating_point():
        tensor = tensor.float()  # the smallest dtypes know no NaN test
    return bool(tensor.isnan().any())
