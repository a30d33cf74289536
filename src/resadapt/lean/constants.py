"""Tensors computed from frozen tensors: casts for autocast, and weights with a norm folded in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from resadapt.base.autocast import current_autocast
from resadapt.base.overlay import CONSTANTS
from resadapt.base.tensors import stamp

__all__ = ["STOCK_TENSORS", "Constants", "autocast_dtype", "constants_in", "is_constant"]

STOCK_TENSORS = (Tensor, nn.Parameter, FakeTensor)  # no other subclasses, such as sharded tensors
Tensors = tuple[Tensor | None, ...]


def is_constant(tensor: Tensor | None) -> bool:
    """Tells whether a tensor is missing, or frozen and counts in-place writes to it."""
    return tensor is None or (
        type(tensor) in STOCK_TENSORS and not tensor.requires_grad and not tensor.is_inference()
    )


def autocast_dtype(weight: Tensor) -> torch.dtype:
    """Returns the dtype that a convolution or Linear computes in under the autocast in force."""
    eligible = weight.is_floating_point() and weight.dtype is not torch.float64
    return (eligible and current_autocast(weight.device.type)) or weight.dtype


def constants_in(model: nn.Module) -> list[Tensor]:
    """Returns the tensors that a model's layers have computed from frozen tensors."""
    caches = (module.__dict__.get(CONSTANTS) for module in nn.Module.modules(model))
    return [tensor for cache in caches if cache is not None for tensor in cache.tensors]


class Constants:
    """Cache of the tensors that a layer computes from frozen tensors.

    Tensors are dropped when the layer's weight is written in place, moved, cast or replaced, and
    computed again when another source is. Copies and pickles of a layer have an empty cache.
    """

    def __init__(self) -> None:
        # Replaced, and not changed: other threads may read the cache.
        self._kept: dict[Any, tuple[list[Any], Any, Tensors]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles an empty cache."""
        return Constants, ()

    @property
    def tensors(self) -> list[Tensor]:
        """The cached tensors."""
        kept = [tensor for *_, tensors in self._kept.values() for tensor in tensors]
        return [tensor for tensor in kept if tensor is not None]

    def of(
        self, sources: Sequence[Tensor | None], key: Any, compute: Callable[[], Tensors]
    ) -> Tensors:
        """Returns the tensors that a function computes; computed again if a source has changed.

        Args:
            sources: The frozen tensors that the function reads, the layer's weight first.
            key: What else the result depends on.
            compute: The function.
        """
        stamps = [None if part is None else stamp(part) for part in sources]
        known = self._kept.get(key)
        if known is not None and known[0] == stamps:
            return known[2]
        with torch.inference_mode(False), torch.no_grad():  # may be used in training later
            tensors = compute()
        # A weight that is computed or loaded for each call must not leave what was made from it.
        others = {other: kept for other, kept in self._kept.items() if kept[0][0] == stamps[0]}
        # Sources are kept alive: a new tensor at the same address would have the same stamp.
        alive = [part.detach() for part in sources if part is not None]
        self._kept = others | {key: (stamps, alive, tensors)}
        return tensors
