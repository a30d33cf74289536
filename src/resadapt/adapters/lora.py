"""The `lora` family.

A change of a layer's weight that has a low rank, and DoRA, which learns its norms besides.
"""

import torch
from torch import Tensor, nn
from typing_extensions import override

from resadapt.adapters.convolutions import (
    Convolution,
    Layer,
    convolution_like,
    cropped,
    layer_of,
    nn_class,
    rows,
    weight_and_bias,
    weight_from,
)
from resadapt.adapters.family import Adapter, Site, check_choice, register_family

__all__ = ["LoraAdapter"]


@register_family("lora")
class LoraAdapter(Adapter):
    """Low-rank change of a layer: ``W x + alpha / r B(A x)``, with A as the layer itself and B of
    one tap.

    A has the layer's kernel, stride, padding, padding mode, dilation and groups, from C_in channels
    to r in each group; B has its groups and one tap. So any rank goes with any number of groups,
    and each group's change of weight has rank r. The A of a transposed convolution is transposed.
    r(C_in k^2 + C_out) parameters.

    With `dora` each row v of the changed weight is scaled to a norm that is learned: ``(|w| +
    magnitude) v / |v|``, where w is the frozen row and no gradient passes through ``|v|``. What is
    learned is the change of the norm, which starts at zero: its gradient is that of the norm, the
    start is exact in every dtype, and weight decay draws to the backbone. A frozen row of zeros
    stays one. C_out more parameters.

    Args:
        site: A convolution or a Linear.
        bottleneck: r, the rank.
        dropout: Probability of dropping an element of what A is given, in training. The frozen
            layer's input is never dropped.
        alpha: The change is scaled by alpha / r; None for alpha = r, whatever the rank.
        dora: Whether the norms of the weight's rows are learned too.
        init: ``"identity"`` draws A as torch draws a layer, U(-1, 1) / sqrt(fan in); ``"normal"``
            draws it with standard deviation 1 / r. In both B starts at zero, so that the adapter
            changes nothing until it is trained.

    Raises:
        ValueError: The site is neither a convolution nor a Linear, or `init` is neither of the two.

    References:
        Hu et al. 2021, arXiv:2106.09685; DoRA: Liu et al. 2024, arXiv:2402.09353. Outputs,
        gradients and merged weights are PEFT's where it has the geometry; its magnitude is ``|w| +
        magnitude``, its start ``"gaussian"`` is ``"normal"``. In DoRA with dropout PEFT drops from
        the frozen layer's input too.

    Example:
        >>> import torch
        >>> layer = nn.Conv2d(8, 6, 3, stride=2, groups=2, padding_mode="reflect", padding=1)
        >>> adapter = LoraAdapter(Site(channels=6, module=layer), bottleneck=3)
        >>> x = torch.randn(1, 8, 5, 5)
        >>> torch.equal(adapter(layer(x), x), layer(x)), sum(p.numel() for p in adapter.parameters())
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
        self.scale = 1.0 if alpha is None else alpha / bottleneck
        self.dropout = nn.Dropout(dropout)
        self.transposed = isinstance(layer, Convolution) and layer.transposed
        self._cropped = site.spatial_dims if self.transposed else 0
        self.down: Layer
        self.up: Layer
        if isinstance(layer, Convolution):
            self.groups, self._each_channel = layer.groups, [-1] + [1] * site.spatial_dims
            width = layer.groups * bottleneck
            self.down = convolution_like(layer, layer.in_channels, width, layer.groups)
            self.up = nn_class("Conv", site.spatial_dims)(
                width, layer.out_channels, 1, groups=layer.groups, bias=False
            )
        else:
            self.groups, self._each_channel = 1, [-1]
            self.down = nn.Linear(layer.in_features, bottleneck, bias=False)
            self.up = nn.Linear(bottleneck, layer.out_features, bias=False)
        if dora:
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
        """Adapts a layer's output, given its input, and for DoRA its weight and bias."""
        x = self.dropout(x)
        change: Tensor = self.scale * self.up(cropped(self.down(x), output, self._cropped))
        magnitude = self.magnitude
        if weight is None or magnitude is None:
            return output + change
        factor = self._factor(weight, magnitude).to(output.dtype).reshape(self._each_channel)
        linear = (
            output if bias is None else output - bias.to(output.dtype).reshape(self._each_channel)
        )
        return output + (factor - 1) * linear + factor * change

    def _change(self) -> Tensor:
        """Returns the change of the weight's rows, without norms."""
        down = rows(self.down.weight, self.groups, self.transposed)
        up = self.up.weight.reshape(self.groups, -1, down.shape[0] // self.groups)
        changes = torch.bmm(up, down.reshape(self.groups, -1, down.shape[1]))
        change: Tensor = self.scale * changes.reshape(-1, down.shape[1])
        return change

    def _factor(self, weight: Tensor, magnitude: Tensor) -> Tensor:
        """Returns what each changed row is multiplied by to get its learned norm."""
        frozen = rows(weight.detach(), self.groups, self.transposed)
        changed = frozen + self._change().detach()
        norm = torch.linalg.vector_norm(changed, dim=1)
        factor: Tensor = (torch.linalg.vector_norm(frozen, dim=1) + magnitude) / (
            norm + (norm == 0)
        )
        return factor

    @override
    def folded(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Returns the layer's weight with the change in it, and its bias."""
        weight, bias = weight_and_bias(module)
        changed = rows(weight, self.groups, self.transposed) + self._change()
        if self.magnitude is not None:
            changed = self._factor(weight, self.magnitude)[:, None] * changed
        return weight_from(changed, weight, self.groups, self.transposed), bias
