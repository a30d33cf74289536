"""The exceptions of resadapt, and helpers that check arguments and format messages."""

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
    """Base class of all errors of resadapt; raised directly for an invalid argument.

    Args:
        message: What happened, where, and how to fix it.
        report: The report that led to the error, None if there is none.
    """

    def __init__(self, message: str, report: object = None) -> None:
        super().__init__(message)
        self.report = report


class AdapterWarning(UserWarning):
    """A probable mistake with the adapters, such as an adapter that never runs."""


class InjectionError(AdapterError):
    """Adapters cannot be injected at the requested sites, or are missing from the model."""


class BackboneDriftError(AdapterError):
    """The backbone has changed since the injection (raised when saving).

    ``report`` is a `BackboneReport`.
    """


class BackboneMismatchError(AdapterError):
    """The backbone differs from the one the adapters were trained on (raised when loading)."""


class AdapterFileError(AdapterError):
    """An adapter file is corrupt, truncated, not an adapter file, too new, or cannot be written."""


class AdapterKeyError(AdapterError):
    """A set or tensor is missing or unexpected, or has the wrong shape or dtype."""


class VerificationError(AdapterError):
    """Verification of a saved file failed; the target file is unchanged.

    ``report`` is a `VerificationReport`.
    """


def quote_names(names: Collection[str], most: int = 8) -> str:
    """Joins quoted names for a message: the first `most` of them, and the number of the others."""
    return _first(", ", [repr(name) for name in names], most)


def quote_reasons(reasons: Mapping[str, str], most: int = 8) -> str:
    """Joins quoted names, each with its reason, for a message; shortened as in `quote_names`."""
    return _first("; ", [f"{name!r} {reason}" for name, reason in reasons.items()], most)


def _first(separator: str, texts: list[str], most: int) -> str:
    shown = separator.join(texts[:most])
    return shown if len(texts) <= most else f"{shown} and {len(texts) - most} more"


def check_flag(name: str, value: object) -> None:
    """Checks that an argument is a bool.

    Raises:
        AdapterError: The argument is not a bool.
    """
    if not isinstance(value, bool):
        raise AdapterError(f"{name}={value!r:.100} is {type(value).__name__}: pass True or False.")


def check_rate(name: str, value: object) -> None:
    """Checks that an argument is a number >= 0, or a tensor with one such element.

    Raises:
        AdapterError: The argument is neither.
    """
    try:
        good = (
            isinstance(value, int | float | Tensor)
            and not isinstance(value, bool)
            and float(value) >= 0
        )
    except (RuntimeError, ValueError, TypeError, OverflowError):
        # A tensor with several elements, or a meta tensor.
        good = False
    if not good:
        raise AdapterError(f"{name}={repr(value)[:100]}: pass a number >= 0.")
