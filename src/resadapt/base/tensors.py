"""Tensors of every kind as plain ones, as bytes, and in words."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = [
    "address",
    "dtype_name",
    "dtype_named",
    "is_dense",
    "is_sharded",
    "plain_parts",
    "raw_bytes",
    "same_bits",
    "sha256",
    "whole",
]


def dtype_name(tensor: Tensor) -> str:
    """Returns a tensor's dtype as text, such as ``"float32"``."""
    return str(tensor.dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype | None:
    """Returns the dtype of a name, None if there is none."""
    dtype = getattr(torch, name, None)
    return dtype if isinstance(dtype, torch.dtype) else None


def is_sharded(tensor: Tensor) -> bool:
    """Tells whether a tensor is a DTensor, of which this process may have a part only."""
    return hasattr(tensor, "full_tensor") and hasattr(tensor, "placements")


def is_dense(tensor: Tensor) -> bool:
    """Tells whether a tensor has its elements in memory of its own, and is neither quantized nor made of other tensors."""
    made_of_others = hasattr(tensor, "__tensor_flatten__")
    return tensor.layout is torch.strided and not (tensor.is_quantized or tensor.is_nested or made_of_others)


def whole(tensor: Tensor) -> Tensor:
    """Returns a sharded tensor gathered from all processes, any other as it is."""
    gathered: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return gathered


def address(tensor: Tensor) -> int:
    """Returns what tells where a tensor's elements begin: the same for two that share them."""
    try:
        return tensor.data_ptr() or id(tensor)
    except (NotImplementedError, RuntimeError):  # one that is made of others
        return id(tensor)


def raw_bytes(tensor: Tensor) -> bytes | memoryview:
    """Returns the elements of a tensor, in row-major order, as bytes; of one that is not plain, the elements of its parts."""
    parts = [_plain_bytes(part) for part in plain_parts(tensor)]
    return parts[0] if len(parts) == 1 else b"".join(parts)


def sha256(tensor: Tensor) -> str:
    """Returns the digest of a tensor's elements in row-major order, so that the memory format does not matter."""
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Tells whether two tensors have the same dtype, shape and elements, bit for bit."""
    return (one.dtype, one.shape) == (other.dtype, other.shape) and raw_bytes(one) == raw_bytes(other)


def _plain_bytes(tensor: Tensor) -> memoryview:
    # A clone: looking at a tensor through NumPy would keep its storage from ever being resized.
    own = tensor.detach().resolve_conj().resolve_neg().cpu().clone(memory_format=torch.contiguous_format)
    return own.reshape(-1).view(torch.uint8).numpy().data


def plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """Walks the dense tensors of which a tensor is made: itself, or those inside a sparse, nested, quantized or wrapper tensor."""
    tensor = whole(tensor)
    if tensor.is_nested:
        yield from tensor.unbind()
    elif tensor.layout is torch.sparse_coo:
        coalesced = tensor.coalesce()
        yield from (coalesced.indices(), coalesced.values())
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    elif tensor.is_quantized:
        yield tensor.int_repr()
        if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            yield torch.tensor([tensor.q_scale(), tensor.q_zero_point()], dtype=torch.float64)
        else:
            yield from (tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points())
    elif hasattr(tensor, "__tensor_flatten__"):  # a wrapper of other tensors, such as a quantized weight of torchao
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from plain_parts(getattr(tensor, name))
    else:
        yield tensor
