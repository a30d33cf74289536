"""Work that one process does for all of a sharded model's."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch import nn

from resadapt.base.errors import AdapterError
from resadapt.injection.sharding import sharded_tensors

__all__ = ["check_ranks", "on_one_rank"]

T = TypeVar("T")


def check_ranks(model: nn.Module) -> bool:
    """Tells whether a model is sharded over processes.

    Raises:
        AdapterError: It is, but not over all of the default process group, which would then wait for ever.
    """
    meshes = [tensor.device_mesh for tensor in sharded_tensors(model)]  # type: ignore[attr-defined]
    if meshes and any(mesh.size() != dist.get_world_size() for mesh in meshes):
        raise AdapterError("The model is sharded over a part of the processes only, for which saving is not supported.")
    return bool(meshes)


def on_one_rank(sharded: bool, work: Callable[[], T]) -> T:
    """Does work on rank 0 of a sharded model and gives its result or error to all; for any other model just does it."""
    if not sharded:
        return work()
    outcome: list[tuple[bool, object]] = [(False, None)]
    if dist.get_rank() == 0:
        try:
            outcome = [(True, work())]
        except BaseException as error:
            outcome = [(False, _sendable(error))]
    dist.broadcast_object_list(outcome, src=0)
    ((done, result),) = outcome
    if not done:
        raise result  # type: ignore[misc]
    return result  # type: ignore[return-value]


def _sendable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return AdapterError(f"Rank 0 failed with {type(error).__name__}: {error}")
    return error
