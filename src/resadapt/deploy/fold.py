"""Linear adapters merged into the weights of the backbone."""

from __future__ import annotations

import warnings

from torch import nn

from resadapt.base.errors import AdapterError, AdapterWarning, quote_reasons
from resadapt.base.tensors import dtype_name
from resadapt.deploy.folded_weights import FoldedWeights
from resadapt.deploy.same_outputs import check_outputs, reference_for
from resadapt.deploy.stock_copy import stock_copy
from resadapt.injection.ledger import ledger_of
from resadapt.injection.private import convert
from resadapt.injection.walk import backbone_tensors, find_module

__all__ = ["fold_adapters"]


def fold_adapters(model: nn.Module, name: str | None = None) -> nn.Module:
    """Returns a stock backbone with the adapters of a set merged into its weights.

    Each adapter is merged into the weight and bias of the module at the site, and the set's head
    and norms replace those of the backbone. Inference costs the same as for the backbone. The names
    are those of the backbone, so an uninjected backbone loads the ``state_dict`` with
    ``strict=True``. The merged weights are computed in float64 and rounded once, to the backbone's
    dtype. In evaluation mode the outputs equal those of the injected model up to rounding, which is
    checked on a generated input. The live model does not change.

    Rounding changes a weight by at most 2^-8 of it in bfloat16, 2^-11 in float16 and 2^-24 in
    float32. Where that is more than a tenth of what an adapter changes, a warning tells how much.

    Args:
        model: An injected model.
        name: Name of the set; None means the active set.

    Returns:
        The backbone, in evaluation mode, with `requires_grad` as before the injection.

    Raises:
        InjectionError: Nothing was injected.
        AdapterKeyError: There is no such set.
        AdapterError: Adapters are not linear, or cannot be merged into the modules at their sites;
            the message lists all of them. Or the outputs differ after the merge.

    References:
        Rebuffi et al. 2018, arXiv:1803.10082; LoRA: Hu et al. 2021, arXiv:2106.09685.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from resadapt import inject_adapters
        >>> model = inject_adapters(resnet18(), "layer*.*.conv2", 4, family="lora").eval()
        >>> folded, x = fold_adapters(model), torch.randn(1, 3, 64, 64)
        >>> torch.allclose(folded(x), model(x), atol=1e-4)
        True
        >>> folded.state_dict().keys() == resnet18().state_dict().keys()
        True
    """
    spec = ledger_of(model).chosen(name).spec
    copied = stock_copy(model, spec.name)
    weights = FoldedWeights(copied.model)
    site_at = {site.owner: site.name for site in spec.sites}
    if refused := weights.fold_adapters(copied):
        reasons = {site_at[owner]: reason for owner, reason in refused.items()}
        raise AdapterError(
            f"Adapters of family {spec.family!r} cannot be folded at {quote_reasons(reasons)}. "
            "resadapt.inference_copy(model) keeps the adapters as stock modules, for any family."
        )
    for path, replaced in copied.replaced.items():
        convert(find_module(copied.model, path), replaced)
    if losses := {
        f"{site}.{key}": f"loses {loss:.0%} of its change in {dtype_name(dtype)}"
        for owner, site in site_at.items()
        for key, dtype, loss in weights.losses(find_module(copied.model, owner))
        if loss > _LARGE_LOSS
    }:
        warnings.warn(
            "The backbone's dtype is too coarse for what the adapters change: "
            f"{quote_reasons(losses)}. Fold in a wider dtype, "
            "fold_adapters(copy.deepcopy(model).float()), or keep the adapters apart, "
            "inference_copy(model).",
            AdapterWarning,
            stacklevel=2,
        )
    weights.write()
    for path, tensor in backbone_tensors(copied.model):
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(copied.requires_grad.get(path, tensor.requires_grad))
    check_outputs(reference_for(model, spec.name), copied.model)
    return copied.model


_LARGE_LOSS = 0.1
"""Part of an adapter's change from which on a loss by rounding gives a warning."""
