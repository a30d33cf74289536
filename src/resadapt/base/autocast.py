"""Autocast: the precision that a model runs in, and weights that change inside a region."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from resadapt.base.errors import AdapterError
from resadapt.base.tensors import all_tensors

__all__ = [
    "AUTOCAST_DTYPES",
    "check_autocast",
    "current_autocast",
    "device_kinds",
    "overwrite",
    "under_autocast",
]

AUTOCAST_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""The dtypes that a model may run under autocast to, by name."""


def device_kinds(model: nn.Module) -> set[str]:
    """Returns the types of a model's devices, such as ``"cuda"``; meta tensors do not run."""
    tensors = all_tensors(model)
    kinds = {each.device.type for each in tensors if isinstance(each, nn.Parameter)} or {"cpu"}
    return kinds - {"meta"}


def current_autocast(kind: str) -> torch.dtype | None:
    """Returns the dtype of the autocast in force on devices of a type; None without autocast."""
    # torch asks of no autocast on the meta device.
    on = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def check_autocast(autocast: object, kinds: Collection[str]) -> None:
    """Checks an argument ``autocast=`` for devices of some types.

    Raises:
        AdapterError: The argument is neither None nor a dtype that autocast supports there.
    """
    if autocast is None:
        return
    if not isinstance(autocast, torch.dtype) or autocast not in AUTOCAST_DTYPES.values():
        raise AdapterError(
            f"autocast={autocast!r:.100}: give torch.bfloat16 or torch.float16, or None to run "
            "without autocast."
        )
    with under_autocast(autocast, kinds):
        pass


@contextmanager
def under_autocast(dtype: torch.dtype | None, kinds: Collection[str]) -> Iterator[None]:
    """Runs the body under autocast to a dtype; None runs it without autocast, in a region too.

    Args:
        dtype: The dtype, or None.
        kinds: Types of the devices.

    Raises:
        AdapterError: A device does not support autocast to the dtype.
    """
    with ExitStack() as stack:
        for kind in kinds:
            # The casts that a region around keeps may be of weights that have changed since.
            try:
                stack.enter_context(
                    torch.autocast(kind, dtype, enabled=dtype is not None, cache_enabled=False)
                )
                refused = "" if torch.is_autocast_enabled(kind) else "torch turns autocast off"
            except RuntimeError as error:
                refused = str(error)
            if dtype is not None and refused:
                raise AdapterError(
                    f"autocast={dtype} is not supported on the device {kind!r}: {refused}. Give "
                    "another dtype, or None."
                )
        yield


@torch.no_grad()
def overwrite(values: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copies values into tensors, all or none, and drops the old casts that autocast keeps.

    Autocast casts a trained weight once in a region. Without this, the rest of the region would
    run with the old values.

    Args:
        values: Pairs of a tensor and its new value.
    """
    before: list[tuple[Tensor, Tensor]] = []
    try:
        for tensor, value in values:
            old = tensor.clone()
            tensor.copy_(value)
            before.append((tensor, old))
    except RuntimeError:  # torch does not write to every tensor, such as one of inference mode
        for tensor, old in before:
            tensor.copy_(old)
        raise
    finally:
        torch.clear_autocast_cache()
