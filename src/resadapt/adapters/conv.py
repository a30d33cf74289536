"""The `conv` family: a grouped and a pointwise convolution, parallel or sequential to the site."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from resadapt.adapters.convolutions import (
    Convolution,
    convolution_of,
    cropped,
    nn_class,
)
from resadapt.adapters.family import Adapter, Site, check_choice, register_family
from resadapt.adapters.own_forward import InputPadding, bypass_like

__all__ = ["ConvAdapter"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}
_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_STRIDED: Any = (Convolution, *_POOLS)
_SCHEMES = ("conv-parallel", "conv-sequential", "residual-parallel", "residual-sequential")


@register_family("conv")
class ConvAdapter(Adapter):
    """Conv-Adapter: ``y + s up(act(down(h)))``, with a grouped `down` and a pointwise `up`.

    In the parallel schemes h is the site's input, in the sequential schemes the site's output y.
    `down` is a convolution to b channels in b groups, so b divides the number of channels C_h of h.
    `up` has kernel size 1. C_h k^2 + b C_out + C_out parameters.

    Args:
        site: A convolution, also with a forward of its own; for the residual schemes a block with a
            `downsample` attribute.
        bottleneck: b, number of hidden channels; C_h / gamma in the paper.
        scheme: ``"conv-parallel"``: `down` has the kernel size, stride, padding and dilation of the
            site's convolution. ``"conv-sequential"``: the kernel size and dilation of the site's
            convolution, stride 1. ``"residual-parallel"``: kernel size 3, the strides of the
            block's `downsample`. ``"residual-sequential"``: kernel size 3, stride 1.
        activation: ``"relu"``, ``"gelu"`` or ``"silu"``.
        init: ``"identity"`` starts `up` at zero, so that the adapter starts as the identity;
            ``"paper"`` draws `down` and `up` as the authors' ResNet does, with variance
            2 / (C_out k^2). s starts at one.

    Raises:
        ValueError: The site is not such a module, b does not divide the channels of h, or an option
            has an unknown value.

    References:
        Chen et al. 2022, arXiv:2208.07463; without biases, as in the paper's formula. The authors'
        code (Hhhhhhao/Conv-Adapter) has biases, and adds after the ReLU that follows the 3x3
        convolution of a Bottleneck, always with padding 1 and dilation 1; the authors' BasicBlock
        fails. This implementation adds at the site's output and uses the site's geometry.

    Example:
        >>> import torch
        >>> layer = nn.Conv2d(8, 6, 3, stride=2, padding=1)
        >>> adapter = ConvAdapter(Site(channels=6, module=layer), bottleneck=4)
        >>> x = torch.randn(1, 8, 5, 5)
        >>> y = layer(x)
        >>> torch.equal(adapter(y, x), y), sum(p.numel() for p in adapter.parameters())
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
        self._parallel = not behind
        if behind:
            self.reads = "output"
        transposed = not behind and isinstance(place, Convolution) and place.transposed
        self._cropped = site.spatial_dims if transposed else 0
        self.pad: InputPadding | None = None
        if behind:
            self.down = _behind(place, site, bottleneck)
        elif isinstance(place, Convolution):
            channels = _divided(place.in_channels, bottleneck)
            self.pad, self.down = bypass_like(place, channels, bottleneck, bottleneck)
        else:
            self.down = _beside(place, site, bottleneck)
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
        """Adapts the site's output; x is the site's input, in the parallel schemes only."""
        if (x is not None) != self._parallel:
            raise TypeError(
                "The parallel schemes read the site's input: call adapter(output, x). The "
                "sequential schemes do not: call adapter(output)."
            )
        h = output if x is None else x
        if self.pad is not None:
            h = self.pad(h, output)
        hidden = self.act(cropped(self.down(h), output, self._cropped))
        change: Tensor = self.scale.to(output.dtype) * self.up(hidden)
        return output + change


def _beside(place: nn.Module, site: Site, width: int) -> Convolution:
    """Returns a grouped convolution of a block's input, with the block's output size."""
    shortcut = list(place.downsample.modules()) if isinstance(place.downsample, nn.Module) else []
    first = next((each for each in shortcut if isinstance(each, Convolution)), None)
    channels = site.channels if first is None else first.in_channels
    strides = [1] * site.spatial_dims
    for each in shortcut:
        if isinstance(each, _STRIDED):
            step = each.stride
            step = step if isinstance(step, tuple) else (step,) * site.spatial_dims
            strides = [a * b for a, b in zip(strides, step, strict=True)]
    kind = nn_class("Conv", site.spatial_dims)
    down: Convolution = kind(
        _divided(channels, width), width, 3, stride=strides, padding=1, groups=width, bias=False
    )
    return down


def _behind(place: nn.Module, site: Site, width: int) -> Convolution:
    """Returns a grouped convolution of a module's output that keeps the output size."""
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
    """Returns the residual block at a site; for a Sequential, the last module in it."""
    block = site.module
    while isinstance(block, nn.Sequential) and len(block) > 0:
        block = block[-1]
    if block is None or not hasattr(block, "downsample"):
        raise ValueError(
            "the residual schemes need a residual block: a module with an attribute downsample, "
            "which may be None"
        )
    return block


def _divided(channels: int, width: int) -> int:
    """Returns the number of channels if the width divides it, else raises ValueError."""
    if channels % width:
        divisors = [each for each in range(1, channels + 1) if channels % each == 0]
        near = [
            max((d for d in divisors if d < width), default=None),
            min((d for d in divisors if d > width), default=None),
        ]
        raise ValueError(
            f"bottleneck must divide the {channels} channels that the adapter reads, and {width} "
            f"does not: use {' or '.join(str(each) for each in near if each is not None)}"
        )
    return channels
