"""Tensors of every kind as plain ones, as bytes, and in words."""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

__all__ = [
    "CHANNELS_LAST",
    "address",
    "dense_parts",
    "dtype_name",
    "dtype_named",
    "full_tensor",
    "is_channels_last",
    "is_dense",
    "is_sharded",
    "local_shard",
    "memory_format",
    "raw_bytes",
    "row_digests",
    "same_bits",
    "sha256",
    "sha256_of_each",
    "stamp",
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
    return tensor.layout is torch.strided and not (
        tensor.is_quantized or tensor.is_nested or made_of_others
    )


def full_tensor(tensor: Tensor) -> Tensor:
    """Returns a sharded tensor gathered from all processes, any other as it is."""
    gathered: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return gathered


def local_shard(tensor: Tensor) -> Tensor:
    """Returns what this process has of a sharded tensor, any other as it is."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return part


def address(tensor: Tensor) -> int:
    """Returns what tells where a tensor's elements begin: the same for two that share them."""
    try:
        return tensor.data_ptr() or id(tensor)
    except (NotImplementedError, RuntimeError):  # one that is made of others
        return id(tensor)


def stamp(tensor: Tensor) -> tuple[object, ...]:
    """Returns what changes when a tensor is another one, moved, cast, or written by other means than its `data`."""
    # Whether an inference tensor was written to, nothing tells.
    return (
        id(tensor),
        address(tensor),
        object() if tensor.is_inference() else tensor._version,
        tensor.dtype,
    )


CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""The memory format with channels side by side, by the number of dimensions."""


def is_channels_last(tensor: Tensor) -> bool:
    """Tells whether a feature map has its channels side by side in memory, and not in the usual way too."""
    last = CHANNELS_LAST.get(tensor.ndim)
    return (
        last is not None and tensor.is_contiguous(memory_format=last) and not tensor.is_contiguous()
    )


def memory_format(tensor: Tensor) -> torch.memory_format:
    """Returns the memory format that a feature map has, of those there are."""
    return CHANNELS_LAST[tensor.ndim] if is_channels_last(tensor) else torch.contiguous_format


def raw_bytes(tensor: Tensor) -> bytes | memoryview:
    """Returns the elements of a tensor, in row-major order, as bytes.

    Of one that is not plain, the elements of its parts.
    """
    parts = [_dense_bytes(part) for part in dense_parts(tensor)]
    return parts[0] if len(parts) == 1 else b"".join(parts)


def sha256(tensor: Tensor) -> str:
    """Returns the digest of a tensor's elements in row-major order, so that the memory format does not matter."""
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()


def sha256_of_each(tensors: Iterable[Tensor]) -> list[str]:
    """Returns the digests of several tensors, large ones' from threads.

    Processes that share a sharded one must call together.
    """
    tensors = list(tensors)
    if any(
        map(is_sharded, tensors)
    ):  # gathered one after another, in the same order by all processes
        return [sha256(tensor) for tensor in tensors]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        jobs = [
            pool.submit(sha256, tensor) if tensor.numel() > _LARGE else None for tensor in tensors
        ]
        return [
            sha256(tensor) if job is None else job.result()
            for tensor, job in zip(tensors, jobs, strict=True)
        ]


_LARGE = 1 << 16
"""Elements from which on another thread pays."""


def row_digests(tensors: Iterable[Tensor], rows: int) -> Tensor:
    """Returns the SHA-256 digest of each row of some tensors together, uint8 [rows, 32]."""
    columns = [memoryview(raw_bytes(tensor)) for tensor in tensors if tensor.numel()]
    digests = bytearray()
    for row in range(rows):
        digest = hashlib.sha256()
        for column in columns:
            size = len(column) // rows
            digest.update(column[row * size : (row + 1) * size])
        digests += digest.digest()
    return torch.frombuffer(digests, dtype=torch.uint8).reshape(rows, -1)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Tells whether two tensors have the same dtype, shape and elements, bit for bit."""
    return (one.dtype, one.shape) == (other.dtype, other.shape) and raw_bytes(one) == raw_bytes(
        other
    )


def _dense_bytes(tensor: Tensor) -> memoryview:
    # Not through NumPy, which would keep the storage from ever being resized.
    own = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    bytes_there = (ctypes.c_ubyte * (own.numel() * own.element_size())).from_address(own.data_ptr())
    bytes_there.tensor = own  # type: ignore[attr-defined] # the memory is there as long as the view of it
    return memoryview(bytes_there).cast("B")


def dense_parts(tensor: Tensor) -> Iterator[Tensor]:
    """Walks the dense tensors of which a tensor is made.

    Itself, or those inside a sparse, nested, quantized or wrapper tensor.
    """
    tensor = full_tensor(tensor)
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
    elif hasattr(
        tensor, "__tensor_flatten__"
    ):  # a wrapper of other tensors, such as a quantized weight of torchao
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from dense_parts(getattr(tensor, name))
    else:
        yield tensor
