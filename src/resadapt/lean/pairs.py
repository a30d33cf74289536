"""A frozen norm behind a frozen convolution, computed as one convolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from resadapt.base.tensors import stamp
from resadapt.base.undisturbed import is_undisturbed
from resadapt.injection.freeze import FOLDED, FrozenStatistics, Overlay
from resadapt.injection.intercept import Intercept
from resadapt.lean.functions import PLAIN, is_ordinary

__all__ = ["FoldedPair", "normalised"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_NORM = ("weight", "bias", "running_mean", "running_var")


class FoldedPair:
    """The weight and bias of a convolution with a norm behind it, and what they were made from.

    A copy of a module gets an empty one, and so does a pickled module.
    """

    def __init__(self) -> None:
        self._made_from: Any = None
        self.tensors: tuple[Tensor, ...] = ()
        """Weight and bias, once they are made."""

    def __deepcopy__(self, memo: Any) -> FoldedPair:
        """Returns an empty one."""
        return FoldedPair()

    def __reduce__(self) -> tuple[Any, ...]:
        """Returns how to make an empty one."""
        return FoldedPair, ()

    def of(self, convolution: nn.Module, norm: nn.Module) -> tuple[Tensor, ...]:
        """Returns weight and bias, which are made anew when a tensor they were made from was changed or moved."""
        made_from = [None if part is None else stamp(part) for part in _parts(convolution, norm)]
        tensors = self.tensors
        if not tensors or made_from != self._made_from:
            tensors = _fold(convolution, norm)
            self.tensors, self._made_from = tensors, made_from
        return tensors


def normalised(convolution: nn.Module, norm: nn.Module, x: Any) -> Any:
    """Returns what a norm makes of a convolution's output: in one step where both are frozen and nothing is between them."""
    if not _are_one(convolution, norm) or not is_ordinary(x) or is_undisturbed():
        return norm(convolution(x))
    weight, bias = convolution.__dict__[FOLDED].of(convolution, norm)
    return convolution._conv_forward(x, weight, bias)  # type: ignore[operator]


def _are_one(convolution: nn.Module, norm: nn.Module) -> bool:
    """Tells whether nothing can see, or change, what a convolution hands to the norm behind it."""
    return (
        FOLDED in convolution.__dict__
        and isinstance(convolution, Overlay)
        and isinstance(norm, FrozenStatistics)
        and norm.running_var is not None
        and all(part is None or (type(part) in PLAIN and not part.requires_grad) for part in _parts(convolution, norm))
        and not any(module.__dict__.get(hooks) for module in (convolution, norm) for hooks in _HOOKS)
        and not (_is_replaced(convolution) or _is_replaced(norm))
        and not (torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)
        and not (torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks)
    )


def _is_replaced(module: nn.Module) -> bool:
    """Tells whether something stands in the place of a module's forward."""
    forward = module.__dict__.get("forward")
    return forward is not None and not (isinstance(forward, Intercept) and forward.only_passes_on)


def _parts(convolution: nn.Module, norm: nn.Module) -> list[Any]:
    """Returns the tensors that a convolution and a norm compute with, None where they have none."""
    return [convolution.weight, convolution.bias, *(getattr(norm, name) for name in _NORM)]


@torch.inference_mode(False)  # it may be for training later
@torch.no_grad()
def _fold(convolution: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Returns the weight and bias of a convolution that a norm follows, computed in float64 and rounded once."""
    weight: Any = convolution.weight
    bias: Any = 0.0 if convolution.bias is None else convolution.bias.double()
    scale: Any = 1.0 if norm.weight is None else norm.weight.double()
    shift: Any = 0.0 if norm.bias is None else norm.bias.double()
    factor = scale * (norm.running_var.double() + norm.eps).rsqrt()
    moved = (bias - norm.running_mean.double()) * factor + shift
    folded = (weight.double() * factor.reshape(-1, *[1] * (weight.ndim - 1))).to(weight.dtype)
    if weight.ndim == 4 and (weight.device.type == "cpu" or weight.is_contiguous(memory_format=torch.channels_last)):
        folded = folded.contiguous(memory_format=torch.channels_last)  # oneDNN is faster so, and hands it on from layer to layer
    return folded, moved.to(weight.dtype)
