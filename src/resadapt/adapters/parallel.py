"""The `parallel` family: a 1x1 convolution parallel to a convolution, foldable into its kernel."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from resadapt.adapters.convolutions import convolution_of, nn_class, paddings
from resadapt.adapters.family import Adapter, Site, check_choice, register_family
from resadapt.adapters.folding import weight_and_bias
from resadapt.adapters.own_forward import input_padding
from resadapt.adapters.summing import Terms, weighted_sum

__all__ = ["ParallelAdapter"]

_PADS = {"reflect": "ReflectionPad", "replicate": "ReplicationPad", "circular": "CircularPad"}


@register_family("parallel")
class ParallelAdapter(Adapter):
    """Convolution of kernel size 1 parallel to a convolution: ``W x + alpha x``.

    alpha has the site's stride and groups, and reads the position under the centre of the site's
    kernel: tap ``(k - 1) // 2`` of each dimension, for every kernel size, dilation, padding and
    padding mode. C_in C_out / groups parameters.

    Args:
        site: A convolution, also with a forward of its own.
        init: ``"identity"`` starts alpha at zero; ``"he"`` draws alpha with variance 2 / C_out as
            the authors do, so that the adapter does not start as the identity.

    Raises:
        ValueError: The site is not a convolution, or `init` has an unknown value.

    References:
        Rebuffi et al. 2018, arXiv:1803.10082. The authors' code (srebuffi/residual_adapters) adds
        before a BatchNorm of which each task has a private copy, and can apply dropout to alpha's
        input. In this library the set's norm policy controls norms, and there is no dropout.

    Example:
        >>> import torch
        >>> layer = nn.Conv2d(8, 6, 3, stride=2, padding=1)
        >>> adapter = ParallelAdapter(Site(channels=6, module=layer))
        >>> x = torch.randn(1, 8, 5, 5)
        >>> y = layer(x)
        >>> torch.equal(adapter(y, x), y), sum(p.numel() for p in adapter.parameters())
        (True, 48)
    """

    reads = "input"
    formula = "x + alpha h, alpha of kernel size 1"
    size = "C_in C_out / groups"
    starts = "identity (alpha = 0), or He-normal"
    source = "arXiv:1803.10082"

    def __init__(self, site: Site, *, init: str = "identity") -> None:
        super().__init__()
        check_choice("init", init, ("identity", "he"))
        layer = convolution_of(site)
        dims, self.transposed = len(layer.kernel_size), layer.transposed
        spans = [
            (d * ((k - 1) // 2), d * (k // 2))
            for k, d in zip(layer.kernel_size, layer.dilation, strict=True)
        ]
        around = [
            (left - before, right - behind)
            for (left, right), (before, behind) in zip(paddings(layer), spans, strict=True)
        ]
        self.own_pad = input_padding(layer, one_tap=True)
        declared = self.own_pad is None and not self.transposed
        self.pad = _pad(layer.padding_mode, around) if declared else nn.Identity()
        self._first = [-left for left, _ in around]
        self._embedding = [
            side for k in reversed(layer.kernel_size) for side in ((k - 1) // 2, k // 2)
        ]
        kind = nn_class("ConvTranspose" if self.transposed else "Conv", dims)
        # The stride is a slice of the input. With the stride in the convolution, the backward pass
        # corrupts memory for few channels in channels_last (torch 2.14 on the CPU, F.conv2d of
        # [N, 3, 16, 16] with kernel size 1 and stride 2).
        stride, self._steps = (
            (layer.stride, [1] * dims) if self.transposed else (1, list(layer.stride))
        )
        self.alpha = kind(
            layer.in_channels, layer.out_channels, 1, stride=stride, groups=layer.groups, bias=False
        )
        if init == "he":
            nn.init.normal_(self.alpha.weight, std=(2 / layer.out_channels) ** 0.5)
        else:
            nn.init.zeros_(self.alpha.weight)

    @override
    def forward(self, output: Tensor, x: Tensor) -> Tensor:
        """Adapts a convolution's output, given the convolution's input."""
        x = self.pad(x)
        if self.own_pad is not None:
            x = self.own_pad(x, output)
        for dim, step in enumerate(self._steps):
            x = torch.ops.aten.slice(x, 2 + dim, None, None, step)
        change: Tensor = self.alpha(x)
        if self.transposed:  # pads to the output's size, which each call may choose
            sides: list[int] = []
            for dim in range(len(self._first) - 1, -1, -1):
                first = self._first[dim]
                sides += [first, output.shape[2 + dim] - change.shape[2 + dim] - first]
            change = F.pad(change, sides)
        return output + change

    @override
    def folded(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Returns the convolution's weight with alpha added at the centre, and the bias."""
        weight, bias = weight_and_bias(module)
        return weight + F.pad(self.alpha.weight, self._embedding), bias

    @override
    def summed(self, terms: Terms) -> dict[str, Tensor]:
        """Returns the sum of the tensors."""
        return weighted_sum(terms)


def _pad(mode: str, around: list[tuple[int, int]]) -> nn.Module:
    """Returns a module that pads each dimension, and crops it where a number is negative."""
    dims, sides = len(around), [side for pair in reversed(around) for side in pair]
    added, cropped = [max(side, 0) for side in sides], [min(side, 0) for side in sides]
    steps: list[Any] = []
    if any(added):
        kind, value = (_PADS[mode], ()) if mode in _PADS else ("ConstantPad", (0.0,))
        steps.append(nn_class(kind, dims)(added, *value))
    if any(cropped):
        steps.append(nn_class("ConstantPad", dims)(cropped, 0.0))
    return nn.Sequential(*steps) if steps else nn.Identity()
