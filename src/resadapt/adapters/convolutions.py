"""Convolutions with the geometry of a site's own layer, and its weight as one row for each output channel."""

from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from resadapt.adapters.family import Site

__all__ = [
    "Convolution",
    "Layer",
    "convolution_like",
    "convolution_of",
    "cropped",
    "layer_of",
    "nn_class",
    "paddings",
    "rows",
    "weight_and_bias",
    "weight_from",
]

Convolution = nn.modules.conv._ConvNd
Layer = nn.modules.conv._ConvNd | nn.Linear
_STRAIGHT: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED: tuple[Any, ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def layer_of(site: Site) -> Layer:
    """Returns a site's module if it is a layer with a weight that computes as torch's own does.

    A subclass is one if it inherits its forward, as torchvision's ``Conv3DSimple`` does. timm's
    ``Conv2dSame`` pads in a forward of its own, quantization-aware layers round in theirs: what
    stands in their attributes is not what they compute.

    Args:
        site: Where an adapter is built.

    Raises:
        ValueError: It is no convolution and no Linear, has a forward of its own, or its weight has
            no shape yet.
    """
    module = site.module
    if not isinstance(module, Convolution | nn.Linear):
        raise ValueError("it needs a convolution or a Linear")
    stock = next(kind for kind in (*_STRAIGHT, *_TRANSPOSED, nn.Linear) if isinstance(module, kind))
    for name in ("forward", "_conv_forward"):
        if (
            getattr(type(module), name, None) is not getattr(stock, name, None)
            or name in module.__dict__
        ):
            raise ValueError(
                f"it needs a layer that computes as {stock.__name__} does, and this one has a "
                f"{name} of its own"
            )
    if is_lazy(module.weight):
        raise ValueError("it needs a weight with a shape, so run the model once before")
    return module


def convolution_of(site: Site) -> Convolution:
    """Returns a site's module if it is a convolution that computes as torch's own does.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(site.module, Convolution):
        raise ValueError("it needs a convolution")
    layer = layer_of(site)
    assert isinstance(layer, Convolution)
    return layer


def convolution_like(
    layer: Convolution, in_channels: int, out_channels: int, groups: int
) -> Convolution:
    """Returns a new convolution without bias that meets every input as another one does, in a class
    of torch's own.

    The output of a transposed one is as large as it can be, since a call may choose the size:
    `cropped` gives it that of another.

    Args:
        layer: Whose kernel size, stride, padding, dilation and padding mode it has.
        in_channels: Channels of its input.
        out_channels: Channels of its output.
        groups: Groups that its channels are in.
    """
    options: dict[str, Any] = {}
    if layer.transposed:
        options["output_padding"] = [
            max(s, d) - 1 for s, d in zip(layer.stride, layer.dilation, strict=True)
        ]
    kind = (_TRANSPOSED if layer.transposed else _STRAIGHT)[len(layer.kernel_size) - 1]
    convolution: Convolution = kind(
        in_channels,
        out_channels,
        layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=groups,
        bias=False,
        padding_mode=layer.padding_mode,
        **options,
    )
    return convolution


def cropped(x: Tensor, like: Tensor, dims: int) -> Tensor:
    """Returns the beginning of some spatial dimensions, as long as in another feature map."""
    for dim in range(2, 2 + dims):
        x = x.narrow(dim, 0, like.shape[dim])
    return x


def nn_class(kind: str, dims: int) -> Any:
    """Returns one of torch's classes that come for every number of dimensions, such as ``nn_class("Conv", 2)``."""
    return getattr(nn, f"{kind}{dims}d")


def paddings(layer: Convolution) -> list[tuple[int, int]]:
    """Returns what a convolution adds before and behind each spatial dimension."""
    if isinstance(layer.padding, tuple):
        return [(each, each) for each in layer.padding]
    totals = [
        d * (k - 1) if layer.padding == "same" else 0
        for k, d in zip(layer.kernel_size, layer.dilation, strict=True)
    ]
    return [(total // 2, total - total // 2) for total in totals]


def rows(weight: Tensor, groups: int, transposed: bool) -> Tensor:
    """Returns a weight as ``[C_out, C_in / groups * taps]``, whichever way round its layer has it."""
    if not transposed:
        return weight.flatten(1)
    parts = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return parts.transpose(1, 2).reshape(groups * weight.shape[1], -1)


def weight_from(rows: Tensor, like: Tensor, groups: int, transposed: bool) -> Tensor:
    """Returns the weight whose rows are given, in the shape of another one."""
    if not transposed:
        return rows.reshape(like.shape)
    parts = rows.reshape(groups, like.shape[1], like.shape[0] // groups, -1)
    return parts.transpose(1, 2).reshape(like.shape)


def weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Returns a layer's own tensors, which can take up what an adapter does.

    Raises:
        ValueError: One is computed anew in every forward, from other tensors.
    """
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    if weight is None or (bias is None and module.bias is not None):
        raise ValueError(
            f"this {type(module).__name__} computes its weight or bias from other tensors, so it "
            "cannot take this up"
        )
    return weight, bias
