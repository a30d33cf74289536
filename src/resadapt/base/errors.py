"""The exceptions of resadapt: every message says what happened, where, and how to mend it."""

from __future__ import annotations

__all__ = [
    "AdapterError",
    "AdapterFileError",
    "AdapterKeyError",
    "AdapterWarning",
    "BackboneDriftError",
    "BackboneMismatchError",
    "InjectionError",
    "VerificationError",
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
    """The backbone is no longer the one that was injected into (raised when saving); ``report`` is a `BackboneReport`."""


class BackboneMismatchError(AdapterError):
    """The backbone is not the one that the adapters were trained on (raised when loading)."""


class AdapterFileError(AdapterError):
    """An adapter file is corrupt, truncated, not an adapter file, too new, or cannot be written."""


class AdapterKeyError(AdapterError):
    """A set or tensor is missing or unexpected, or has the wrong shape or dtype."""


class VerificationError(AdapterError):
    """A check of the save round trip failed, and the target file was left as it was; ``report`` is a `VerificationReport`."""
