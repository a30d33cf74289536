"""Convolutions with a forward of their own: where their outputs read the input.

timm's ``Conv2dSame`` pads by the size of each input, causal convolutions pad in front, and
weight-standardized convolutions compute a weight. The attributes of such a layer do not tell, and
neither do the sizes of its output: a causal layer returns the sizes of a layer that pads on both
sides. So the layer's forward runs on marked inputs, and every torch convolution inside it passes
the marks on.
"""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from resadapt.adapters.convolutions import Convolution, convolution_like, cropped, has_own_forward

__all__ = ["InputPadding", "bypass_like", "input_padding", "uses_parameters"]


class InputPadding(nn.Module):
    """Pads or crops a layer's input for a stock convolution that itself pads nothing.

    Args:
        layer: The layer, a convolution.
        before: The padding before each spatial dimension; None for half of the padding, rounded
            down, as TensorFlow pads.
        one_tap: Whether the convolution has kernel size 1, and reads the position under the centre
            of the layer's kernel.
    """

    def __init__(
        self, layer: Convolution, before: list[int | None], *, one_tap: bool = False
    ) -> None:
        super().__init__()
        self.before = [0 if each is None else each for each in before]
        self.halved = [each is None for each in before]
        self.strides = list(layer.stride)
        geometry = list(zip(layer.kernel_size, layer.dilation, strict=True))
        self.reach = [d * (k - 1) for k, d in geometry]
        self.first = [d * ((k - 1) // 2) if one_tap else 0 for k, d in geometry]
        self.last = [d * (k // 2) if one_tap else 0 for k, d in geometry]

    @override
    def forward(self, x: Tensor, like: Tensor) -> Tensor:
        """Returns the layer's input, padded for an output with the sizes of `like`."""
        sides: list[int] = []
        for dim in range(len(self.strides) - 1, -1, -1):
            read = (like.shape[2 + dim] - 1) * self.strides[dim] + self.reach[dim] + 1
            padding = read - x.shape[2 + dim]
            before = padding // 2 if self.halved[dim] else self.before[dim]
            sides += [before - self.first[dim], padding - before - self.last[dim]]
        return F.pad(x, sides)


def bypass_like(
    layer: Convolution, in_channels: int, out_channels: int, groups: int
) -> tuple[InputPadding | None, Convolution]:
    """Returns a convolution without bias that reads a layer's input as the layer does.

    Returns:
        What pads the convolution's input, None where the convolution pads, and the convolution.

    Raises:
        ValueError: As `input_padding`.
    """
    padding = input_padding(layer)
    return padding, convolution_like(
        layer, in_channels, out_channels, groups, padded=padding is None
    )


def input_padding(layer: Convolution, *, one_tap: bool = False) -> InputPadding | None:
    """Returns the padding that a layer's forward adds, None if its attributes describe the padding.

    Args:
        layer: A convolution.
        one_tap: As in `InputPadding`.

    Raises:
        ValueError: The layer's forward reads other positions than a convolution with the layer's
            kernel size, stride and dilation, or fails on a generated input.

    Example:
        >>> class Causal(nn.Conv1d):
        ...     def forward(self, x):
        ...         return super().forward(F.pad(x, [2, 0]))
        >>> input_padding(Causal(4, 4, 3)).before, input_padding(nn.Conv1d(4, 4, 3))
        ([2], None)
    """
    if not has_own_forward(layer):
        return None
    before = _read(layer).before
    return None if before is None else InputPadding(layer, before, one_tap=one_tap)


def uses_parameters(layer: Convolution) -> bool:
    """Tells whether a layer returns a convolution with the parameters `weight` and `bias`.

    A layer with an inherited forward does. A weight-standardized layer does not.

    Raises:
        ValueError: As `input_padding`.
    """
    return not has_own_forward(layer) or _read(layer).uses_parameters


class _Reading(NamedTuple):
    """What a forward does: its padding as in `InputPadding`, None for the declared one."""

    before: list[int | None] | None
    uses_parameters: bool


class _Summing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets convolutions return sums that tell what they read, and NaN where they read a NaN.

    Input and output channels have weights of their own, so a change of their order is seen.

    Attributes:
        given: Weight and bias of each call.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.given: list[tuple[object, object]] = []

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.convolution.default:
            return func(*args, **(kwargs or {}))
        x, weight, bias, *geometry, groups = args
        self.given.append((weight, bias))
        transposed = geometry[3]
        channels = weight.shape[1] * groups if transposed else weight.shape[0]
        # On the CPU, since other kernels may return NaN at neighbouring positions too.
        taps = torch.ones(1, 1, *weight.shape[2:], dtype=torch.float64, device="cpu")
        one = _ramp(x.shape[1], x.ndim).mul(x.double().cpu()).sum(1, keepdim=True)
        sums = func(one, taps, None, *geometry, 1) * _ramp(channels, x.ndim)
        return sums.to(x)


def _ramp(channels: int, ndim: int) -> Tensor:
    """Returns 1, 2, 3 ... along the channels."""
    numbers = torch.arange(1.0, channels + 1, dtype=torch.float64, device="cpu")
    return numbers.reshape(-1, *[1] * (ndim - 2))


_ROWS = 8
"""Samples in one call. Limits memory where a kernel spans many positions."""


@torch.no_grad()
def _read(layer: Convolution) -> _Reading:
    """Runs a layer's forward on inputs in which one position of one dimension is NaN."""
    summing = _Summing()
    try:
        marked = list(_marked_inputs(layer))
        with torch.device("cpu"), summing:
            outputs = [
                _in_parts(_copy_of(layer).forward, values, marks) for _, values, marks in marked
            ]
    except Exception as error:  # a forward may raise anything
        raise ValueError(
            f"its own forward fails on a generated input: {type(error).__name__}: {error}"
        ) from error
    calls = sum(-(-len(marks) // _ROWS) for _, _, marks in marked)
    given_parameters = len(summing.given) == calls and all(
        weight is layer.weight and bias is layer.bias for weight, bias in summing.given
    )
    for before in (None, _before(layer, [dim for dim, _, _ in marked], outputs)):
        pairs = [
            (output, _bypassed(layer, before, values, marks, output))
            for (_, values, marks), output in zip(marked, outputs, strict=True)
        ]
        if all(y.shape == z.shape and y.isnan().equal(z.isnan()) for y, z in pairs):
            same = all(y.nan_to_num().equal(z.nan_to_num()) for y, z in pairs)
            return _Reading(before, given_parameters and same)
    raise ValueError(
        "its own forward reads other positions of its input than a convolution with its "
        "kernel_size, stride and dilation does"
    )


def _copy_of(layer: Convolution) -> Convolution:
    """Returns a copy that shares parameters, since a forward may write attributes and buffers."""
    return copy.deepcopy(layer, {id(each): each for each in layer.parameters()})


def _marked_inputs(layer: Convolution) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields dimensions, values ``[1, C, ...]``, and marks, of which number i is NaN at i."""
    device = "cpu" if layer.weight.is_meta else layer.weight.device
    options: Any = {"dtype": layer.weight.dtype, "device": device}
    declared = [0] * len(layer.stride) if isinstance(layer.padding, str) else layer.padding
    for more in range(max(layer.stride)):  # the padding may depend on the remainder
        sizes = [
            d * (k - 1) + 1 + s + p + more  # two outputs, of which one does not read position 0
            for k, d, s, p in zip(
                layer.kernel_size, layer.dilation, layer.stride, declared, strict=True
            )
        ]
        count = layer.in_channels * math.prod(sizes)
        # Whole numbers of both signs: sums are exact, and an activation changes them.
        values = (torch.arange(count, device=device) * 7 % 11 - 5).to(layer.weight.dtype)
        for dim, size in enumerate(sizes):
            marks = torch.ones(size, 1, *sizes, **options)
            marks.diagonal(dim1=0, dim2=2 + dim).fill_(torch.nan)
            yield dim, values.reshape(1, -1, *sizes), marks


def _in_parts(
    forward: Callable[..., Tensor], values: Tensor, marks: Tensor, *others: Tensor
) -> Tensor:
    """Returns the output of a function that is called with some samples at a time."""
    parts = zip(*(torch.split(each, _ROWS) for each in (marks, *others)), strict=True)
    return torch.cat([forward(values * mark, *other) for mark, *other in parts])


def _bypassed(
    layer: Convolution, before: Any, values: Tensor, marks: Tensor, output: Tensor
) -> Tensor:
    """Returns what a stock convolution with some padding sums."""
    padding = None if before is None else InputPadding(layer, before)
    with torch.device("meta"):  # only the shape of the weight matters
        convolution = convolution_like(
            layer, layer.in_channels, layer.out_channels, layer.groups, padded=padding is None
        )
    dims = len(layer.kernel_size) if layer.transposed else 0

    def bypass(x: Tensor, like: Tensor) -> Tensor:
        return cropped(convolution(x if padding is None else padding(x, like)), like, dims)

    with _Summing():
        return _in_parts(bypass, values, marks, output)


def _before(layer: Convolution, dims: list[int], outputs: list[Tensor]) -> list[int | None]:
    """Returns the padding before each dimension, None where it is not the same for all sizes."""
    found: list[set[int]] = [set() for _ in layer.stride]
    for dim, output in zip(dims, outputs, strict=True):
        # [size, output's size in this dimension]: which output reads which position
        reads = output.isnan().transpose(1, 2 + dim).flatten(2).any(2)
        whole = reads.sum(0) == layer.kernel_size[dim]
        if whole.any():
            first = int(whole.long().argmax())
            found[dim].add(first * layer.stride[dim] - int(reads[:, first].long().argmax()))
    return [each.pop() if len(each) == 1 else None for each in found]
