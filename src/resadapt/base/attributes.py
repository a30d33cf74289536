"""Keeping the attributes and hooks of a model's modules as they are."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["attributes_kept"]

_MAPPINGS = (dict, OrderedDict, defaultdict)
_CONTAINERS = (*_MAPPINGS, list, set)


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Restores the attributes, hooks and children of a model's modules after the body.

    A model may change them in its first forward: transformers, for one, registers hooks that
    collect outputs. The content of dicts, lists and sets among the attributes is restored too. The
    elements of tensors and the attributes of other objects are not.
    """
    seen: dict[int, tuple[Any, list[Any]]] = {}
    for module in nn.Module.modules(model):
        _record(module.__dict__, seen)
    try:
        yield
    finally:
        for container, items in seen.values():
            _refill(container, items)


def _record(value: Any, seen: dict[int, tuple[Any, list[Any]]]) -> None:
    """Records the items of a container and of the containers inside it."""
    if type(value) in _CONTAINERS and id(value) not in seen:
        seen[id(value)] = value, _items(value)
        for inner in value.values() if isinstance(value, dict) else value:
            _record(inner, seen)


def _items(container: Any) -> list[Any]:
    return [*container.items()] if isinstance(container, dict) else [*container]


def _refill(container: Any, items: list[Any]) -> None:
    """Gives a container the recorded items again, and leaves it alone if it has them."""

    def parts(entries: list[Any]) -> list[Any]:
        return [each for entry in entries for each in entry] if is_mapping else entries

    is_mapping = isinstance(container, dict)
    now, before = parts(_items(container)), parts(items)
    if len(now) == len(before) and all(x is y for x, y in zip(now, before, strict=True)):
        return
    container.clear()
    if isinstance(container, list):
        container.extend(items)
    else:
        container.update(items)
