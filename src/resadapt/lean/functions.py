"""Autograd functions of frozen layers, which save only what the input's gradient needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Function, forward_ad
from typing_extensions import override

from resadapt.base.tensors import is_channels_last, memory_format
from resadapt.lean.bits import packed, packed_in_graph, unpacked, unpacked_in_graph
from resadapt.lean.constants import STOCK_TENSORS
from resadapt.lean.stand_in import MetaStandIn

__all__ = [
    "CompiledReLU",
    "FrozenConvolution",
    "FrozenNorm",
    "PackedReLU",
    "SmallIndexPool",
    "can_be_lean",
    "is_compiled",
    "is_ordinary",
]

Pair = tuple[int, int]

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def can_be_lean(x: Tensor, *constants: Tensor | None) -> bool:
    """Tells whether a layer in training has frozen tensors and an input that needs a gradient."""
    return (
        (is_ordinary(x) or is_compiled(x))
        and x.requires_grad
        and torch.is_grad_enabled()
        and all(
            part is None or (type(part) in STOCK_TENSORS and not part.requires_grad)
            for part in constants
        )
    )


def is_ordinary(x: object) -> bool:
    """Tells whether a layer is called eagerly with a stock tensor or a stand-in.

    Compilers, tracers and torch.func handle the stock layers themselves.
    """
    return (
        type(x) in (Tensor, FakeTensor, MetaStandIn)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def is_compiled(x: object) -> bool:
    """Tells whether torch.compile traces the layer, and not torch.export."""
    return (
        hasattr(torch.compiler, "is_exporting")  # from torch 2.7
        and torch.compiler.is_dynamo_compiling()
        and not torch.compiler.is_exporting()
        and not torch._C._are_functorch_transforms_active()
        and type(x) is Tensor
    )


class FrozenConvolution(Function):
    """A convolution with a frozen weight: saves a reference to the weight, not the input."""

    @override
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> Tensor:
        """Computes the stock convolution, with the same kernels, and saves the weight."""
        ctx.geometry = stride, padding, dilation, groups
        ctx.shape, ctx.format = x.shape, memory_format(x)
        ctx.save_for_backward(weight)
        return _CONVOLUTIONS[x.ndim - 2](x, weight, bias, *ctx.geometry)

    @override
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradient of the input."""
        (weight,) = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        result = torch.ops.aten.convolution_backward.default(
            grad,
            _empty(ctx.shape, grad, ctx.format),
            weight.to(grad.dtype),
            None,
            stride,
            padding,
            dilation,
            False,
            [0] * len(stride),
            groups,
            (True, False, False),
        )
        return result[0], *[None] * 6


class FrozenNorm(Function):
    """A BatchNorm with frozen statistics, weight and bias: saves references to these only."""

    @override
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        """Computes the stock norm, with the same kernel, and saves statistics and weight."""
        ctx.eps, ctx.format = eps, memory_format(x)
        ctx.save_for_backward(mean, var, weight)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @override
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradient of the input."""
        mean, var, weight = ctx.saved_tensors
        grad = _to_format(grad, ctx.format)
        # The second argument is the input, which the gradient of the input does not depend on.
        result = torch.ops.aten.native_batch_norm_backward.default(
            grad, grad, weight, mean, var, None, None, False, ctx.eps, (True, False, False)
        )
        return result[0], *[None] * 5


class PackedReLU(Function):
    """A ReLU that saves one bit per element: whether the gradient passes."""

    @override
    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        """Computes the ReLU, and saves the bits; with two dimensions, in channels_last order.

        The bits tell the order, and no attribute of `ctx`: checkpointing takes the bits from a
        second run, whose output may have another memory format.
        """
        output = x.relu_() if inplace else x.relu()
        if inplace:
            ctx.mark_dirty(x)
        ctx.shape, last = output.shape, is_channels_last(output)
        bits = packed(output.movedim(1, -1) if last else output)
        ctx.save_for_backward(bits[None] if last else bits)
        return output

    @override
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradient where the output is positive or NaN, as PyTorch does."""
        (bits,) = ctx.saved_tensors
        shape, last = ctx.shape, bits.ndim == 2
        integers = _INTEGERS[grad.dtype.itemsize]
        flat = unpacked(bits, shape.numel()).to(integers)
        passes = (
            flat.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
            if last
            else flat.reshape(shape)
        )
        if grad.requires_grad or _is_batched(grad):
            # The stock ReLU calls this too; several times faster than torch.where.
            return torch.ops.aten.threshold_backward(grad, passes.to(grad.dtype), 0), None
        # The same bits, several times faster again, but without a gradient of its own.
        return passes.mul_(grad.view(integers)).view(grad.dtype), None


class CompiledReLU(Function):
    """`PackedReLU` for torch.compile, which cannot pack bits itself."""

    @override
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Computes the ReLU; saves bits in row-major order, since compilers choose formats."""
        out = x.relu()
        ctx.save_for_backward(packed_in_graph(out))
        return out

    @override
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Returns the gradient where the output is positive."""
        (bits,) = ctx.saved_tensors
        result: Tensor = torch.ops.aten.threshold_backward(grad, unpacked_in_graph(bits, grad), 0)
        return result


class SmallIndexPool(Function):
    """A 2-D max pooling that saves one byte per output: the maximum's index in its window."""

    @override
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kernel: Pair,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        ceil_mode: bool,
    ) -> Tensor:
        """Computes the stock pooling, with the same kernel, and saves indices in the windows."""
        out: Tensor
        out, indices = torch.ops.aten.max_pool2d_with_indices.default(
            x, kernel, stride, padding, dilation, ceil_mode
        )
        top, left = _corners(out, stride, padding)
        width = x.shape[-1]
        rows = indices.div(width, rounding_mode="floor").sub_(top)
        columns = indices.remainder(width).sub_(left)
        rows.div_(dilation[0], rounding_mode="floor").mul_(kernel[1])
        places = rows.add_(columns.div_(dilation[1], rounding_mode="floor"))
        ctx.geometry = kernel, stride, padding, dilation, ceil_mode
        ctx.shape, ctx.format = x.shape, memory_format(x)
        ctx.save_for_backward(places.to(torch.uint8))
        return out

    @override
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the input's gradient: each output's gradient at its maximum."""
        (places,) = ctx.saved_tensors
        kernel, stride, padding, dilation, ceil_mode = ctx.geometry
        top, left = _corners(grad, stride, padding)
        where = places.long()
        rows = where.div(kernel[1], rounding_mode="floor").mul_(dilation[0]).add_(top)
        columns = where.remainder_(kernel[1]).mul_(dilation[1]).add_(left)
        result = torch.ops.aten.max_pool2d_with_indices_backward.default(
            grad,
            _empty(ctx.shape, grad, ctx.format),
            kernel,
            stride,
            padding,
            dilation,
            ceil_mode,
            rows.mul_(ctx.shape[-1]).add_(columns),
        )
        return result, *[None] * 5


def _empty(shape: torch.Size, grad: Tensor, memory_format: torch.memory_format) -> Tensor:
    """Returns a stand-in for an input of which a kernel uses the form only, not the memory."""
    return torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format)


def _to_format(grad: Tensor, memory_format: torch.memory_format) -> Tensor:
    """Returns a gradient in a memory format.

    Unchanged under compilers, which choose formats themselves, and under vmap, which hides formats.
    """
    if torch.compiler.is_compiling():
        return grad
    return grad if _is_batched(grad) else grad.contiguous(memory_format=memory_format)


def _is_batched(grad: Tensor) -> bool:
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(grad) or functorch.is_legacy_batchedtensor(grad)


def _corners(out: Tensor, stride: Pair, padding: Pair) -> tuple[Tensor, Tensor]:
    """Returns the top rows [H, 1] and left columns [W] of a pooling's windows."""
    height, width = out.shape[-2:]
    top = torch.arange(height, device=out.device) * stride[0] - padding[0]
    left = torch.arange(width, device=out.device) * stride[1] - padding[1]
    return top[:, None], left
