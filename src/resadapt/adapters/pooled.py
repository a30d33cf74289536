"""The `pooled` family: a bottleneck on the channel means, added to every position."""

from torch import Tensor, nn
from typing_extensions import override

from resadapt.adapters.family import Adapter, Site, check_choice, register_family
from resadapt.adapters.summing import Terms, concatenated

__all__ = ["PooledAdapter"]


@register_family("pooled")
class PooledAdapter(Adapter):
    """Residual adapter on globally pooled features: ``x + up(dropout(relu(down(mean(x)))))``.

    The mean is taken over all spatial positions, and the correction is broadcast over them.
    2Cb + b + C parameters.

    Args:
        site: Any module that returns a feature map.
        bottleneck: b, width of the hidden layer.
        dropout: Probability of dropping a hidden unit in training, in [0, 1).
        init: ``"normal"`` draws all weights from N(0, 1e-3), where 1e-3 is the standard deviation;
            ``"identity"`` starts ``up`` at zero, so that the adapter starts as the identity. Biases
            start at zero.

    Raises:
        ValueError: `init` has an unknown value.

    References:
        Experiment 11A of the codec study (docs: "The codec example"). Bottleneck adapters: Houlsby
        et al. 2019, arXiv:1902.00751; pooled channel statistics: Hu et al. 2018, arXiv:1709.01507.

    Example:
        >>> import torch
        >>> adapter = PooledAdapter(Site(channels=8), bottleneck=2, init="identity")
        >>> x = torch.randn(1, 8, 4, 4)
        >>> torch.equal(adapter(x), x)
        True
    """

    formula = "x + up(dropout(relu(down(mean x))))"
    size = "2Cb + b + C"
    starts = "weights N(0, 1e-3), or identity"
    source = "Experiment 11A of the codec study; arXiv:1902.00751"
    _positions: list[int]

    def __init__(
        self, site: Site, bottleneck: int, *, dropout: float = 0.1, init: str = "normal"
    ) -> None:
        super().__init__()
        check_choice("init", init, ("normal", "identity"))
        channels = site.channels
        self.down = nn.Linear(channels, bottleneck)
        self.act = nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(bottleneck, channels)
        # Set once, since torch.fx cannot trace a forward that reads x.ndim.
        first = 2 if site.channel_dim == 1 else 1
        self._positions = list(range(first, first + site.spatial_dims))
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=1e-3)
            nn.init.zeros_(linear.bias)
        if init == "identity":
            nn.init.zeros_(self.up.weight)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Adapts a feature map ``[N, C, ...]`` or ``[N, ..., C]``; the shape does not change."""
        pooled = x
        if len(self._positions) > 0:
            # keepdim=True, since quantized tensors have no other mean.
            pooled = x.mean(self._positions, keepdim=True).flatten(1)
        correction: Tensor = self.up(self.dropout(self.act(self.down(pooled))))
        for position in self._positions:
            correction = correction.unsqueeze(position)
        return x + correction

    @override
    def summed(self, terms: Terms) -> dict[str, Tensor]:
        """Returns the hidden units of all adapters, concatenated."""
        return concatenated(terms)
