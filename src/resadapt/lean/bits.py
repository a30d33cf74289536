"""Packing tensors to one bit per element: whether the element is nonzero."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["packed", "packed_in_graph", "unpacked", "unpacked_in_graph"]


def packed(x: Tensor) -> Tensor:
    """Packs whether each element is nonzero into bits: uint8 of an eighth of the size, rounded up.

    Bit k of all bytes together is the k-th eighth of the elements.

    Example:
        >>> packed(torch.tensor([1.0, 0.0, 0.0, 2.0, float("nan")])).tolist()
        [25]
    """
    flat = x.reshape(-1)
    if len(flat) % 8:
        flat = F.pad(flat, (0, -len(flat) % 8))
    eighths = flat.view(8, -1).bool().view(torch.uint8)  # several times faster than torch.ne
    return eighths.bitwise_left_shift_(_places(x.device)).sum(0, dtype=torch.uint8)


def unpacked(bits: Tensor, count: int) -> Tensor:
    """Returns a 1-D tensor of uint8: 1 where a bit is set and 0 elsewhere.

    Example:
        >>> unpacked(torch.tensor([25], dtype=torch.uint8), 5).tolist()
        [1, 0, 0, 1, 1]
    """
    return (bits >> _places(bits.device)).bitwise_and_(1).view(-1)[:count]


def _places(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)[:, None]


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
    return unpacked(bits, like.numel()).to(like.dtype).reshape(like.shape)


@unpacked_in_graph.register_fake
def _(bits: Tensor, like: Tensor) -> Tensor:
    return like.new_empty(like.shape)
