"""The `ssf` family: a scale and a shift per channel."""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from typing_extensions import override

from resadapt.adapters.family import Adapter, Site, check_choice, register_family
from resadapt.adapters.folding import affine_tensors, swap_if_transposed
from resadapt.adapters.summing import Terms, weighted_sum

__all__ = ["SsfAdapter"]


@register_family("ssf")
class SsfAdapter(Adapter):
    """Scales and shifts every channel: ``gamma x + beta``.

    2C parameters. The authors draw both near the identity (``"normal"``); the default here is the
    exact identity. Under autocast the output has the dtype of the input, as for a BatchNorm.

    Args:
        site: Any module; every layer with a weight in the paper. Adapters can be folded into norms
            and convolutions with a bias.
        init: ``"identity"`` starts gamma at 1 and beta at 0; ``"normal"`` draws them with means 1
            and 0 and a standard deviation of 0.02.

    Raises:
        ValueError: `init` has an unknown value.

    References:
        Lian et al. 2022, arXiv:2210.08823, and the code, dongzelian/SSF.

    Example:
        >>> import torch
        >>> adapter = SsfAdapter(Site(channels=8))
        >>> x = torch.randn(1, 8, 4, 4)
        >>> torch.equal(adapter(x), x), sum(p.numel() for p in adapter.parameters())
        (True, 16)
    """

    formula = "gamma x + beta"
    size = "2C"
    starts = "identity (gamma = 1, beta = 0), or N(1, 0.02), N(0, 0.02)"
    source = "arXiv:2210.08823"

    def __init__(self, site: Site, *, init: str = "identity") -> None:
        super().__init__()
        check_choice("init", init, ("identity", "normal"))
        std = 0.0 if init == "identity" else 0.02
        self._place = replace(site, module=None)
        # Vectors, so that parameter_groups(decay_bias=False) excludes them from weight decay, which
        # would pull gamma to zero.
        self.gamma = nn.Parameter(torch.empty(site.channels).normal_(1.0, std))
        self.beta = nn.Parameter(torch.empty(site.channels).normal_(0.0, std))
        self._broadcast = [-1] + [1] * (site.spatial_dims if site.channel_dim == 1 else 0)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Adapts a feature map ``[N, C, ...]`` or ``[N, ..., C]``; the shape does not change."""
        return (x * self.gamma.reshape(self._broadcast) + self.beta.reshape(self._broadcast)).to(
            x.dtype
        )

    @override
    def folded(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Returns ``gamma W`` and ``gamma b + beta``.

        Raises:
            ValueError: The module has no weight, or beta is not zero and it has no bias.
        """
        weight, bias = affine_tensors(module, self._place)
        gamma, beta = self.gamma.to(weight.dtype), self.beta.to(weight.dtype)
        rows = swap_if_transposed(module, weight)
        scaled = swap_if_transposed(module, rows * gamma.reshape([-1] + [1] * (rows.ndim - 1)))
        if bias is not None:
            return scaled, gamma * bias + beta
        if beta.any():
            raise ValueError(
                f"{type(module).__name__} has no bias for beta: choose the norm after it as the "
                "site"
            )
        return scaled, None

    @override
    def summed(self, terms: Terms) -> dict[str, Tensor]:
        """Returns the sum of the tensors, with gamma summed as its difference from 1."""
        total = weighted_sum(terms)
        total["gamma"] = total["gamma"] + (1 - math.fsum(weight for weight, _ in terms))
        return total
