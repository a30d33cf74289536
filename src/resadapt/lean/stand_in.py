"""A tensor without elements, which says so when something is computed with it."""

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

_FORM = {
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
"""What can be asked of a tensor without its elements."""


class NeededError(Exception):
    """Something computed with tensors whose elements are not there."""

    def __init__(self, numbers: Collection[int]) -> None:
        super().__init__(f"values {sorted(numbers)} are needed")
        self.numbers = {*numbers}


class MetaStandIn(Tensor):
    """A tensor that has a form and no elements, and says so when something is computed with it."""

    number: int
    at: torch.device
    channels_last: bool

    @classmethod
    def of(cls, form: Form, number: int, rows: int, at: torch.device) -> MetaStandIn:
        """Makes one."""
        absent = Tensor._make_subclass(
            cls, torch.empty(form.sizes(rows), dtype=form.dtype, device="meta")
        )
        absent.number, absent.at, absent.channels_last = number, at, form.channels_last
        return absent

    @override
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.device.__get__:
            return args[0].at
        if func is Tensor.is_contiguous:
            return args[0].channels_last is (
                (kwargs or {}).get("memory_format") in CHANNELS_LAST.values()
            )
        if func in _FORM:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise NeededError(
            {tensor.number for _, tensor in named_in((args, kwargs)) if isinstance(tensor, cls)}
        )


@dataclass(frozen=True)
class Form:
    """What is known of a tensor that one of the first modules returns.

    Args:
        name: Where it comes from, for messages.
        shape: Sizes, of a batch of `batch`.
        batch: Number of samples.
        dtype: Of the elements.
        channels_last: Whether its channels lie side by side in memory.
    """

    name: str
    shape: tuple[int, ...]
    batch: int
    dtype: torch.dtype
    channels_last: bool

    @classmethod
    def of(cls, name: str, tensor: Tensor, batch: int) -> Form:
        """Looks at a tensor."""
        return cls(name, tuple(tensor.shape), batch, tensor.dtype, is_channels_last(tensor))

    @property
    def has_rows(self) -> bool:
        """Whether there is a row for each sample."""
        return len(self.shape) > 0 and self.shape[0] == self.batch

    def sizes(self, rows: int) -> tuple[int, ...]:
        """Returns the sizes with another number of samples."""
        return (rows, *self.shape[1:]) if self.has_rows else self.shape

    @property
    def kept_shape(self) -> tuple[int, ...]:
        """Sizes of a row, in the order in which its dimensions lie in memory."""
        return (*self.shape[2:], self.shape[1]) if self.channels_last else self.shape[1:]

    def kept(self, batch: Tensor) -> Tensor:
        """Returns a batch with its dimensions in the order in which they lie in memory."""
        return batch.movedim(1, -1) if self.channels_last else batch

    def row(self, kept: Tensor) -> Tensor:
        """Returns a row as the module has it."""
        return kept.movedim(-1, 0) if self.channels_last else kept

    def laid_out(self, tensor: Tensor) -> Tensor:
        """Returns a tensor of this form as the module would have it in memory."""
        return tensor.contiguous(
            memory_format=CHANNELS_LAST[tensor.ndim]
            if self.channels_last
            else torch.contiguous_format
        )
