"""The exceptions of resadapt: every message says what happened, where, and how to mend it."""

from __future__ import annotations

__all__ = [
    "AdapterError",
    "AdapterFileError",
    "AdapterKeyError",
    "BackboneDriftError",
    "BackboneMismatchError",
    "InjectionError",
    "VerificationError",
    "listing",
]


class AdapterError(Exception):
    """Base class of every error that resadapt raises."""


class InjectionError(AdapterError):
    """Adapters cannot be put where they were asked for, or are not where they are looked for."""


class BackboneDriftError(AdapterError):
    """The backbone is no longer the one that was injected into (raised when saving)."""


class BackboneMismatchError(AdapterError):
    """The backbone is not the one that the adapters were trained on (raised when loading)."""


class AdapterFileError(AdapterError):
    """An adapter file is corrupt, truncated, not an adapter file, too new, or cannot be written."""


class AdapterKeyError(AdapterError):
    """A set or tensor is missing or unexpected, or has the wrong shape or dtype."""


class VerificationError(AdapterError):
    """A check of the save round trip failed; the target file was left as it was."""


def listing(names: list[str], most: int = 8) -> str:
    """Joins names for a message, the first few of them if they are many."""
    shown = ", ".join(repr(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
