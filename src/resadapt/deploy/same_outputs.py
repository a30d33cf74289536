"""Compares the outputs of a copy with those of the model, on a generated input."""

from __future__ import annotations

import copy
import math
import warnings

import torch
from torch import Tensor, nn

from resadapt.base.errors import AdapterError, AdapterWarning
from resadapt.base.inputs import generate, guesses, map_tensors
from resadapt.base.undisturbed import outputs_of
from resadapt.injection.ledger import ledger_of
from resadapt.injection.switching import activate
from resadapt.injection.walk import backbone_modules, unwrap

__all__ = ["check_outputs"]

_COARSE = 1e-4
"""Machine epsilon from which on a difference is only a warning: half precision."""


def check_outputs(model: nn.Module, name: str, copied: nn.Module) -> None:
    """Compares the outputs of a copy with those of the model and one set, up to rounding.

    Both are copied before they run, so neither changes; hooks of the user run too. Nothing is
    compared if no input can be generated, or if the model is not deterministic. In half precision
    rounding can change the outputs much, so a difference is only a warning.

    Raises:
        AdapterError: The outputs differ, or the copy raises an error.
    """
    live, copied = copy.deepcopy(unwrap(model)), copy.deepcopy(copied)
    ledger = ledger_of(live)
    activate(live, ledger, name)
    device = next((parameter.device for parameter in live.parameters()), torch.device("cpu"))
    for form in [
        ledger.sets[name].example,
        *guesses(module for _, module in backbone_modules(live)),
    ]:
        try:
            inputs = map_tensors(generate(form), lambda tensor: tensor.to(device))
            expected, again = outputs_of(live, inputs), outputs_of(live, inputs)
        except Exception:  # the model does not accept this input
            continue
        if not _difference(expected, again, 0.0) > 0.0:
            break
    else:
        return
    try:
        found = outputs_of(copied, inputs)
    except Exception as error:
        raise AdapterError(
            f"The copy fails where the model runs: {type(error).__name__}: {error}"
        ) from error
    tensors = [*nn.Module.parameters(live), *expected.values()]
    eps = max(
        (torch.finfo(tensor.dtype).eps for tensor in tensors if tensor.is_floating_point()),
        default=0.0,
    )
    if _difference(expected, found, eps) > 1.0:
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


def _difference(expected: dict[str, Tensor], found: dict[str, Tensor], eps: float) -> float:
    """Returns the largest difference as a multiple of the tolerance; inf if the forms differ."""
    if {key: tensor.shape for key, tensor in expected.items()} != {
        key: tensor.shape for key, tensor in found.items()
    }:
        return math.inf
    worst = 0.0
    for key, tensor in expected.items():
        if not tensor.is_floating_point() or not tensor.numel() or tensor.equal(found[key]):
            continue
        one, other = tensor.double(), found[key].double()
        if not one.isfinite().all():  # NaN and inf cannot be compared
            continue
        # Relative to the output, and absolute, since outputs that cancel out consist of rounding
        # alone; inputs are in [-1, 1).
        allowed = eps**0.5 * float(one.abs().max()) + 10 * eps
        difference = float((one - other).abs().max())
        worst = (
            math.inf if math.isnan(difference) or not allowed else max(worst, difference / allowed)
        )
    return worst
