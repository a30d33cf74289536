"""The `conv` family.

Conv-Adapter, a depthwise convolution and a pointwise one beside or behind a convolution or a block.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from resadapt.adapters.convolutions import (
    Convolution,
    convolution_like,
    convolution_of,
    cropped,
    nn_class,
)
from resadapt.adapters.family import Adapter, Site, check_choice, register_family

__all__ = ["ConvAdapter"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}
_SCHEMES = ("conv-parallel", "conv-sequential", "residual-parallel", "residual-sequential")


@register_family("conv")
class ConvAdapter(Adapter):
    """Conv-Adapter: ``y + s up(act(down(h)))``, down a grouped convolution of the site's kernel to
    b channels, up of one tap.

    In the parallel schemes h is the input of the site, else its output y. Each of the b channels is
    computed from its own group of h's channels, so b divides their number. C_h k^2 + b C_out +
    C_out parameters.

    Args:
        site: A convolution, or for the residual schemes a block with a `downsample`.
        bottleneck: b, number of hidden channels; the paper's is C_h / gamma.
        scheme: ``"conv-parallel"``: down has the geometry of the convolution beside it.
            ``"conv-sequential"``: its kernel and dilation, at stride 1. ``"residual-parallel"``: 3
            taps, strides as in the block's `downsample`. ``"residual-sequential"``: 3 taps, stride
            1.
        activation: ``"relu"``, ``"gelu"`` or ``"silu"``.
        init: ``"identity"`` starts up at zero, so that the adapter changes nothing until it is
            trained; ``"paper"`` draws down and up as the authors' ResNet does, with variance 2 /
            (C_out k^2). s starts at one.

    Raises:
        ValueError: The site is no such module, b does not divide the channels of h, or an option is
            not known.

    References:
        Chen et al. 2022, arXiv:2208.07463; no biases, as in its formula. The authors' code
        (Hhhhhhao/Conv-Adapter) has biases, adds behind the ReLU after the 3x3 convolution of a
        Bottleneck, always with padding 1 and dilation 1, and its BasicBlock fails. Here the sum is
        at the site's output, and the geometry is the site's.

    Example:
        >>> import torch
        >>> layer = nn.Conv2d(8, 6, 3, stride=2, padding=1)
        >>> adapter = ConvAdapter(Site(channels=6, module=layer), bottleneck=4)
        >>> x = torch.randn(1, 8, 5, 5)
        >>> torch.equal(adapter(layer(x), x), layer(x)), sum(p.numel() for p in adapter.parameters())
        (True, 102)
    """

    reads = "input"
    formula = (
        "x + s up(act(down h)), down in b groups; in the sequential schemes of x in place of h"
    )
    size = "C_h k^2 + b C_out + C_out"
    starts = "identity (up = 0), or He-normal"
    source = "arXiv:2208.07463"

    def __init__(
        self,
        site: Site,
        bottleneck: int,
        *,
        scheme: str = "conv-parallel",
        activation: str = "relu",
        init: str = "identity",
    ) -> None:
        super().__init__()
        check_choice("scheme", scheme, _SCHEMES)
        check_choice("activation", activation, tuple(_ACTIVATIONS))
        check_choice("init", init, ("identity", "paper"))
        place = convolution_of(site) if scheme.startswith("conv") else _block_of(site)
        behind = scheme.endswith("sequential")
        if behind:
            self.reads = "output"
        transposed = not behind and isinstance(place, Convolution) and place.transposed
        self._cropped = site.spatial_dims if transposed else 0
        self.down = (
            _beside(place, site, bottleneck) if not behind else _behind(place, site, bottleneck)
        )
        self.act = _ACTIVATIONS[activation]()
        self.up = nn_class("Conv", site.spatial_dims)(bottleneck, site.channels, 1, bias=False)
        self.scale = nn.Parameter(torch.ones(site.channels, *[1] * site.spatial_dims))
        for convolution in (self.down, self.up):
            fan = convolution.out_channels * math.prod(convolution.kernel_size)
            nn.init.normal_(convolution.weight, std=(2 / fan) ** 0.5)
        if init == "identity":
            nn.init.zeros_(self.up.weight)

    @override
    def forward(self, output: Tensor, x: Tensor | None = None) -> Tensor:
        """Adapts a feature map, given the site's input too in the parallel schemes."""
        h = output if x is None else x
        hidden = self.act(cropped(self.down(h), output, self._cropped))
        change: Tensor = self.scale.to(output.dtype) * self.up(hidden)
        return output + change


def _beside(place: nn.Module, site: Site, width: int) -> Convolution:
    """Returns the convolution that meets a module's input so that its output has the size of the module's."""
    if isinstance(place, Convolution):
        return convolution_like(place, _divided(place.in_channels, width), width, width)
    shortcut = list(place.downsample.modules()) if isinstance(place.downsample, nn.Module) else []
    first = next((each for each in shortcut if isinstance(each, Convolution)), None)
    channels = site.channels if first is None else first.in_channels
    strides = [1] * site.spatial_dims
    for each in shortcut:
        if isinstance(
            each,
            Convolution
            | nn.AvgPool1d
            | nn.AvgPool2d
            | nn.AvgPool3d
            | nn.MaxPool1d
            | nn.MaxPool2d
            | nn.MaxPool3d,
        ):
            step = (
                each.stride
                if isinstance(each.stride, tuple)
                else (each.stride,) * site.spatial_dims
            )
            strides = [a * b for a, b in zip(strides, step, strict=True)]
    kind = nn_class("Conv", site.spatial_dims)
    down: Convolution = kind(
        _divided(channels, width), width, 3, stride=strides, padding=1, groups=width, bias=False
    )
    return down


def _behind(place: nn.Module, site: Site, width: int) -> Convolution:
    """Returns the convolution that keeps the size of a module's output."""
    options: dict[str, Any] = {"kernel_size": 3}
    if isinstance(place, Convolution):
        options = {
            "kernel_size": place.kernel_size,
            "dilation": place.dilation,
            "padding_mode": place.padding_mode,
        }
    kind = nn_class("Conv", site.spatial_dims)
    down: Convolution = kind(
        _divided(site.channels, width), width, padding="same", groups=width, bias=False, **options
    )
    return down


def _block_of(site: Site) -> nn.Module:
    """Returns the residual block at a site, which for a Sequential is its last module."""
    block = site.module
    while isinstance(block, nn.Sequential) and len(block) > 0:
        block = block[-1]
    if block is None or not hasattr(block, "downsample"):
        raise ValueError(
            "its residual schemes need a residual block: a module with a downsample, which may be "
            "None"
        )
    return block


def _divided(channels: int, width: int) -> int:
    """Returns a number of channels that has a width among its divisors."""
    if channels % width:
        divisors = [each for each in range(1, channels + 1) if channels % each == 0]
        near = [
            max((d for d in divisors if d < width), default=None),
            min((d for d in divisors if d > width), default=None),
        ]
        raise ValueError(
            f"its bottleneck must divide the {channels} channels that it reads, and {width} does "
            f"not: {' or '.join(str(each) for each in near if each is not None)} does"
        )
    return channels
