"""The exceptions of resadapt, and the words of their messages.

What happened, where, and how to mend it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

__all__ = [
    "AdapterError",
    "AdapterFileError",
    "AdapterKeyError",
    "AdapterWarning",
    "BackboneDriftError",
    "BackboneMismatchError",
    "InjectionError",
    "VerificationError",
    "check_flag",
    "check_rate",
    "quote_names",
    "quote_reasons",
]


class AdapterError(Exception):
    """Base class of every error that resadapt raises; itself raised for an unsuitable argument.

    Args:
        message: What happened, where, and how to mend it.
        report: What was compared, where the error follows from a report; else None.
    """

    def __init__(self, message: str, report: object = None) -> None:
        super().__init__(message)
        self.report = report


class AdapterWarning(UserWarning):
    """Something about the adapters that is probably not meant, such as one that never runs."""


class InjectionError(AdapterError):
    """Adapters cannot be put where they were asked for, or are not where they are looked for."""


class BackboneDriftError(AdapterError):
    """The backbone is no longer the one that was injected into (raised when saving).

    ``report`` is a `BackboneReport`.
    """


class BackboneMismatchError(AdapterError):
    """The backbone is not the one that the adapters were trained on (raised when loading)."""


class AdapterFileError(AdapterError):
    """An adapter file is corrupt, truncated, not an adapter file, too new, or cannot be written."""


class AdapterKeyError(AdapterError):
    """A set or tensor is missing or unexpected, or has the wrong shape or dtype."""


class VerificationError(AdapterError):
    """A check of the save round trip failed, and the target file was left as it was.

    ``report`` is a `VerificationReport`.
    """


def quote_names(names: Collection[str], most: int = 8) -> str:
    """Joins names for a message, the first few of them if they are many."""
    return _first(", ", [repr(name) for name in names], most)


def quote_reasons(reasons: Mapping[str, str], most: int = 8) -> str:
    """Joins names and what is said of each for a message, the first few of them if they are many."""
    return _first("; ", [f"{name!r} {reason}" for name, reason in reasons.items()], most)


def _first(separator: str, texts: list[str], most: int) -> str:
    shown = separator.join(texts[:most])
    return shown if len(texts) <= most else f"{shown} and {len(texts) - most} more"


def check_flag(name: str, value: object) -> None:
    """Checks that an argument is a bool.

    Raises:
        AdapterError: It is none.
    """
    if not isinstance(value, bool):
        raise AdapterError(f"{name}={value!r:.100} is {type(value).__name__}: give True or False.")


def check_rate(name: str, value: object) -> None:
    """Refuses what is no number, 0 or more, nor a tensor of one.

    Raises:
        AdapterError: It is none.
    """
    try:
        good = (
            isinstance(value, int | float | Tensor)
            and not isinstance(value, bool)
            and float(value) >= 0
        )
    except (
        RuntimeError,
        ValueError,
        TypeError,
        OverflowError,
        NotImplementedError,
    ):  # a tensor of several, or without a value
        good = False
    if not good:
        raise AdapterError(f"{name}={repr(value)[:100]}: give a number, 0 or more.")
