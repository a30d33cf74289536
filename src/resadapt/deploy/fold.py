"""Linear adapters folded into the backbone's own tensors."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection

import torch
from torch import Tensor, nn

from resadapt.base.errors import AdapterError, quote_reasons
from resadapt.base.tensors import address
from resadapt.deploy.same_outputs import check_outputs
from resadapt.deploy.stock_copy import stock_copy
from resadapt.injection.ledger import ledger_of
from resadapt.injection.walk import backbone_tensors, find_module

__all__ = ["fold_adapters"]


def fold_adapters(model: nn.Module, name: str | None = None) -> nn.Module:
    """Returns a plain backbone that computes what the adapted one does, at no extra cost.

    Each adapter becomes a change of the weight and bias of the module at its site; the set's head
    and norms stand in their places. The names are those of the backbone, so the ``state_dict``
    loads into an untouched one with ``strict=True``. The changes are computed in float64 and
    rounded once: outputs differ from those of the adapted model, in evaluation, by rounding only,
    as both are run to see on an input made up for them. The live model stays as it is.

    Args:
        model: An injected model.
        name: The set; None is the active one.

    Returns:
        The backbone, in evaluation mode, with `requires_grad` as before the injection.

    Raises:
        InjectionError: Nothing was injected.
        AdapterKeyError: There is no such set.
        AdapterError: An adapter is not linear, or its site has no tensor that could take it up; the
            message names all of them. Or the outputs are others all the same.

    References:
        Rebuffi et al. 2018, arXiv:1803.10082; LoRA: Hu et al. 2021, arXiv:2106.09685.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from resadapt import inject_adapters
        >>> model = inject_adapters(resnet18(), "layer*.*.conv2", 4, family="lora", init="normal").eval()
        >>> folded, x = fold_adapters(model), torch.randn(1, 3, 64, 64)
        >>> torch.allclose(folded(x), model(x), atol=1e-4), list(folded.state_dict()) == list(resnet18().state_dict())
        (True, True)
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
            with torch.no_grad():
                changes[owner] = adapter.double().folded(copy.deepcopy(module).double())
            _check_shapes(module, changes[owner])
            _check_alone(module, copied.later_hooks[owner])
            for key, value in zip(("weight", "bias"), changes[owner], strict=True):
                if value is not None and uses[address(getattr(module, key))] > 1:
                    raise ValueError(f"another module has its {key} too")
        except Exception as error:  # a family of one's own may raise anything
            reason = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            refused[site_at[owner]] = f"({type(module).__name__}): {reason}"
    if refused:
        raise AdapterError(
            f"Adapters of family {adapter_set.spec.family!r} cannot be folded at "
            f"{quote_reasons(refused)}. resadapt.inference_copy(model) gives a model of plain "
            "modules with any adapters."
        )
    for owner, (weight, bias) in changes.items():
        module = find_module(copied.model, owner)
        for key, value in (("weight", weight), ("bias", bias)):
            if value is not None:
                tensor = getattr(
                    module, key
                )  # a parameter, or a buffer as FrozenBatchNorm2d has it
                tensor.data = value.to(tensor.dtype)
    for path, tensor in backbone_tensors(copied.model):
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(copied.requires_grad.get(path, tensor.requires_grad))
    check_outputs(model, adapter_set.spec.name, copied.model)
    return copied.model


def _check_shapes(module: nn.Module, changed: object) -> None:
    """Refuses what a family of one's own may return in place of a weight and a bias.

    Raises:
        ValueError: It is not a tuple of both, with the shapes that the module has.
    """
    there = tuple(getattr(module, key, None) for key in ("weight", "bias"))
    shapes = [None if tensor is None else tuple(tensor.shape) for tensor in there]
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
            f"folded returned {given}, where a weight and a bias of shapes {shapes} are to be "
            "changed"
        )


def _check_alone(module: nn.Module, later: Collection[int]) -> None:
    """Refuses a module whose adapter gets something else than what the module computes with its
    weight and bias.

    Raises:
        ValueError: Its forward was replaced, or a hook comes between it and the adapter.
    """
    if "forward" in module.__dict__:
        raise ValueError("its forward was replaced on the instance, by one that may do more")
    if set(module._forward_hooks) - set(later):
        raise ValueError(
            "it has forward hooks from before the injection, which may change what the adapter "
            "gets: remove them"
        )
