"""A frozen norm behind a frozen convolution, computed as one convolution."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules import module as torch_module
from typing_extensions import override

from resadapt.base.overlay import FOLDED, Overlay
from resadapt.base.tensors import is_channels_last, stamp
from resadapt.base.undisturbed import is_undisturbed
from resadapt.injection.freeze import FrozenStatistics
from resadapt.injection.intercept import Intercept
from resadapt.injection.private import running_at
from resadapt.lean.functions import STOCK_TENSORS, is_ordinary

__all__ = ["FoldedPair", "InputLayout", "has_hooks", "in_one_step", "with_gradient_as_given"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_NORM = ("weight", "bias", "running_mean", "running_var")


class InputLayout(NamedTuple):
    """What is known of the input of the outermost module that runs pairs.

    Args:
        size: Pixels of its smaller side; 0 if it is no batch of images.
        channels_last: Whether stock modules would have feature maps in channels_last.
    """

    size: int
    channels_last: bool


class FoldedPair:
    """The weight and bias of a convolution with a norm behind it, and what they were made from.

    A copy of a module gets an empty one, and so does a pickled module.

    Args:
        lays_out: Whether the weight, and with it what it gives, lies in channels_last for images of
            some size, where the convolution's own does not.
    """

    def __init__(self, lays_out: bool = False) -> None:
        self._lays_out = lays_out
        self._made: tuple[Any, Any, tuple[Tensor, ...]] = (
            None,
            None,
            (),
        )  # in one, which threads exchange at once

    def __deepcopy__(self, memo: Any) -> FoldedPair:
        """Returns an empty one."""
        return FoldedPair(self._lays_out)

    def __reduce__(self) -> tuple[Any, ...]:
        """Returns how to make an empty one."""
        return FoldedPair, (self._lays_out,)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Weight and bias, once they are made."""
        return self._made[2]

    def of(self, convolution: nn.Module, norm: nn.Module, given: InputLayout) -> tuple[Tensor, ...]:
        """Returns weight and bias, which are made anew when what they were made from was changed or moved."""
        channels_last = self._lays_out and given.size >= _LARGE
        parts = [part for part in _parts(convolution, norm) if part is not None]
        today = [channels_last, norm.eps, *map(stamp, parts)]
        made_from, _, tensors = self._made
        if made_from != today:
            tensors = _fold(convolution, norm, channels_last)
            # Their memory is held, so that nothing else can come to lie where it is and be taken
            # for it.
            self._made = today, [part.detach() for part in parts], tensors
        return tensors


_LARGE = 96
"""Pixels of an image from which on it is faster to have feature maps in channels_last."""


def in_one_step(convolution: nn.Module, norm: nn.Module, x: Any, given: InputLayout) -> Any:
    """Returns what a norm makes of a convolution's output, if both are frozen and nothing is
    between them; else None.

    Args:
        convolution: The convolution.
        norm: The norm behind it.
        x: What the convolution is given.
        given: What the outermost module that runs such pairs was given.
    """
    if not is_ordinary(x) or not _are_one(convolution, norm) or is_undisturbed():
        return None
    weight, bias = convolution.__dict__[FOLDED].of(convolution, norm, given)
    if is_channels_last(weight):
        x = with_gradient_as_given(x, given)
    return convolution._conv_forward(x, weight, bias)  # type: ignore[operator]


def with_gradient_as_given(x: Tensor, given: InputLayout) -> Tensor:
    """Returns a feature map whose gradient will lie in memory as that of stock modules, if the map does."""
    wanted = x.requires_grad and not given.channels_last and not is_channels_last(x)
    return _ContiguousGradient.apply(x) if wanted else x


class _ContiguousGradient(Function):
    """Nothing, whose gradient lies in memory as that of an input of stock modules does."""

    @override
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        """Returns the input."""
        return x.view_as(x)

    @override
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Saves nothing."""

    @override
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Returns the gradient, laid out anew."""
        return grad.contiguous()


def _are_one(convolution: nn.Module, norm: nn.Module) -> bool:
    """Tells whether nothing can see, or change, what a convolution hands to the norm behind it."""
    return (
        FOLDED in convolution.__dict__
        and isinstance(convolution, Overlay)
        and isinstance(norm, FrozenStatistics)
        and norm.running_var is not None
        and convolution.weight
        is convolution._parameters.get("weight")  # not one that is computed anew each time
        and convolution.bias is convolution._parameters.get("bias")
        and all(part is None or _is_constant(part) for part in _parts(convolution, norm))
        and not (has_hooks(convolution) or has_hooks(norm))
        and not (_runs_otherwise(convolution) or _runs_otherwise(norm))
    )


def _is_constant(part: Tensor) -> bool:
    """Tells whether a tensor is frozen, and shows when it is written to all the same."""
    return type(part) in STOCK_TENSORS and not part.requires_grad and not part.is_inference()


def has_hooks(module: nn.Module, but: Any = None) -> bool:
    """Tells whether something sees what a module is given or returns, besides one hook."""
    return bool(
        any(
            hook is not but
            for hooks in _HOOKS
            for hook in (module.__dict__.get(hooks) or {}).values()
        )
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def _runs_otherwise(module: nn.Module) -> bool:
    """Tells whether something else runs in place of a module's forward."""
    forward = module.__dict__.get("forward")
    return running_at(module) is not module or (
        forward is not None and not (isinstance(forward, Intercept) and forward.only_passes_on)
    )


def _parts(convolution: nn.Module, norm: nn.Module) -> list[Any]:
    """Returns the tensors that a convolution and a norm compute with, None where they have none."""
    return [convolution.weight, convolution.bias, *(getattr(norm, name) for name in _NORM)]


@torch.inference_mode(False)  # it may be for training later
@torch.no_grad()
def _fold(convolution: Any, norm: Any, channels_last: bool) -> tuple[Tensor, Tensor]:
    """Returns the weight and bias of a convolution that a norm follows, computed in float64 and rounded once."""
    weight: Any = convolution.weight
    bias: Any = 0.0 if convolution.bias is None else convolution.bias.double()
    scale: Any = 1.0 if norm.weight is None else norm.weight.double()
    shift: Any = 0.0 if norm.bias is None else norm.bias.double()
    factor = scale * (norm.running_var.double() + norm.eps).rsqrt()
    moved = (bias - norm.running_mean.double()) * factor + shift
    folded = (weight.double() * factor.reshape(-1, *[1] * (weight.ndim - 1))).to(weight.dtype)
    if weight.ndim == 4 and (
        (channels_last and weight.device.type in ("cpu", "meta")) or is_channels_last(weight)
    ):
        folded = folded.contiguous(
            memory_format=torch.channels_last
        )  # oneDNN is faster so, and hands it on from layer to layer
    return folded, moved.to(weight.dtype)
