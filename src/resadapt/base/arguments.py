"""Refusing arguments of a kind that a call cannot take."""

from __future__ import annotations

from torch import Tensor

from resadapt.base.errors import AdapterError

__all__ = ["check_flag", "check_rate"]


def check_flag(name: str, value: object) -> None:
    """Refuses what is neither true nor false, such as a tensor.

    Raises:
        AdapterError: It is no bool.
    """
    if not isinstance(value, int):
        raise AdapterError(f"{name} is {type(value).__name__}: give True or False.")


def check_rate(name: str, value: object) -> None:
    """Refuses what is no number, 0 or more, nor a tensor of one.

    Raises:
        AdapterError: It is none.
    """
    try:
        good = isinstance(value, int | float | Tensor) and not isinstance(value, bool) and float(value) >= 0
    except (RuntimeError, ValueError, TypeError, OverflowError, NotImplementedError):  # a tensor of several, or without a value
        good = False
    if not good:
        raise AdapterError(f"{name}={repr(value)[:100]}: give a number, 0 or more.")
