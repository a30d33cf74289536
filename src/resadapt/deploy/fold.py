"""Linear adapters merged into the weights of the backbone."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Collection

import torch
from torch import Tensor, nn

from resadapt.base.errors import AdapterError, AdapterWarning, quote_reasons
from resadapt.base.tensors import address, dtype_name
from resadapt.deploy.same_outputs import check_outputs
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
    adapter_set = ledger_of(model).chosen(name)
    copied = stock_copy(model, adapter_set.spec.name)
    site_at = {site.owner: site.name for site in adapter_set.spec.sites}
    changes: dict[str, tuple[Tensor, Tensor | None]] = {}
    refused = {}
    uses = Counter(address(tensor) for _, tensor in backbone_tensors(copied.model))
    for owner, adapter in copied.adapters.items():
        module = find_module(copied.model, owner)
        try:
            _check_not_altered(module, copied.later_hooks[owner])
            with torch.no_grad():
                changes[owner] = adapter.double().folded(copy.deepcopy(module).double())
            _check_shapes(module, changes[owner])
            for key, value in zip(("weight", "bias"), changes[owner], strict=True):
                if value is not None and uses[address(getattr(module, key))] > 1:
                    raise ValueError(f"its {key} is shared with another module")
        except Exception as error:  # custom families may raise anything
            reason = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            refused[site_at[owner]] = f"({type(module).__name__}): {reason}"
    if refused:
        raise AdapterError(
            f"Adapters of family {adapter_set.spec.family!r} cannot be folded at "
            f"{quote_reasons(refused)}. resadapt.inference_copy(model) keeps the adapters as stock "
            "modules, for any family."
        )
    for path, replaced in copied.replaced.items():
        convert(find_module(copied.model, path), replaced)
    losses = {}
    for owner, (weight, bias) in changes.items():
        module = find_module(copied.model, owner)
        for key, value in (("weight", weight), ("bias", bias)):
            if value is not None:
                tensor = getattr(module, key)  # a parameter, or a buffer of FrozenBatchNorm2d
                rounded = value.to(tensor.dtype)
                if (loss := _loss(tensor, value, rounded)) > _LARGE_LOSS:
                    losses[f"{site_at[owner]}.{key}"] = (
                        f"loses {loss:.0%} of its change in {dtype_name(tensor)}"
                    )
                tensor.data = rounded
    if losses:
        warnings.warn(
            "The backbone's dtype is too coarse for what the adapters change: "
            f"{quote_reasons(losses)}. Fold in a wider dtype, "
            "fold_adapters(copy.deepcopy(model).float()), or keep the adapters apart, "
            "inference_copy(model).",
            AdapterWarning,
            stacklevel=2,
        )
    for path, tensor in backbone_tensors(copied.model):
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(copied.requires_grad.get(path, tensor.requires_grad))
    check_outputs(model, adapter_set.spec.name, copied.model)
    return copied.model


_LARGE_LOSS = 0.1
"""Part of an adapter's change from which on a loss by rounding gives a warning."""


@torch.no_grad()
def _loss(tensor: Tensor, changed: Tensor, rounded: Tensor) -> float:
    """Returns what rounding a changed tensor costs, as a fraction of the change."""
    change = float((changed - tensor).norm())
    if change <= 1e-12 * float(changed.norm()):  # float64 rounding alone
        return 0.0
    return float((changed - rounded).norm()) / change


def _check_shapes(module: nn.Module, changed: object) -> None:
    """Checks the result of `folded`, since custom families may return anything.

    Raises:
        ValueError: The result is not a tuple of weight and bias with the module's shapes.
    """
    current = [getattr(module, key, None) for key in ("weight", "bias")]
    shapes = [None if tensor is None else tuple(tensor.shape) for tensor in current]
    given = (
        [tuple(part.shape) if isinstance(part, Tensor) else part for part in changed]
        if isinstance(changed, tuple)
        else changed
    )
    if (
        not isinstance(given, list)
        or len(given) != 2
        or given[0] != shapes[0]
        or given[1] not in (None, shapes[1])
    ):
        raise ValueError(
            f"folded returned {given}, expected a weight and a bias of shapes {shapes}"
        )


def _check_not_altered(module: nn.Module, later: Collection[int]) -> None:
    """Checks that the adapter reads the module's output as computed from weight and bias.

    Raises:
        ValueError: The module's forward was replaced, or a hook runs before the adapter.
    """
    if "forward" in module.__dict__:
        raise ValueError("its forward was replaced on the instance, and may compute something else")
    if set(module._forward_hooks) - set(later):
        raise ValueError(
            "it has forward hooks from before the injection, which may change the adapter's input: "
            "remove them"
        )
