"""Compares the outputs of a copy with those of the model, on a generated input."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resadapt.base.errors import AdapterError, AdapterWarning
from resadapt.base.inputs import generate, guesses, map_tensors
from resadapt.base.undisturbed import outputs_of
from resadapt.injection.ledger import ledger_of
from resadapt.injection.switching import activate
from resadapt.injection.walk import backbone_modules, unwrap

__all__ = [
    "Reference",
    "check_outputs",
    "check_rounding",
    "reference_for",
    "usual_difference",
]

_COARSE = 1e-4
"""Machine epsilon from which on a difference is only a warning: half precision."""
_HALF = {torch.bfloat16: 0.5, torch.float16: 0.1}
"""Usual difference of a copy in half precision, as a fraction of the largest output.

``benchmarks/inference.py`` measures it; random weights may amplify rounding beyond it.
"""


@dataclass(frozen=True)
class Reference:
    """What the outputs of a copy are compared with.

    Args:
        inputs: A generated input of the model.
        outputs: The outputs of the model and one set for the input, by place.
        eps: Machine epsilon of the coarsest dtype in the model and its outputs.
    """

    inputs: object
    outputs: dict[str, Tensor]
    eps: float


def reference_for(model: nn.Module, name: str) -> Reference | None:
    """Runs a model with one set on a generated input.

    The model is copied before it runs, so it does not change; hooks of the user run too.

    Returns:
        The outputs; None if no input can be generated, or if the model is not deterministic.
    """
    live = copy.deepcopy(unwrap(model))
    ledger = ledger_of(live)
    activate(live, ledger, name)
    for inputs in _inputs(live, ledger.sets[name].example):
        try:
            outputs, again = outputs_of(live, inputs), outputs_of(live, inputs)
        except Exception:  # the model does not accept this input
            continue
        if not _largest(outputs, again, lambda _: 0.0) > 0.0:
            tensors = [*nn.Module.parameters(live), *outputs.values()]
            precisions = (torch.finfo(each.dtype).eps for each in tensors if _is_float(each))
            return Reference(inputs, outputs, max(precisions, default=0.0))
    return None


def _inputs(model: nn.Module, example: Any) -> Iterator[object]:
    """Yields generated inputs that the model may accept, on the device of its first parameter."""
    like = next(model.parameters(), torch.empty(0, device="cpu"))
    for form in [example, *guesses(module for _, module in backbone_modules(model))]:
        try:
            inputs = generate(form)
        except ValueError:
            continue
        yield map_tensors(inputs, lambda tensor: tensor.to(like.device))
        if like.is_floating_point():  # the model may have been cast since the example was given
            yield map_tensors(inputs, lambda tensor: tensor.to(like))


def check_outputs(reference: Reference | None, copied: nn.Module) -> None:
    """Checks that the outputs of a copy are those of the model, up to rounding.

    The copy is copied before it runs, so it does not change. Nothing is compared without a
    reference. In half precision rounding can change the outputs much, so a difference is only a
    warning.

    Raises:
        AdapterError: The outputs differ, or the copy raises an error.
    """
    if reference is None:
        return
    eps = reference.eps
    # Relative to the output, and absolute, since outputs that cancel out consist of rounding
    # alone; inputs are in [-1, 1).
    found = _run(copied, reference.inputs)
    if _largest(reference.outputs, found, lambda most: eps**0.5 * most + 10 * eps) > 1.0:
        message = (
            "The outputs of the copy differ from the model's. A weight or attribute is used "
            "outside its module's forward, or the model does not call a site's module. Choose "
            "the module around it as the site, or do not fold or copy this model."
        )
        if eps < _COARSE:
            raise AdapterError(message)
        warnings.warn(
            f"{message} In half precision, rounding alone may be the cause.",
            AdapterWarning,
            stacklevel=3,
        )


def check_rounding(reference: Reference | None, copied: nn.Module, dtype: torch.dtype) -> None:
    """Checks how much a cast has changed the outputs of a copy that were the model's before.

    Raises:
        AdapterError: The copy raises an error for an input of this dtype.
    """
    if reference is None:
        return

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if _is_float(tensor) else tensor

    bound = usual_difference(dtype, reference.eps)
    found = _run(copied, map_tensors(reference.inputs, cast))
    difference = _largest(reference.outputs, found, lambda most: most)
    if difference > bound:
        warnings.warn(
            f"On a generated input, the outputs of the copy in {dtype} differ from the model's by "
            f"{difference:.2g} of the largest output, and at most {bound:.2g} is usual. Compare "
            "the copy with the model on your data, or give another dtype.",
            AdapterWarning,
            stacklevel=3,
        )


def usual_difference(dtype: torch.dtype, eps: float) -> float:
    """Returns the usual difference of outputs that only rounding to a dtype has changed.

    Args:
        dtype: The dtype that the outputs are computed in.
        eps: Machine epsilon of what the outputs are compared with.

    Returns:
        The difference as a fraction of the largest output.
    """
    return _HALF.get(dtype) or math.sqrt(max(eps, torch.finfo(dtype).eps))


def _run(copied: nn.Module, inputs: object) -> dict[str, Tensor]:
    try:
        return outputs_of(copy.deepcopy(copied), inputs)
    except Exception as error:
        raise AdapterError(
            f"The copy fails where the model runs: {type(error).__name__}: {error}"
        ) from error


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point()


def _largest(
    expected: dict[str, Tensor], found: dict[str, Tensor], allowed: Callable[[float], float]
) -> float:
    """Returns the largest difference, divided by what is allowed for the largest expected value.

    The result is infinite if the forms differ, or if a difference is found where none is allowed.
    """
    if {key: tensor.shape for key, tensor in expected.items()} != {
        key: tensor.shape for key, tensor in found.items()
    }:
        return math.inf
    worst = 0.0
    for key, tensor in expected.items():
        if not _is_float(tensor) or not tensor.numel() or tensor.equal(found[key]):
            continue
        one, other = tensor.double(), found[key].double()
        if not one.isfinite().all():  # NaN and inf cannot be compared
            continue
        unit = allowed(float(one.abs().max()))
        difference = float((one - other).abs().max())
        worst = math.inf if math.isnan(difference) or not unit else max(worst, difference / unit)
    return worst
