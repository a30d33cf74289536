"""The `pooled` family: a bottleneck on the channel means, added back to every position."""

from torch import Tensor, nn
from typing_extensions import override

from resadapt.adapters.family import Adapter, Site, check_choice, register_family

__all__ = ["PooledAdapter"]


@register_family("pooled")
class PooledAdapter(Adapter):
    """Residual adapter on globally pooled features: ``x + up(dropout(relu(down(mean(x)))))``.

    The mean runs over all spatial positions, the sum is broadcast over them. 2Cb + b + C
    parameters.

    Args:
        site: Any module with a feature map as its output.
        bottleneck: b, width of the hidden layer.
        dropout: Probability of dropping a hidden unit in training.
        init: ``"normal"`` draws all weights from N(0, 1e-3); ``"identity"`` starts ``up`` at zero,
            so that the adapter changes nothing until it is trained. Biases start at zero.

    Raises:
        ValueError: `init` is neither of the two.

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
        # Fixed here: a forward that asks a tensor for its number of dimensions cannot be traced by
        # torch.fx.
        first = 2 if site.channel_dim == 1 else 1
        self._positions = list(range(first, first + site.spatial_dims))
        self._vectors = [-1, channels]
        ones = [1] * site.spatial_dims
        self._broadcast = [-1, channels, *ones] if site.channel_dim == 1 else [-1, *ones, channels]
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=1e-3)
            nn.init.zeros_(linear.bias)
        if init == "identity":
            nn.init.zeros_(self.up.weight)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Adapts a feature map ``[N, C, ...]`` (or ``[N, ..., C]``) and returns one of the same shape."""
        pooled = x
        if len(self._positions) > 0:
            pooled = x.mean(self._positions, keepdim=True).reshape(
                self._vectors
            )  # quantized tensors need keepdim
        correction: Tensor = self.up(self.dropout(self.act(self.down(pooled))))
        return x + correction.reshape(self._broadcast)
