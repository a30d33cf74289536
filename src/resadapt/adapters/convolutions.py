"""Convolutions with the geometry of a site's layer, and weights as one row per output channel."""

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
    "has_own_forward",
    "layer_of",
    "nn_class",
    "paddings",
    "rows",
    "weight_from",
]

Convolution = nn.modules.conv._ConvNd
Layer = nn.modules.conv._ConvNd | nn.Linear
_STRAIGHT: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED: tuple[Any, ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def has_own_forward(layer: Layer) -> bool:
    """Tells whether a layer overrides the forward of torch.nn, by its class or on the instance."""
    kinds = (*_STRAIGHT, *_TRANSPOSED, nn.Linear)
    stock = next((kind for kind in kinds if isinstance(layer, kind)), None)
    return any(
        getattr(type(layer), name, None) is not getattr(stock, name, None) or name in vars(layer)
        for name in ("forward", "_conv_forward")
    )


def layer_of(site: Site) -> Layer:
    """Returns a site's module if it is a convolution, or a Linear with the forward of torch.nn.

    Args:
        site: The site of an adapter.

    Raises:
        ValueError: The module is neither a convolution nor a Linear, is a Linear that overrides
            `forward`, or has a weight without a shape.
    """
    module = site.module
    if not isinstance(module, Convolution | nn.Linear):
        raise ValueError("it needs a convolution or a Linear")
    if isinstance(module, nn.Linear) and has_own_forward(module):
        raise ValueError(
            "it needs a Linear with the forward of torch.nn, and this layer overrides forward"
        )
    if is_lazy(module.weight):
        raise ValueError("its weight has no shape yet: run the model once before the injection")
    return module


def convolution_of(site: Site) -> Convolution:
    """Returns a site's module if it is a convolution.

    Raises:
        ValueError: The module is not a convolution, or has a weight without a shape.
    """
    if not isinstance(site.module, Convolution):
        raise ValueError("it needs a convolution")
    layer = layer_of(site)
    assert isinstance(layer, Convolution)
    return layer


def convolution_like(
    layer: Convolution, in_channels: int, out_channels: int, groups: int, *, padded: bool = True
) -> Convolution:
    """Returns a new stock convolution without bias, with the geometry of another convolution.

    A transposed convolution gets the largest possible output, since each call may choose another
    output size; `cropped` cuts the output to that size.

    Args:
        layer: The convolution with the kernel size, stride, padding, dilation and padding mode.
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        groups: Number of groups.
        padded: Whether the convolution pads its input as the other one does; else it pads nothing.
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
        padding=layer.padding if padded else 0,
        dilation=layer.dilation,
        groups=groups,
        bias=False,
        padding_mode=layer.padding_mode if padded else "zeros",
        **options,
    )
    return convolution


def cropped(x: Tensor, like: Tensor, dims: int) -> Tensor:
    """Crops the end of the first `dims` spatial dimensions to the sizes of another feature map."""
    for dim in range(2, 2 + dims):
        x = x.narrow(dim, 0, like.shape[dim])
    return x


def nn_class(kind: str, dims: int) -> Any:
    """Returns the torch.nn class for a number of dimensions: ``nn_class("Conv", 2)`` is Conv2d."""
    return getattr(nn, f"{kind}{dims}d")


def paddings(layer: Convolution) -> list[tuple[int, int]]:
    """Returns the padding before and after each spatial dimension of a convolution."""
    if isinstance(layer.padding, tuple):
        return [(each, each) for each in layer.padding]
    totals = [
        d * (k - 1) if layer.padding == "same" else 0
        for k, d in zip(layer.kernel_size, layer.dilation, strict=True)
    ]
    return [(total // 2, total - total // 2) for total in totals]


def rows(weight: Tensor, groups: int, transposed: bool) -> Tensor:
    """Returns a weight, transposed or not, as ``[C_out, C_in / groups * taps]``."""
    if not transposed:
        return weight.flatten(1)
    parts = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return parts.transpose(1, 2).reshape(groups * weight.shape[1], -1)


def weight_from(rows: Tensor, like: Tensor, groups: int, transposed: bool) -> Tensor:
    """Inverts `rows`: returns the weight with these rows, in the shape of another weight."""
    if not transposed:
        return rows.reshape(like.shape)
    parts = rows.reshape(groups, like.shape[1], like.shape[0] // groups, -1)
    return parts.transpose(1, 2).reshape(like.shape)
