"""Packing tensors to one bit per element: whether the element is nonzero."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["packed", "packed_in_graph", "unpacked", "unpacked_in_graph"]

_PACK, _SPREAD, _BIT_OF_BYTE = (
    0x0102040810204080,
    0x0101010101010101,
    0x8040201008040201 - (1 << 64),
)


def packed(x: Tensor) -> Tensor:
    """Packs whether each element is nonzero into bits: uint8 of an eighth of the size, rounded up.

    Example:
        >>> packed(torch.tensor([1.0, 0.0, 0.0, 2.0, float("nan")])).tolist()
        [25]
    """
    words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64, device=x.device)
    words[-1:] = 0
    words.view(torch.bool)[: x.numel()].copy_(x.reshape(-1))  # several times faster than torch.ne
    # Multiplying eight bytes of 0 or 1 by _PACK collects their bits in the product's last byte.
    return words.mul_(_PACK).view(torch.uint8)[7::8].contiguous()


def unpacked(bits: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Returns a 1-D tensor, positive where a bit is set and zero elsewhere.

    Example:
        >>> unpacked(torch.tensor([25], dtype=torch.uint8), 5, torch.float32).sign().tolist()
        [1.0, 0.0, 0.0, 1.0, 1.0]
    """
    words = torch.empty(len(bits), dtype=torch.int64, device=bits.device).copy_(bits)
    return words.mul_(_SPREAD).bitwise_and_(_BIT_OF_BYTE).view(torch.uint8)[:count].to(dtype)


@torch.library.custom_op("resadapt::packed", mutates_args=(), schema="(Tensor x) -> Tensor")
def packed_in_graph(x: Tensor) -> Tensor:
    """The same as `packed`, as an operator that is opaque to compilers."""
    return packed(x)


@packed_in_graph.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)


@torch.library.custom_op(
    "resadapt::unpacked", mutates_args=(), schema="(Tensor bits, Tensor like) -> Tensor"
)
def unpacked_in_graph(bits: Tensor, like: Tensor) -> Tensor:
    """The same as `unpacked` in the shape and dtype of a tensor, opaque to compilers."""
    return unpacked(bits, like.numel(), like.dtype).reshape(like.shape)


@unpacked_in_graph.register_fake
def _(bits: Tensor, like: Tensor) -> Tensor:
    return like.new_empty(like.shape)
