"""The `bottleneck` family: a residual bottleneck at every position."""

from torch import Tensor, nn
from typing_extensions import override

from resadapt.adapters.family import Adapter, Site, check_choice, register_family
from resadapt.adapters.pointwise import pointwise
from resadapt.adapters.summing import Terms, concatenated

__all__ = ["BottleneckAdapter"]

_ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


@register_family("bottleneck")
class BottleneckAdapter(Adapter):
    """Bottleneck adapter at every position of a feature map: ``x + up(dropout(act(down(x))))``.

    2Cb + b + C parameters.

    Paper and code differ: the paper leaves the non-linearity open and draws the weights with a
    standard deviation of 1e-2; the code uses the tanh form of GELU and 1e-3. Both truncate at two
    standard deviations and start with zero biases. ``"normal"`` is N(0, 1e-3) without truncation,
    as in `pooled`. The default is the exact identity: `up` starts at zero, and `down` has He
    initialization, so that `up` gets a gradient of full size from the first step.

    Args:
        site: Any module that returns a feature map.
        bottleneck: b, width of the hidden layer.
        dropout: Probability of dropping a hidden unit at a position in training, in [0, 1).
        activation: The non-linearity: ``"relu"``, ``"gelu"`` (exact) or ``"silu"``.
        init: ``"identity"`` starts `up` at zero and draws `down` from N(0, 2 / C); ``"normal"``
            draws both weights from N(0, 1e-3), where 1e-3 is the standard deviation. Biases start
            at zero.

    Raises:
        ValueError: The site has more than 3 spatial dimensions, or an option has an unknown value.

    References:
        Houlsby et al. 2019, arXiv:1902.00751, and the code, google-research/adapter-bert; He et al.
        2015, arXiv:1502.01852.

    Example:
        >>> import torch
        >>> adapter = BottleneckAdapter(Site(channels=8), bottleneck=2)
        >>> x = torch.randn(1, 8, 4, 4)
        >>> torch.equal(adapter(x), x), sum(p.numel() for p in adapter.parameters())
        (True, 42)
    """

    formula = "x + up(dropout(act(down x))), at every position"
    size = "2Cb + b + C"
    starts = "identity (up = 0), or weights N(0, 1e-3)"
    source = "arXiv:1902.00751"

    def __init__(
        self,
        site: Site,
        bottleneck: int,
        *,
        dropout: float = 0.0,
        activation: str = "relu",
        init: str = "identity",
    ) -> None:
        super().__init__()
        check_choice("activation", activation, tuple(_ACTIVATIONS))
        check_choice("init", init, ("identity", "normal"))
        channels = site.channels
        self.down = pointwise(site, channels, bottleneck)
        self.act = _ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout)
        self.up = pointwise(site, bottleneck, channels)
        identity = init == "identity"
        nn.init.normal_(self.down.weight, std=(2 / channels) ** 0.5 if identity else 1e-3)
        nn.init.normal_(self.up.weight, std=0.0 if identity else 1e-3)
        for layer in (self.down, self.up):
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Adapts a feature map ``[N, C, ...]`` or ``[N, ..., C]``; the shape does not change."""
        correction: Tensor = self.up(self.dropout(self.act(self.down(x))))
        return x + correction

    @override
    def summed(self, terms: Terms) -> dict[str, Tensor]:
        """Returns the hidden units of all adapters, concatenated."""
        return concatenated(terms)
