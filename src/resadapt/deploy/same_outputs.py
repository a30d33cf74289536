"""Whether a copy gives what its model gives, on an input made up for them."""

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
"""Resolution of a dtype from which on rounding may decide what a model does."""


def check_outputs(model: nn.Module, name: str, copied: nn.Module) -> None:
    """Compares a copy with the model, running with one of its sets, up to rounding.

    Both run as copies, so that they stay as they are; hooks of the user's run with them. Nothing is
    compared where no input can be made up, or the model gives other outputs each time. In half
    precision, where rounding may decide what a model does, a difference is a warning.

    Raises:
        AdapterError: The outputs differ, or the copy does not run.
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
        except Exception:  # not an input for it
            continue
        if not _difference(expected, again, 0.0) > 0.0:
            break
    else:
        return
    try:
        found = outputs_of(copied, inputs)
    except Exception as error:
        raise AdapterError(
            f"The copy does not run where the model does: {type(error).__name__}: {error}"
        ) from error
    tensors = [*nn.Module.parameters(live), *expected.values()]
    eps = max(
        (torch.finfo(tensor.dtype).eps for tensor in tensors if tensor.is_floating_point()),
        default=0.0,
    )
    if _difference(expected, found, eps) > 1.0:
        message = (
            "The copy gives other outputs than the model. A module's weight or attributes are used "
            "elsewhere than in its own forward, or a site's module does not run as a module: "
            "choose the module around it, or keep the adapters as they are."
        )
        if eps < _COARSE:
            raise AdapterError(message)
        warnings.warn(
            f"{message} Or it is the rounding of half precision.", AdapterWarning, stacklevel=3
        )


def _difference(expected: dict[str, Tensor], found: dict[str, Tensor], eps: float) -> float:
    """Returns the largest difference, as a multiple of what rounding may bring about.

    Infinite where the forms differ.
    """
    if {key: tensor.shape for key, tensor in expected.items()} != {
        key: tensor.shape for key, tensor in found.items()
    }:
        return math.inf
    worst = 0.0
    for key, tensor in expected.items():
        if not tensor.is_floating_point() or not tensor.numel() or tensor.equal(found[key]):
            continue
        one, other = tensor.double(), found[key].double()
        if not one.isfinite().all():  # nothing to compare with
            continue
        # Relative to the output; and absolute, since what cancels out, of inputs between -1 and 1,
        # leaves rounding alone.
        allowed = eps**0.5 * float(one.abs().max()) + 10 * eps
        difference = float((one - other).abs().max())
        worst = (
            math.inf if math.isnan(difference) or not allowed else max(worst, difference / allowed)
        )
    return worst
