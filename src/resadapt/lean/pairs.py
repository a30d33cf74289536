"""Folding a frozen norm into the frozen convolution before it."""

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
    """Size and memory format of the input of the outermost module that folds norms.

    Args:
        size: Pixels of the smaller side; 0 if the input is not a batch of images.
        channels_last: Whether stock modules would return feature maps in channels_last.
    """

    size: int
    channels_last: bool


class FoldedPair:
    """Cache of the weight and bias of a convolution with the norm after it folded in.

    Copies and pickles of a module have an empty cache.

    Args:
        use_channels_last: Whether the folded weight, and so the output, is in channels_last for
            large images even if the convolution's weight is not.
    """

    def __init__(self, use_channels_last: bool = False) -> None:
        self._use_channels_last = use_channels_last
        # Stamps of the sources, the sources, the folded tensors: one tuple, replaced atomically.
        self._cached: tuple[Any, Any, tuple[Tensor, ...]] = (None, None, ())

    def __deepcopy__(self, memo: Any) -> FoldedPair:
        """Returns an empty cache."""
        return FoldedPair(self._use_channels_last)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles an empty cache."""
        return FoldedPair, (self._use_channels_last,)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Folded weight and bias, once computed."""
        return self._cached[2]

    def of(self, convolution: nn.Module, norm: nn.Module, given: InputLayout) -> tuple[Tensor, ...]:
        """Returns folded weight and bias; recomputed if a source tensor was changed or moved."""
        channels_last = self._use_channels_last and given.size >= _MIN_CHANNELS_LAST
        parts = [part for part in _parts(convolution, norm) if part is not None]
        stamps = [channels_last, norm.eps, *map(stamp, parts)]
        cached_stamps, _, tensors = self._cached
        if cached_stamps != stamps:
            tensors = _fold(convolution, norm, channels_last)
            # Keep the sources' memory alive: a new tensor at the same address would have the
            # same stamp.
            self._cached = stamps, [part.detach() for part in parts], tensors
        return tensors


_MIN_CHANNELS_LAST = 96
"""Image size in pixels from which channels_last is faster."""


def in_one_step(convolution: nn.Module, norm: nn.Module, x: Any, given: InputLayout) -> Any:
    """Returns the output of a convolution and norm, folded; None if they cannot be folded.

    They can be folded if both are frozen and nothing can see the tensor between them.

    Args:
        convolution: The convolution.
        norm: The norm after the convolution.
        x: The input of the convolution.
        given: Layout of the input of the outermost module that folds norms.
    """
    if not is_ordinary(x) or not _can_fold(convolution, norm) or is_undisturbed():
        return None
    weight, bias = convolution.__dict__[FOLDED].of(convolution, norm, given)
    if is_channels_last(weight):
        x = with_gradient_as_given(x, given)
    return convolution._conv_forward(x, weight, bias)  # type: ignore[operator]


def with_gradient_as_given(x: Tensor, given: InputLayout) -> Tensor:
    """Returns a feature map whose gradient will have the memory format of stock modules."""
    wanted = x.requires_grad and not given.channels_last and not is_channels_last(x)
    return _ContiguousGradient.apply(x) if wanted else x


class _ContiguousGradient(Function):
    """The identity, with a contiguous gradient, as stock modules give."""

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
        """Returns the gradient, contiguous."""
        return grad.contiguous()


def _can_fold(convolution: nn.Module, norm: nn.Module) -> bool:
    """Tells whether a pair is frozen and nothing sees or changes the tensor between them."""
    return (
        FOLDED in convolution.__dict__
        and isinstance(convolution, Overlay)
        and isinstance(norm, FrozenStatistics)
        and norm.running_var is not None
        # A computed weight (weight_norm) is no parameter.
        and convolution.weight is convolution._parameters.get("weight")
        and convolution.bias is convolution._parameters.get("bias")
        and all(part is None or _is_constant(part) for part in _parts(convolution, norm))
        and not (has_hooks(convolution) or has_hooks(norm))
        and not (_has_replaced_forward(convolution) or _has_replaced_forward(norm))
    )


def _is_constant(part: Tensor) -> bool:
    """Tells whether a tensor is frozen and counts in-place writes in its version counter."""
    return type(part) in STOCK_TENSORS and not part.requires_grad and not part.is_inference()


def has_hooks(module: nn.Module, but: Any = None) -> bool:
    """Tells whether a module has hooks besides one, or global hooks are registered."""
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


def _has_replaced_forward(module: nn.Module) -> bool:
    """Tells whether another function or module runs in place of a module's forward."""
    forward = module.__dict__.get("forward")
    return running_at(module) is not module or (
        forward is not None and not (isinstance(forward, Intercept) and forward.can_be_skipped)
    )


def _parts(convolution: nn.Module, norm: nn.Module) -> list[Any]:
    """Returns the tensors of a convolution and a norm, None for missing ones."""
    return [convolution.weight, convolution.bias, *(getattr(norm, name) for name in _NORM)]


@torch.inference_mode(False)  # the cache may be used in training later
@torch.no_grad()
def _fold(convolution: Any, norm: Any, channels_last: bool) -> tuple[Tensor, Tensor]:
    """Returns the folded weight and bias, computed in float64 and rounded once."""
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
        # Faster in oneDNN, which keeps the format from layer to layer.
        folded = folded.contiguous(memory_format=torch.channels_last)
    return folded, moved.to(weight.dtype)
