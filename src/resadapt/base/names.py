"""Names of modules and tensors: which lies inside which, and how messages list them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

__all__ = ["quote_names", "quote_reasons", "within"]


def within(name: str, modules: Collection[str]) -> bool:
    """Tells whether a module or tensor name is one of the given modules or lies inside one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def quote_names(names: Collection[str], most: int = 8) -> str:
    """Joins names for a message, the first few of them if they are many."""
    return _first(", ", [repr(name) for name in names], most)


def quote_reasons(reasons: Mapping[str, str], most: int = 8) -> str:
    """Joins names and what is said of each for a message, the first few of them if they are many."""
    return _first("; ", [f"{name!r} {reason}" for name, reason in reasons.items()], most)


def _first(separator: str, texts: list[str], most: int) -> str:
    shown = separator.join(texts[:most])
    return shown if len(texts) <= most else f"{shown} and {len(texts) - most} more"
