"""Tensors inside nested inputs and outputs: lists, tuples, mappings and dataclasses."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

__all__ = ["map_tensors", "named_in"]


def named_in(value: object, place: str = "output", above: tuple[int, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    """Walks the tensors in a value with their places, such as ``output.masks.0``.

    Args:
        value: Any value.
        place: Its own place.
        above: The identities of the containers that it lies in: one may contain itself.
    """
    if isinstance(value, Tensor):
        yield place, value
        return
    items: Iterator[tuple[object, object]] = iter(())
    if id(value) in above:
        return
    if isinstance(value, Mapping):
        items = iter(value.items())
    elif isinstance(value, list | tuple):
        items = iter(enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = ((field.name, getattr(value, field.name, None)) for field in dataclasses.fields(value))
    for key, item in items:
        yield from named_in(item, f"{place}.{key}", (*above, id(value)))


def map_tensors(value: object, function: Callable[[Tensor], Tensor]) -> object:
    """Returns a value with every tensor in its dicts, lists and tuples replaced by what a function makes of it."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        mapped = {key: map_tensors(item, function) for key, item in value.items()}
        if type(value) is dict:
            return mapped
        changed = copy.copy(value)  # of the same kind: an OrderedDict stays one
        changed.update(mapped)
        return changed
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, function) for item in value))  # type: ignore[arg-type]
    if type(value) in (list, tuple):
        return type(value)(map_tensors(item, function) for item in value)  # type: ignore[call-arg, attr-defined]
    return value
