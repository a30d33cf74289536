"""Inputs like a given one, of other sizes or with another number of samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from resadapt.base.inputs import map_tensors, named_in

__all__ = ["batch_size", "resized", "with_one_more_sample"]


def batch_size(inputs: object) -> int | None:
    """Returns the number of samples in an input: the size of its first tensor in dimension 0."""
    return next((tensor.shape[0] for _, tensor in named_in(inputs) if tensor.ndim), None)


def with_one_more_sample(inputs: object) -> object:
    """Returns an input with the first sample once more at the end."""
    size = batch_size(inputs)

    def longer(tensor: Tensor) -> Tensor:
        if not tensor.ndim or tensor.shape[0] != size:
            return tensor
        return torch.cat([tensor, tensor[:1]])

    return map_tensors(inputs, longer)


def resized(inputs: object, modules: Iterable[nn.Module]) -> Iterator[object]:
    """Yields inputs of other sizes, made from the values of an input; none where it has no sizes.

    The same size becomes the same other size everywhere, so that an image and its mask still fit,
    and a square stays one. A smaller input comes first: it costs less, and no table of positions
    is too short for it. Larger ones come last, and not for integers: an index beyond a table is an
    error that a GPU does not recover from.

    Args:
        inputs: The input.
        modules: The model's modules, whose first convolution or Linear tells where an input has
            its channels.
    """
    layer = next((each for each in modules if isinstance(each, _ConvNd | nn.Linear)), None)
    tensors = [tensor for _, tensor in named_in(inputs)]
    sizes = {t.shape[dim] for t in tensors for dim in _positions(t, layer) or ()} - {0, 1}
    if not sizes:
        return
    changes = [_smaller] if any(map(_is_index, tensors)) else [_smaller, _larger, _double]
    for change in changes:
        other = map_tensors(inputs, lambda tensor, c=change: _resized(tensor, layer, sizes, c))  # type: ignore[misc]
        if [tensor.shape for _, tensor in named_in(other)] != [tensor.shape for tensor in tensors]:
            yield other


def _positions(tensor: Tensor, layer: nn.Module | None) -> range | None:
    """Returns the dimensions of a tensor that count positions, None if they are not known."""
    ndim = tensor.ndim
    if isinstance(layer, _ConvNd):
        count = len(layer.kernel_size)
        if ndim > count and tensor.shape[-count - 1] == layer.in_channels:
            return range(ndim - count, ndim)
        if ndim > count + 1 and tensor.shape[-1] == layer.in_channels:
            return range(ndim - count - 1, ndim - 1)
        if ndim == count + 2 or (ndim == count + 1 and layer.in_channels == 1):
            return range(ndim - count, ndim)
    elif isinstance(layer, nn.Linear) and ndim > 2 and tensor.shape[-1] == layer.in_features:
        return range(1, ndim - 1)
    return range(1, ndim) if _is_index(tensor) else None


def _is_index(tensor: Tensor) -> bool:
    return tensor.ndim > 1 and not (
        tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool
    )


def _resized(
    tensor: Tensor, layer: nn.Module | None, sizes: set[int], change: Callable[[int], int]
) -> Tensor:
    """Cuts the dimensions of the given sizes off, or repeats the values in them."""
    positions = _positions(tensor, layer)
    for dim in range(1, tensor.ndim) if positions is None else positions:
        size = tensor.shape[dim]
        if size in sizes:
            index = torch.arange(change(size), device=tensor.device) % size
            tensor = tensor.index_select(dim, index)
    return tensor


def _smaller(size: int) -> int:
    """Returns about half a size, with a large power of two as a factor if the size has one."""
    unit = math.gcd(size, 32)
    if unit == size:
        unit //= 2
    return unit * -(-size // (2 * unit))


def _larger(size: int) -> int:
    return size + min(size, 32)


def _double(size: int) -> int:
    return 2 * size
