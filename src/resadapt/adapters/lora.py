"""The `lora` family: a low-rank change of a layer's weight, optionally with DoRA."""

import torch
from torch import Tensor, nn
from typing_extensions import override

from resadapt.adapters.convolutions import (
    Convolution,
    Layer,
    cropped,
    layer_of,
    nn_class,
    rows,
    weight_from,
)
from resadapt.adapters.family import Adapter, Site, check_choice, register_family
from resadapt.adapters.folding import weight_and_bias
from resadapt.adapters.own_forward import InputPadding, bypass_like, uses_parameters
from resadapt.adapters.summing import Terms, concatenated

__all__ = ["LoraAdapter"]


@register_family("lora")
class LoraAdapter(Adapter):
    """Low-rank change of a layer's weight: ``W x + alpha / r B(A x)``.

    A has the layer's kernel size, stride, padding, padding mode, dilation and groups, and maps the
    C_in channels to r channels in each group. B has the layer's groups and kernel size 1. So every
    rank works with every number of groups, and each group's change of weight has rank r. For a
    transposed convolution A is transposed too. r(C_in k^2 + C_out) parameters.

    With `dora` each row v of the changed weight is scaled to a learned norm:
    ``(|w| + magnitude) v / |v|``, where w is the frozen row and no gradient passes through ``|v|``.
    The parameter `magnitude` is the change of the norm and starts at zero. The gradient is the same
    as for the norm itself, the start is exact in every dtype, and weight decay pulls towards the
    backbone. A frozen row of zeros remains zero. C_out more parameters.

    Args:
        site: A convolution, also with a forward of its own, or a Linear.
        bottleneck: r, the rank.
        dropout: Probability of dropping an element of A's input in training, in [0, 1). The frozen
            layer's input has no dropout.
        alpha: The change is scaled by alpha / r; None means alpha = r.
        dora: Whether the norms of the weight's rows are learned too.
        init: ``"identity"`` draws A as torch initializes a layer, U(-1, 1) / sqrt(fan in);
            ``"normal"`` draws A with a standard deviation of 1 / r. B starts at zero in both, so
            that the adapter starts as the identity.

    Raises:
        ValueError: The site is neither a convolution nor a Linear, or `init` has an unknown value.

    References:
        Hu et al. 2021, arXiv:2106.09685; DoRA: Liu et al. 2024, arXiv:2402.09353. Outputs,
        gradients and merged weights equal those of PEFT for the geometries that PEFT supports.
        PEFT's magnitude is ``|w| + magnitude``, PEFT's ``"gaussian"`` is ``"normal"``. In DoRA with
        dropout, PEFT applies dropout to the frozen layer's input too.

    Example:
        >>> import torch
        >>> layer = nn.Conv2d(8, 6, 3, stride=2, groups=2, padding_mode="reflect", padding=1)
        >>> adapter = LoraAdapter(Site(channels=6, module=layer), bottleneck=3)
        >>> x = torch.randn(1, 8, 5, 5)
        >>> y = layer(x)
        >>> torch.equal(adapter(y, x), y), sum(p.numel() for p in adapter.parameters())
        (True, 234)
    """

    reads = "input"
    formula = "x + alpha/r B(A h); dora: the rows of W + alpha/r B A scaled to learned norms"
    size = "r(C_in k^2 + C_out); dora: + C_out"
    starts = "identity (B = 0)"
    source = "arXiv:2106.09685; dora: arXiv:2402.09353"

    def __init__(
        self,
        site: Site,
        bottleneck: int,
        *,
        dropout: float = 0.0,
        alpha: float | None = None,
        dora: bool = False,
        init: str = "identity",
    ) -> None:
        super().__init__()
        check_choice("init", init, ("identity", "normal"))
        layer = layer_of(site)
        self.scale, self._divided = (1.0, False) if alpha is None else (alpha / bottleneck, True)
        self.dropout = nn.Dropout(dropout)
        self.transposed = isinstance(layer, Convolution) and layer.transposed
        self._cropped = site.spatial_dims if self.transposed else 0
        self.down: Layer
        self.up: Layer
        self.pad: InputPadding | None = None
        if isinstance(layer, Convolution):
            self.groups, self._each_channel = layer.groups, [-1] + [1] * site.spatial_dims
            width = layer.groups * bottleneck
            self.pad, self.down = bypass_like(layer, layer.in_channels, width, layer.groups)
            self.up = nn_class("Conv", site.spatial_dims)(
                width, layer.out_channels, 1, groups=layer.groups, bias=False
            )
        else:
            self.groups, self._each_channel = 1, [-1]
            self.down = nn.Linear(layer.in_features, bottleneck, bias=False)
            self.up = nn.Linear(bottleneck, layer.out_features, bias=False)
        if dora:
            if isinstance(layer, Convolution) and not uses_parameters(layer):
                raise ValueError(
                    "dora=True needs a layer that convolves with its parameter weight, and this "
                    "layer computes another weight or changes the result: leave dora out"
                )
            self.reads = "weight"
        self.magnitude = nn.Parameter(torch.zeros(site.channels)) if dora else None
        if init == "normal":
            nn.init.normal_(self.down.weight, std=1 / bottleneck)
        else:
            bound = rows(self.down.weight, self.groups, self.transposed).shape[1] ** -0.5
            nn.init.uniform_(self.down.weight, -bound, bound)
        nn.init.zeros_(self.up.weight)

    @override
    def forward(
        self, output: Tensor, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """Adapts a layer's output, given the layer's input, and for DoRA its weight and bias."""
        x = self.dropout(x)
        if self.pad is not None:
            x = self.pad(x, output)
        change: Tensor = self.scale * self.up(cropped(self.down(x), output, self._cropped))
        magnitude = self.magnitude
        if magnitude is None:
            return output + change
        if weight is None:
            raise TypeError("DoRA reads the layer's weight: call adapter(output, x, weight, bias)")
        factor = self._factor(weight, magnitude).to(output.dtype).reshape(self._each_channel)
        linear = (
            output if bias is None else output - bias.to(output.dtype).reshape(self._each_channel)
        )
        return output + (factor - 1) * linear + factor * change

    def _change(self) -> Tensor:
        """Returns the low-rank change of the weight, as rows."""
        down = rows(self.down.weight, self.groups, self.transposed)
        up = self.up.weight.reshape(self.groups, -1, down.shape[0] // self.groups)
        changes = torch.bmm(up, down.reshape(self.groups, -1, down.shape[1]))
        change: Tensor = self.scale * changes.reshape(-1, down.shape[1])
        return change

    def _factor(self, weight: Tensor, magnitude: Tensor) -> Tensor:
        """Returns the factor that scales each changed row to the learned norm."""
        frozen = rows(weight.detach(), self.groups, self.transposed)
        changed = frozen + self._change().detach()
        norm = torch.linalg.vector_norm(changed, dim=1)
        factor: Tensor = (torch.linalg.vector_norm(frozen, dim=1) + magnitude) / (
            norm + (norm == 0)
        )
        return factor

    @override
    def folded(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Returns the layer's merged weight, and the bias unchanged."""
        weight, bias = weight_and_bias(module)
        changed = rows(weight, self.groups, self.transposed) + self._change()
        if self.magnitude is not None:
            changed = self._factor(weight, self.magnitude)[:, None] * changed
        return weight_from(changed, weight, self.groups, self.transposed), bias

    @override
    def summed(self, terms: Terms) -> dict[str, Tensor]:
        """Returns the ranks of all adapters, concatenated.

        Raises:
            ValueError: The adapter has learned norms (DoRA).
        """
        if self.magnitude is not None:
            raise ValueError("with dora=True the change is not a sum of low-rank changes")
        rank = self.up.weight.shape[1]
        # alpha / r of each adapter over that of this one
        scaled = [
            (weight * rank / each["up.weight"].shape[1] if self._divided else weight, each)
            for weight, each in terms
        ]
        if self.transposed:
            return concatenated(scaled, hidden_dim=1)
        return concatenated(scaled, self.groups)
