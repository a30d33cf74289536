"""The `series` family: a residual 1x1 convolution after the site's module."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from typing_extensions import override

from resadapt.adapters.family import Adapter, Site, check_choice, register_family
from resadapt.adapters.folding import affine_tensors, swap_if_transposed
from resadapt.adapters.pointwise import pointwise
from resadapt.adapters.summing import Terms, weighted_sum

__all__ = ["SeriesAdapter"]

_NORMS = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@register_family("series")
class SeriesAdapter(Adapter):
    """Series residual adapter: ``x + alpha x``, or ``x + alpha BN(x)``, with a pointwise alpha.

    C^2 parameters; with the norm C^2 + 2C.

    Papers and code differ: the papers write ``x + alpha x`` with BatchNorms around it; the authors'
    code computes ``BN(y + alpha BN(y))`` after each 3x3 convolution. The inner norm belongs to the
    adapter: option `batch_norm`. The outer norm is the backbone's norm after the site, which the
    set's norm policy controls. The default has no inner norm, so that the adapter is linear in
    training too. The code initializes alpha as every convolution (``"he"``), which changes the
    outputs of a pretrained network; it reports 80.17 % on CIFAR-100 with adapters in pretraining,
    and 70.97 % with adapters added to a pretrained network. The default here is the identity.

    Args:
        site: Any module; a convolution in the papers.
        batch_norm: Whether alpha reads ``BN(x)``, with a BatchNorm inside the adapter that uses
            batch statistics in training.
        init: ``"identity"`` starts alpha at zero; ``"he"`` draws alpha with a standard deviation of
            sqrt(2 / C).

    Raises:
        ValueError: The site has more than 3 spatial dimensions, or an option has an unknown value.

    References:
        Rebuffi et al. 2017, arXiv:1705.08045; Rebuffi et al. 2018, arXiv:1803.10082; their code,
        srebuffi/residual_adapters.

    Example:
        >>> import torch
        >>> adapter = SeriesAdapter(Site(channels=8))
        >>> x = torch.randn(1, 8, 5, 5)
        >>> torch.equal(adapter(x), x), sum(p.numel() for p in adapter.parameters())
        (True, 64)
    """

    formula = "x + alpha x, alpha a 1x1 convolution; with batch_norm x + alpha BN(x)"
    size = "C^2, with batch_norm C^2 + 2C"
    starts = "identity (alpha = 0), or alpha N(0, 2 / C)"
    source = "arXiv:1705.08045"

    def __init__(self, site: Site, *, batch_norm: bool = False, init: str = "identity") -> None:
        super().__init__()
        check_choice("init", init, ("identity", "he"))
        if not isinstance(batch_norm, bool):
            raise ValueError(f"batch_norm={batch_norm!r} is not known: use True or False")
        channels = site.channels
        self._place = replace(site, module=None)
        self.alpha = pointwise(site, channels, channels, bias=False)
        # BatchNorm needs the channels in dimension 1: for [N, ..., C] every position becomes a
        # sample.
        self._flat = batch_norm and site.channel_dim == -1
        self.norm = (
            _NORMS[0 if self._flat else site.spatial_dims](channels)
            if batch_norm
            else nn.Identity()
        )
        if init == "identity":
            nn.init.zeros_(self.alpha.weight)
        else:
            nn.init.normal_(self.alpha.weight, std=(2 / channels) ** 0.5)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Adapts a feature map ``[N, C, ...]`` or ``[N, ..., C]``; the shape does not change."""
        normed = self.norm(x.flatten(0, -2)).reshape(x.shape) if self._flat else self.norm(x)
        correction: Tensor = self.alpha(normed)
        return x + correction

    @override
    def folded(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Returns ``(I + alpha) W`` and ``(I + alpha) b``, with any norm merged into alpha.

        Raises:
            ValueError: The module does not mix channels, or has groups, or has no bias for the
                norm's shift.
        """
        weight, bias = affine_tensors(module, self._place)
        kind = type(module).__name__
        if weight.ndim == 1:
            raise ValueError(f"{kind} scales each channel by itself, and alpha mixes channels")
        if getattr(module, "groups", 1) > 1:
            raise ValueError(
                f"{kind} with {module.groups} groups computes an output channel from the inputs of "
                "its group, and alpha mixes channels of all groups"
            )
        alpha = self.alpha.weight.reshape(len(self.alpha.weight), -1).to(weight.dtype)
        shift = torch.zeros_like(alpha[0])
        if isinstance(self.norm, nn.modules.batchnorm._BatchNorm):
            mean, variance = map(self.norm.get_buffer, ("running_mean", "running_var"))
            scale = self.norm.weight * (variance + self.norm.eps).rsqrt()
            shift = alpha @ (self.norm.bias - mean * scale).to(weight.dtype)
            alpha = alpha * scale.to(weight.dtype)
        rows = swap_if_transposed(module, weight)
        mixed = swap_if_transposed(module, rows + (alpha @ rows.flatten(1)).reshape(rows.shape))
        if bias is not None:
            return mixed, bias + alpha @ bias + shift
        if shift.any():
            raise ValueError(f"{kind} has no bias for the shift of the adapter's norm")
        return mixed, None

    @override
    def summed(self, terms: Terms) -> dict[str, Tensor]:
        """Returns the sum of the tensors.

        Raises:
            ValueError: The adapter has a norm.
        """
        if isinstance(self.norm, nn.modules.batchnorm._BatchNorm):
            raise ValueError("one norm (batch_norm=True) cannot stand for two")
        return weighted_sum(terms)
