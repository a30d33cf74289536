"""The `parallel` family.

A convolution of one tap beside a convolution, which the centre of its kernel can take up.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from resadapt.adapters.convolutions import convolution_of, nn_class, paddings, weight_and_bias
from resadapt.adapters.family import Adapter, Site, check_choice, register_family

__all__ = ["ParallelAdapter"]

_PADS = {"reflect": "ReflectionPad", "replicate": "ReplicationPad", "circular": "CircularPad"}


@register_family("parallel")
class ParallelAdapter(Adapter):
    """Convolution of one tap beside a convolution: ``W x + alpha x``, with the site's stride and
    groups.

    It reads what lies under the centre of the site's kernel, tap ``(k - 1) // 2`` of each
    dimension, whatever the padding and its mode, the dilation and the kernel's size are. C_in C_out
    / groups parameters.

    Args:
        site: A convolution.
        init: ``"identity"`` starts at zero; ``"he"`` draws with variance 2 / C_out as the authors
            do, which is no identity.

    Raises:
        ValueError: The site is no convolution, or `init` is neither of the two.

    References:
        Rebuffi et al. 2018, arXiv:1803.10082. The authors' code (srebuffi/residual_adapters) sums
        before a BatchNorm that each task has for itself, and may drop channels of what alpha is
        given. Here norms are the set's policy, and nothing is dropped.

    Example:
        >>> import torch
        >>> layer = nn.Conv2d(8, 6, 3, stride=2, padding=1)
        >>> adapter = ParallelAdapter(Site(channels=6, module=layer))
        >>> x = torch.randn(1, 8, 5, 5)
        >>> torch.equal(adapter(layer(x), x), layer(x)), sum(p.numel() for p in adapter.parameters())
        (True, 48)
    """

    reads = "input"
    formula = "x + alpha h, alpha of one tap"
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
        self.pad = nn.Identity() if self.transposed else _pad(layer.padding_mode, around)
        self._first = [-left for left, _ in around]
        self._embedding = [
            side for k in reversed(layer.kernel_size) for side in ((k - 1) // 2, k // 2)
        ]
        kind = nn_class("ConvTranspose" if self.transposed else "Conv", dims)
        # A stride is a choice of positions. Left to the convolution, at few channels in
        # channels_last, its gradient destroys memory (torch 2.14 on the CPU: F.conv2d of [N, 3, 16,
        # 16] with one tap and stride 2).
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
        """Adapts a convolution's output, given its input."""
        x = self.pad(x)
        for dim, step in enumerate(self._steps):
            x = torch.ops.aten.slice(x, 2 + dim, None, None, step)
        change: Tensor = self.alpha(x)
        if self.transposed:  # each input's centre lies here and there in an output, whose size the call may have chosen
            sides: list[int] = []
            for dim in range(len(self._first) - 1, -1, -1):
                first = self._first[dim]
                sides += [first, output.shape[2 + dim] - change.shape[2 + dim] - first]
            change = F.pad(change, sides)
        return output + change

    @override
    def folded(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Returns the convolution's weight with alpha in its centre, and its bias."""
        weight, bias = weight_and_bias(module)
        return weight + F.pad(self.alpha.weight, self._embedding), bias


def _pad(mode: str, around: list[tuple[int, int]]) -> nn.Module:
    """Returns what pads each dimension in a mode, and crops it where a number is negative."""
    dims, sides = len(around), [side for pair in reversed(around) for side in pair]
    added, cropped = [max(side, 0) for side in sides], [min(side, 0) for side in sides]
    steps: list[Any] = []
    if any(added):
        steps.append(
            nn_class(_PADS[mode], dims)(added)
            if mode in _PADS
            else nn_class("ConstantPad", dims)(added, 0.0)
        )
    if any(cropped):
        steps.append(nn_class("ConstantPad", dims)(cropped, 0.0))
    return nn.Sequential(*steps) if steps else nn.Identity()
