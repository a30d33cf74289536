"""Meta tensors that stand for cached tensors and report when their values are needed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from resadapt.base.inputs import named_in
from resadapt.base.tensors import CHANNELS_LAST, is_channels_last

__all__ = ["Form", "MetaStandIn", "NeededError"]

_VALUE_FREE = {
    *(
        Tensor.size,
        Tensor.dim,
        Tensor.ndimension,
        Tensor.numel,
        Tensor.__len__,
        Tensor.is_floating_point,
        Tensor.is_complex,
    ),
    *(torch.is_floating_point, torch.is_complex, torch.is_tensor),
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "ndim", "dtype", "layout", "requires_grad", "is_nested", "is_sparse")
    ),
}
"""Functions of a tensor that do not read values."""


class NeededError(Exception):
    """An operation needs the values of stand-ins."""

    def __init__(self, numbers: Collection[int]) -> None:
        super().__init__(f"values {sorted(numbers)} are needed")
        self.numbers = {*numbers}


class MetaStandIn(Tensor):
    """A meta tensor that raises `NeededError` when an operation needs its values."""

    number: int
    at: torch.device
    channels_last: bool

    @classmethod
    def of(cls, form: Form, number: int, rows: int, at: torch.device) -> MetaStandIn:
        """Returns a stand-in for a tensor of a form, with a number of rows, on a device."""
        meta = torch.empty(form.sizes(rows), dtype=form.dtype, device="meta")
        stand_in = Tensor._make_subclass(cls, meta)
        stand_in.number, stand_in.at, stand_in.channels_last = number, at, form.channels_last
        return stand_in

    @override
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.device.__get__:
            return args[0].at
        if func is Tensor.is_contiguous:
            return args[0].channels_last is (
                (kwargs or {}).get("memory_format") in CHANNELS_LAST.values()
            )
        if func in _VALUE_FREE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise NeededError(
            {tensor.number for _, tensor in named_in((args, kwargs)) if isinstance(tensor, cls)}
        )


@dataclass(frozen=True)
class Form:
    """Shape, dtype and memory format of a tensor that one of the first modules returns.

    Args:
        name: Name of the tensor, for messages.
        shape: Shape for a batch of `batch` samples.
        batch: Number of samples.
        dtype: The dtype.
        channels_last: Whether the tensor is in channels_last.
    """

    name: str
    shape: tuple[int, ...]
    batch: int
    dtype: torch.dtype
    channels_last: bool

    @classmethod
    def of(cls, name: str, tensor: Tensor, batch: int) -> Form:
        """Returns the form of a tensor."""
        return cls(name, tuple(tensor.shape), batch, tensor.dtype, is_channels_last(tensor))

    @property
    def has_rows(self) -> bool:
        """Whether the tensor has a row for each sample."""
        return len(self.shape) > 0 and self.shape[0] == self.batch

    def sizes(self, rows: int) -> tuple[int, ...]:
        """Returns the sizes with another number of samples."""
        return (rows, *self.shape[1:]) if self.has_rows else self.shape

    @property
    def kept_shape(self) -> tuple[int, ...]:
        """Shape of a row, with dimensions in memory order."""
        return (*self.shape[2:], self.shape[1]) if self.channels_last else self.shape[1:]

    def kept(self, batch: Tensor) -> Tensor:
        """Returns a batch with dimensions in memory order."""
        return batch.movedim(1, -1) if self.channels_last else batch

    def row(self, kept: Tensor) -> Tensor:
        """Returns a row in the module's order of dimensions."""
        return kept.movedim(-1, 0) if self.channels_last else kept

    def laid_out(self, tensor: Tensor) -> Tensor:
        """Returns a tensor in this form's memory format."""
        memory_format = CHANNELS_LAST[tensor.ndim] if self.channels_last else None
        return tensor.contiguous(memory_format=memory_format or torch.contiguous_format)
