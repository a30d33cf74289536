"""Eight elements in a byte: whether each of them is other than zero."""

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
    """Returns a bit for each element, whether it is other than zero: uint8, an eighth as many,
    rounded up.

    Example:
        >>> packed(torch.tensor([1.0, 0.0, 0.0, 2.0, float("nan")])).tolist()
        [25]
    """
    words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64, device=x.device)
    words[-1:] = 0
    torch.ne(x.reshape(-1), 0, out=words.view(torch.bool)[: x.numel()])
    # Eight bytes of 0 or 1 times this number: their bits, next to each other, are the product's
    # last byte.
    return words.mul_(_PACK).view(torch.uint8)[7::8].contiguous()


def unpacked(bits: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Returns numbers greater than zero where there was a bit, else zeros: flat.

    Example:
        >>> unpacked(torch.tensor([25], dtype=torch.uint8), 5, torch.float32).sign().tolist()
        [1.0, 0.0, 0.0, 1.0, 1.0]
    """
    words = torch.empty(len(bits), dtype=torch.int64, device=bits.device).copy_(bits)
    return words.mul_(_SPREAD).bitwise_and_(_BIT_OF_BYTE).view(torch.uint8)[:count].to(dtype)


@torch.library.custom_op("resadapt::packed", mutates_args=(), schema="(Tensor x) -> Tensor")
def packed_in_graph(x: Tensor) -> Tensor:
    """Returns what `packed` does, as an operator that compilers leave as it is."""
    return packed(x)


@packed_in_graph.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)


@torch.library.custom_op(
    "resadapt::unpacked", mutates_args=(), schema="(Tensor bits, Tensor like) -> Tensor"
)
def unpacked_in_graph(bits: Tensor, like: Tensor) -> Tensor:
    """Returns what `unpacked` does, of a tensor's shape and dtype, as an operator that compilers leave as it is."""
    return unpacked(bits, like.numel(), like.dtype).reshape(like.shape)


@unpacked_in_graph.register_fake
def _(bits: Tensor, like: Tensor) -> Tensor:
    return like.new_empty(like.shape)
