"""The `mona` family: a bottleneck with depthwise filters of three sizes."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from typing_extensions import override

from resadapt.adapters.family import Adapter, Site, check_choice, register_family
from resadapt.adapters.pointwise import pointwise

__all__ = ["MonaAdapter"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@register_family("mona")
class MonaAdapter(Adapter):
    """Mona, the multi-cognitive visual adapter: ``x + U gelu(h + P h)``.

    ``h = z + mean(DW3 z, DW5 z, DW7 z)`` and ``z = D(g1 LN(x) + g2 x)``. D, U and P map the
    channels at every position, LN normalizes over the channels of a position, and DWk are depthwise
    convolutions of kernel size k with zero padding that keep the size.
    2Cb + 5C + b^2 + (5 + 3^d + 5^d + 7^d)b parameters with d spatial dimensions.

    Details that the paper leaves open are those of the authors' code. g1 and g2 are vectors with a
    number per channel and start at 1e-6 and 1. LN is affine, dropout comes between gelu and U, all
    layers have a bias, and gelu is exact. Two defaults differ from the code. U and its bias start
    at zero, so that the adapter starts as the identity; the code keeps the PyTorch default
    (``"uniform"``). Dropout is 0.0, and 0.1 in the code. The code's width is 64. The code supports
    images only; here the convolutions have as many dimensions as the site.

    Args:
        site: A module that returns a feature map with 1 to 3 spatial dimensions.
        bottleneck: b, width of the hidden layer.
        dropout: Probability of dropping a hidden unit at a position in training, in [0, 1).
        init: ``"identity"`` starts U at zero; ``"uniform"`` keeps the PyTorch default. All other
            layers have the PyTorch default.

    Raises:
        ValueError: The site has no spatial dimensions or more than 3, or `init` has an unknown
            value.

    References:
        Yin et al. 2024, arXiv:2408.08345, and the code, Leiyi-Hu/mona (swin_transformer_mona.py).

    Example:
        >>> import torch
        >>> adapter = MonaAdapter(Site(channels=8), bottleneck=2)
        >>> x = torch.randn(1, 8, 5, 5)
        >>> torch.equal(adapter(x), x), sum(p.numel() for p in adapter.parameters())
        (True, 252)
    """

    formula = "x + U gelu(h + P h), h = z + mean(DW3 z, DW5 z, DW7 z), z = D(g1 LN(x) + g2 x)"
    size = "2Cb + 5C + b^2 + (5 + 3^d + 5^d + 7^d)b in d dimensions"
    starts = "identity (U = 0), or PyTorch default"
    source = "arXiv:2408.08345"

    def __init__(
        self, site: Site, bottleneck: int, *, dropout: float = 0.0, init: str = "identity"
    ) -> None:
        super().__init__()
        check_choice("init", init, ("identity", "uniform"))
        dims, channels = site.spatial_dims, site.channels
        if not 1 <= dims <= len(_CONVOLUTIONS):
            raise ValueError(f"it needs 1 to 3 spatial dimensions, not {dims}")
        convolution = _CONVOLUTIONS[dims - 1]
        self.norm = nn.LayerNorm(channels)
        self.norm_scale = nn.Parameter(torch.full((channels,), 1e-6))
        self.skip_scale = nn.Parameter(torch.ones(channels))
        self.down = pointwise(site, channels, bottleneck)
        self.filter3, self.filter5, self.filter7 = (
            convolution(bottleneck, bottleneck, size, padding=size // 2, groups=bottleneck)
            for size in (3, 5, 7)
        )
        self.mix = pointwise(replace(site, channel_dim=1), bottleneck, bottleneck)
        self.act = nn.GELU()
        self.dropout = nn.Dropout(dropout)
        self.up = pointwise(site, bottleneck, channels)
        if init == "identity":
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)  # type: ignore[arg-type]
        # Permutations: the norm and the scales need the channels in the last dimension, the
        # filters in dimension 1.
        stay = list(range(dims + 2))
        last, first = [0, *stay[2:], 1], [0, dims + 1, *stay[1:-1]]
        channels_first = site.channel_dim == 1
        self._to_norm = last if channels_first else stay
        self._from_norm = first if channels_first else stay
        self._to_filters = stay if channels_first else first
        self._from_filters = stay if channels_first else last

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Adapts a feature map ``[N, C, ...]`` or ``[N, ..., C]``; the shape does not change."""
        last = x.permute(self._to_norm)
        scaled = self.norm(last) * self.norm_scale + last * self.skip_scale
        z = self.down(scaled.permute(self._from_norm)).permute(self._to_filters)
        h = z + (self.filter3(z) + self.filter5(z) + self.filter7(z)) / 3
        hidden = self.dropout(self.act(h + self.mix(h)))
        correction: Tensor = self.up(hidden.permute(self._from_filters))
        return x + correction
