"""What models take and return.

Tensors in nested values, forms of inputs as data, inputs made from a form.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from resadapt.base.tensors import dtype_name, dtype_named

__all__ = ["describe", "generate", "guesses", "map_tensors", "named_in"]


def named_in(
    value: object, place: str = "output", above: tuple[int, ...] = ()
) -> Iterator[tuple[str, Tensor]]:
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
        items = (
            (field.name, getattr(value, field.name, None)) for field in dataclasses.fields(value)
        )
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


_MOST_ELEMENTS = 2**26
_MOST_DEPTH = 8
_CHUNK = 2**20
# Images for which every stage of a usual ConvNet has a position left; then the size that most
# models are built for.
_SIZES: dict[type[nn.Module], tuple[tuple[int, ...], ...]] = {
    nn.Conv1d: ((64,), (1024,)),
    nn.Conv2d: ((64, 64), (224, 224)),
    nn.Conv3d: ((4, 32, 32), (16, 224, 224)),
}


def describe(inputs: object) -> Any:
    """Returns the form of a model's input as JSON values, from which `generate` can make another.

    None if it cannot.
    """
    form = _described(inputs)
    try:
        _check_size(form)
    except ValueError:
        return None
    return form


def generate(form: Any) -> object:
    """Makes an input of a described form: numbers in [-1, 1) that are the same on every machine,
    whatever made them.

    A form may come from a file, so the whole of it may ask for 2^26 elements at most.

    Raises:
        ValueError: The form is not one that `describe` gives, or is too large.
    """
    _check_size(form)
    return _generated(form)


def guesses(modules: Iterable[nn.Module]) -> list[Any]:
    """Returns forms that a model's input may have, by its first convolution.

    None if it has no convolution.
    """
    for module in modules:
        for kind, sizes in _SIZES.items():
            if isinstance(module, kind):
                dtype = dtype_name(next(module.parameters()))
                return [{"shape": [2, module.in_channels, *size], "dtype": dtype} for size in sizes]
    return []


def _described(inputs: object) -> Any:
    match inputs:
        case Tensor():
            plain = (
                inputs.is_floating_point()
                and inputs.layout is torch.strided
                and not inputs.is_nested
            )
            return {"shape": list(inputs.shape), "dtype": dtype_name(inputs)} if plain else None
        case list() | tuple():
            return {
                ("list" if isinstance(inputs, list) else "tuple"): [
                    _described(item) for item in inputs
                ]
            }
    return None


def _check_size(form: Any) -> None:
    elements = sum(math.prod(shape) for shape in _shapes(form, _MOST_DEPTH))
    if elements > _MOST_ELEMENTS:
        raise ValueError(f"an input of {elements} elements")


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
        # Integer arithmetic, exact everywhere: Knuth's multiplicative hash of the position, its
        # high bits.
        positions = torch.arange(
            start + 1, min(start + _CHUNK, flat.numel()) + 1, dtype=torch.int64, device="cpu"
        )
        bits = positions.mul_(2654435761).bitwise_and_(0xFFFFFFFF) >> 16
        flat[start : start + _CHUNK] = bits.to(torch.float64) / 2**15 - 1
    return made
