"""Digests of tensors: what a backbone was, tensor by tensor, and where it is no longer that."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TensorRecord", "differences", "digest", "dtype_name", "explained", "fingerprint", "raw_bytes"]


@dataclass(frozen=True)
class TensorRecord:
    """What is known of a tensor without having it.

    Args:
        dtype: Name of the dtype, such as ``"float32"``.
        shape: Sizes.
        sha256: Digest of the elements in logical (row-major) order, so that the memory format does not matter.
    """

    dtype: str
    shape: tuple[int, ...]
    sha256: str


def dtype_name(tensor: Tensor) -> str:
    """Returns a tensor's dtype as text, such as ``"float32"``."""
    return str(tensor.dtype).removeprefix("torch.")


def raw_bytes(tensor: Tensor) -> memoryview:
    """Returns the elements of a tensor, in row-major order, as bytes."""
    if hasattr(tensor, "full_tensor"):  # a sharded DTensor: every rank sees the whole
        tensor = tensor.full_tensor()
    flat = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def digest(tensor: Tensor) -> TensorRecord:
    """Returns the record of a tensor."""
    return TensorRecord(dtype_name(tensor), tuple(tensor.shape), hashlib.sha256(raw_bytes(tensor)).hexdigest())


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, TensorRecord]:
    """Returns the record of every named tensor."""
    return {name: digest(tensor) for name, tensor in tensors}


def differences(
    tensors: Mapping[str, Tensor], records: Mapping[str, TensorRecord], may_be_new: Collection[str] = ()
) -> dict[str, str]:
    """Compares tensors with their records.

    A tensor that was only converted to a wider dtype still holds the recorded numbers and counts as the same.

    Args:
        tensors: The tensors of today, by name.
        records: The records to hold them against.
        may_be_new: Names that need no record.

    Returns:
        A reason for each name that differs; empty when all are the same.
    """
    found: dict[str, str] = {}
    for name in [*records, *(name for name in tensors if name not in records and name not in may_be_new)]:
        tensor, record = tensors.get(name), records.get(name)
        if record is None:
            found[name] = "is new"
        elif tensor is None:
            found[name] = "is missing"
        elif tuple(tensor.shape) != record.shape:
            found[name] = f"has shape {list(tensor.shape)} where {list(record.shape)} was recorded"
        elif digest(_narrowed(tensor, record.dtype)) != record:
            same_dtype = dtype_name(tensor) == record.dtype
            found[name] = "has other values" if same_dtype else f"is {dtype_name(tensor)} where {record.dtype} was recorded"
    return found


def explained(reasons: Mapping[str, str], most: int = 8) -> str:
    """Joins differences for a message, the first few of them if they are many."""
    shown = "; ".join(f"{name!r} {reason}" for name, reason in list(reasons.items())[:most])
    return shown if len(reasons) <= most else f"{shown}; and {len(reasons) - most} more"


def _narrowed(tensor: Tensor, dtype: str) -> Tensor:
    """Converts back to the recorded dtype if that loses nothing."""
    if dtype_name(tensor) != dtype and isinstance(target := getattr(torch, dtype, None), torch.dtype):
        try:
            back = tensor.to(target)
            if raw_bytes(back.to(tensor.dtype)) == raw_bytes(tensor):
                return back
        except RuntimeError:  # a dtype that nothing is converted to
            return tensor
    return tensor
