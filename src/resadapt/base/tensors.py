"""Tensors of every kind: dense parts, memory formats, bytes and digests."""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

__all__ = [
    "CHANNELS_LAST",
    "address",
    "all_modules",
    "all_tensors",
    "dense_parts",
    "dtype_name",
    "dtype_named",
    "full_tensor",
    "is_channels_last",
    "is_dense",
    "is_sharded",
    "kind_name",
    "local_shard",
    "memory_format",
    "raw_bytes",
    "row_digests",
    "same_bits",
    "sha256",
    "sha256_of_each",
    "stamp",
]


def all_modules(model: nn.Module) -> list[nn.Module]:
    """Returns what `nn.Module.modules` yields, faster: a model may have thousands for its sets."""
    found: dict[int, nn.Module] = {}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if id(module) not in found:
            found[id(module)] = module
            children = [child for child in module._modules.values() if child is not None]
            waiting += reversed(children)
    return list(found.values())


def all_tensors(model: nn.Module) -> list[Tensor]:
    """Returns a model's parameters and buffers; a tensor that modules share several times."""
    return [
        tensor
        for module in all_modules(model)
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    ]


def dtype_name(of: Tensor | torch.dtype) -> str:
    """Returns a dtype, or a tensor's dtype, as text, such as ``"float32"``."""
    return str(of.dtype if isinstance(of, Tensor) else of).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype | None:
    """Returns the dtype with a name, None if there is none."""
    dtype = getattr(torch, name, None)
    return dtype if isinstance(dtype, torch.dtype) else None


def is_sharded(tensor: Tensor) -> bool:
    """Returns whether a tensor is a DTensor, of which this process may hold only a shard."""
    return hasattr(tensor, "full_tensor") and hasattr(tensor, "placements")


def is_dense(tensor: Tensor) -> bool:
    """Returns whether a tensor is strided, and not quantized, nested or a wrapper subclass."""
    wrapper = hasattr(tensor, "__tensor_flatten__")
    return tensor.layout is torch.strided and not (
        tensor.is_quantized or tensor.is_nested or wrapper
    )


def kind_name(tensor: Tensor) -> str:
    """Returns a tensor's class, dtype and layout, such as ``"Tensor (float32, strided)"``."""
    layout = str(tensor.layout).removeprefix("torch.")
    return f"{type(tensor).__name__} ({dtype_name(tensor)}, {layout})"


def full_tensor(tensor: Tensor) -> Tensor:
    """Gathers a sharded tensor from all processes; returns other tensors unchanged."""
    if is_sharded(tensor):
        tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return tensor


def local_shard(tensor: Tensor) -> Tensor:
    """Returns this process's shard of a sharded tensor; returns other tensors unchanged."""
    if is_sharded(tensor):
        tensor = tensor.to_local()  # type: ignore[attr-defined]
    return tensor


def address(tensor: Tensor) -> int:
    """Returns a number that is equal for tensors that share memory from the first element on."""
    if isinstance(tensor, FakeTensor):  # its pointer is deprecated
        return id(tensor)
    try:
        return tensor.data_ptr() or id(tensor)
    except (NotImplementedError, RuntimeError):  # a wrapper subclass, without memory
        return id(tensor)


def stamp(tensor: Tensor) -> tuple[object, ...]:
    """Returns a value that changes when a tensor is replaced, moved, cast or written in place.

    Writes through ``tensor.data`` are not detected. Inference tensors have no version counter, so
    each stamp of such a tensor differs from the previous stamp.
    """
    return (
        id(tensor),
        address(tensor),
        object() if tensor.is_inference() else tensor._version,
        tensor.dtype,
    )


CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""The channels_last memory format by number of dimensions."""


def is_channels_last(tensor: Tensor) -> bool:
    """Returns whether a feature map is in channels_last, and not contiguous as well."""
    last = CHANNELS_LAST.get(tensor.ndim)
    return (
        last is not None and tensor.is_contiguous(memory_format=last) and not tensor.is_contiguous()
    )


def memory_format(tensor: Tensor) -> torch.memory_format:
    """Returns channels_last (2-D or 3-D) if a feature map is in it, else contiguous."""
    return CHANNELS_LAST[tensor.ndim] if is_channels_last(tensor) else torch.contiguous_format


def raw_bytes(tensor: Tensor) -> bytes | memoryview:
    """Returns the elements of a tensor as bytes in row-major order.

    For a tensor that is not dense, these are the bytes of its dense parts.
    """
    parts = [_dense_bytes(part) for part in dense_parts(tensor)]
    return parts[0] if len(parts) == 1 else b"".join(parts)


def sha256(tensor: Tensor) -> str:
    """Returns the digest of a tensor's elements in row-major order, whatever the memory format."""
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()


def sha256_of_each(tensors: Iterable[Tensor]) -> list[str]:
    """Returns the digests of several tensors; large tensors are hashed in threads.

    For sharded tensors, all processes of the group must call this function together.
    """
    tensors = list(tensors)
    if any(map(is_sharded, tensors)):  # all processes must gather in the same order
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
"""Number of elements above which a thread saves time."""


def row_digests(tensors: Iterable[Tensor], rows: int) -> Tensor:
    """Returns one SHA-256 digest per row over all tensors, as uint8 ``[rows, 32]``."""
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
    """Returns whether two tensors have the same dtype, shape and elements, bit for bit."""
    return (one.dtype, one.shape) == (other.dtype, other.shape) and raw_bytes(one) == raw_bytes(
        other
    )


def _dense_bytes(tensor: Tensor) -> memoryview:
    # Not through NumPy, after which the storage could never be resized again.
    dense = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    size = dense.numel() * dense.element_size()
    view = (ctypes.c_ubyte * size).from_address(dense.data_ptr())
    view.tensor = dense  # type: ignore[attr-defined] # keeps the memory alive
    return memoryview(view).cast("B")


def dense_parts(tensor: Tensor) -> Iterator[Tensor]:
    """Iterates over the dense tensors inside a sparse, nested, quantized or wrapper tensor.

    The only part of a dense tensor is the tensor itself.
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
    elif hasattr(tensor, "__tensor_flatten__"):  # a wrapper, such as a quantized torchao weight
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from dense_parts(getattr(tensor, name))
    else:
        yield tensor
