"""Whether a copy gives what its model gives, on an input made up for them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from resadapt.base.errors import AdapterError
from resadapt.base.inputs import generate, guesses
from resadapt.base.nested import map_tensors, named_in
from resadapt.base.undisturbed import call, undisturbed
from resadapt.injection.ledger import ledger_of
from resadapt.injection.switching import activated
from resadapt.injection.walk import backbone_modules, unwrap

__all__ = ["check_outputs"]


def check_outputs(model: nn.Module, name: str, copied: nn.Module) -> None:
    """Compares a copy with the model, running with one of its sets, up to rounding.

    Nothing is compared where no input can be made up, or the model gives other outputs each time.

    Raises:
        AdapterError: The outputs differ, or the copy does not run.
    """
    inner = unwrap(model)
    ledger = ledger_of(inner)
    device = next((parameter.device for parameter in inner.parameters()), torch.device("cpu"))
    with activated(inner, ledger, name):
        for form in [ledger.sets[name].example, *guesses(module for _, module in backbone_modules(inner))]:
            try:
                inputs = map_tensors(generate(form), lambda tensor: tensor.to(device))
                expected, again = _outputs(inner, inputs), _outputs(inner, inputs)
            except Exception:  # not an input for it
                continue
            if _difference(expected, again) == 0.0:
                break
        else:
            return
    try:
        found = _outputs(copied, inputs)
    except Exception as error:
        raise AdapterError(f"The copy does not run where the model does: {type(error).__name__}: {error}") from error
    if not _difference(expected, found) <= 1.0:
        raise AdapterError(
            "The copy gives other outputs than the model. A module's weight or attributes are used elsewhere than in its own "
            "forward, or a site's module does not run as a module: choose the module around it, or keep the adapters as they are."
        )


def _outputs(model: nn.Module, inputs: object) -> dict[str, Tensor]:
    own = map_tensors(inputs, torch.clone)  # which the model may change in place
    with undisturbed(model):
        return dict(named_in(call(model, own)))


def _difference(expected: dict[str, Tensor], found: dict[str, Tensor]) -> Any:
    """Returns the largest difference, as a multiple of what rounding may bring about; infinite where the forms differ."""
    if {key: tensor.shape for key, tensor in expected.items()} != {key: tensor.shape for key, tensor in found.items()}:
        return math.inf
    worst = 0.0
    for key, tensor in expected.items():
        if not tensor.is_floating_point() or not tensor.numel() or tensor.equal(found[key]):
            continue
        one, other = tensor.double(), found[key].double()
        if not one.isfinite().all():  # nothing to compare with
            continue
        allowed = torch.finfo(tensor.dtype).eps ** 0.5 * one.abs().max()
        difference = float((one - other).abs().max() / allowed)
        worst = math.inf if math.isnan(difference) else max(worst, difference)
    return worst
