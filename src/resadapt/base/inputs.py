"""Tensors in nested inputs and outputs, and input forms as JSON from which inputs are generated."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from resadapt.base.tensors import dtype_name, dtype_named

__all__ = ["describe", "generate", "guesses", "map_tensors", "named_in"]


def named_in(
    value: object, place: str = "output", above: tuple[int, ...] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Iterates over the tensors in a value and their places, such as ``output.masks.0``.

    Args:
        value: Any value.
        place: The place of the value.
        above: Ids of the enclosing containers, since a container may contain itself.
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
        items = (
            (field.name, getattr(value, field.name, None)) for field in dataclasses.fields(value)
        )
    for key, item in items:
        yield from named_in(item, f"{place}.{key}", (*above, id(value)))


_TENSORS = (Tensor, fx.Proxy)


def map_tensors(value: object, function: Callable[[Tensor], Tensor]) -> object:
    """Applies a function to every tensor or fx.Proxy in nested dicts, lists and tuples."""
    if isinstance(value, _TENSORS):
        return function(value)  # type: ignore[arg-type]
    if isinstance(value, dict):
        mapped = {key: map_tensors(item, function) for key, item in value.items()}
        if type(value) is dict:
            return mapped
        changed = copy.copy(value)  # keeps the class, such as OrderedDict
        changed.update(mapped)
        return changed
    kind: Any = type(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return kind(*(map_tensors(item, function) for item in value))
    if isinstance(value, list | tuple) and kind in (list, tuple):
        return kind(map_tensors(item, function) for item in value)
    return value


_MOST_ELEMENTS = 2**26
_MOST_DEPTH = 8
_CHUNK = 2**20
# First a small size that leaves at least one position in the last stage of a usual ConvNet, then
# the size that most models are built for.
_SIZES: dict[type[nn.Module], tuple[tuple[int, ...], ...]] = {
    nn.Conv1d: ((64,), (1024,)),
    nn.Conv2d: ((64, 64), (224, 224)),
    nn.Conv3d: ((4, 32, 32), (16, 224, 224)),
}


def describe(inputs: object) -> Any:
    """Returns the form of a model's input as JSON values, None if `generate` cannot make it."""
    form = _described(inputs)
    try:
        _check_size(form)
    except ValueError:
        return None
    return form


def generate(form: Any) -> object:
    """Generates an input of a given form, with numbers in [-1, 1) that are equal on every machine.

    A form may come from an untrusted file, so it is limited to 2^26 elements in total.

    Raises:
        ValueError: The form is not one that `describe` returns, or is too large.
    """
    _check_size(form)
    return _generated(form)


def guesses(modules: Iterable[nn.Module]) -> list[Any]:
    """Guesses input forms from a model's first convolution; empty if there is no convolution."""
    for module in modules:
        for kind, sizes in _SIZES.items():
            if isinstance(module, kind):
                dtype = dtype_name(next(module.parameters()))
                return [{"shape": [2, module.in_channels, *size], "dtype": dtype} for size in sizes]
    return []


def _described(inputs: object) -> Any:
    match inputs:
        case Tensor():
            dense = inputs.layout is torch.strided and not inputs.is_nested
            if dense and inputs.is_floating_point():
                return {"shape": list(inputs.shape), "dtype": dtype_name(inputs)}
        case list() | tuple():
            kind = "list" if isinstance(inputs, list) else "tuple"
            return {kind: [_described(item) for item in inputs]}
    return None


def _check_size(form: Any) -> None:
    elements = sum(math.prod(shape) for shape in _shapes(form, _MOST_DEPTH))
    if elements > _MOST_ELEMENTS:
        raise ValueError(f"an input of {elements} elements: at most {_MOST_ELEMENTS} are allowed")


def _shapes(form: Any, depth: int) -> Iterator[list[int]]:
    match form:
        case {"shape": [*shape], "dtype": str(name)} if len(form) == 2 and all(
            type(size) is int and size >= 0 for size in shape
        ):
            dtype = dtype_named(name)
            if dtype is not None and dtype.is_floating_point and len(shape) <= _MOST_DEPTH:
                yield shape
                return
        case {"list": [*items]} | {"tuple": [*items]} if len(form) == 1 and depth:
            for item in items:
                yield from _shapes(item, depth - 1)
            return
    raise ValueError(f"not the form of an input: {form!r:.200}")


def _generated(form: Any) -> object:
    if "list" in form:
        return [_generated(item) for item in form["list"]]
    if "tuple" in form:
        return tuple(_generated(item) for item in form["tuple"])
    made = torch.empty(form["shape"], dtype=dtype_named(form["dtype"]), device="cpu")
    flat = made.view(-1)
    for start in range(0, flat.numel(), _CHUNK):
        # The high bits of Knuth's multiplicative hash of the position: integer arithmetic is exact
        # on every machine.
        positions = torch.arange(
            start + 1, min(start + _CHUNK, flat.numel()) + 1, dtype=torch.int64, device="cpu"
        )
        bits = positions.mul_(2654435761).bitwise_and_(0xFFFFFFFF) >> 16
        flat[start : start + _CHUNK] = bits.to(torch.float64) / 2**15 - 1
    return made
