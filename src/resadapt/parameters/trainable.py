"""Which parameters are trained.

Iterating, grouping for an optimizer, counting, and a table of it all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from resadapt.base.errors import AdapterError, AdapterKeyError, check_flag, check_rate
from resadapt.injection.ledger import Ledger, adapter_tensors, find_ledger, ledger_of
from resadapt.injection.private import private_tensors
from resadapt.injection.walk import unwrap

__all__ = [
    "ParameterCount",
    "count_parameters",
    "named_trainable_parameters",
    "parameter_groups",
    "trainable_parameters",
]


def named_trainable_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Walks the parameters to train: the active set's adapters and head.

    A parameter that was frozen by hand is left out; one of the backbone is never in, whatever its
    `requires_grad` says.

    Args:
        model: An injected model.

    Returns:
        An iterator over names, as in ``model.named_parameters()``, and parameters, each parameter
        once.

    Raises:
        InjectionError: Nothing was injected.

    Example:
        >>> from torchvision.models import resnet18
        >>> from resadapt import inject_adapters
        >>> model = inject_adapters(resnet18(), "layer4", 8)
        >>> [name for name, _ in named_trainable_parameters(model)][0]
        'layer4.1.resadapt.default.down.weight'
    """
    inner = unwrap(model)
    members = _members(inner, ledger_of(model))
    return ((name, p) for name, p in _named(inner) if p.requires_grad and id(p) in members)


def trainable_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Walks the parameters to train, as `named_trainable_parameters` without the names.

    Args:
        model: An injected model.

    Returns:
        An iterator over parameters, each once.

    Raises:
        InjectionError: Nothing was injected.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from resadapt import inject_adapters
        >>> model = inject_adapters(resnet18())
        >>> optimizer = torch.optim.AdamW(trainable_parameters(model), lr=1e-4)
    """
    return (parameter for _, parameter in named_trainable_parameters(model))


def parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    head_lr: float | None = None,
    norm_lr: float | None = None,
    weight_decay: float = 0.0,
    decay_bias: bool = True,
) -> list[dict[str, Any]]:
    """Sorts the parameters to train into groups for any torch optimizer.

    Args:
        model: An injected model.
        lr: Learning rate of the adapters.
        head_lr: Learning rate of the head; None is the adapters'.
        norm_lr: Learning rate of norms of the set's own; None is the adapters'.
        weight_decay: Weight decay of all groups.
        decay_bias: Whether biases and other one-dimensional parameters (norm weights) decay too.

    Returns:
        Groups with ``params``, ``lr``, ``weight_decay`` and ``name``; no empty group, no parameter
        twice, none of the backbone.

    Raises:
        AdapterError: A rate or decay is not a number, 0 or more.
        InjectionError: Nothing was injected.
        AdapterKeyError: No set is active, or everything in it is frozen.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from resadapt import inject_adapters
        >>> model = inject_adapters(resnet18(num_classes=3), head="fc")
        >>> groups = parameter_groups(model, 1e-4, head_lr=5e-4, weight_decay=1e-4, decay_bias=False)
        >>> [(group["name"], group["lr"]) for group in groups]
        [('adapters', 0.0001), ('adapters, no decay', 0.0001), ('head', 0.0005), ('head, no decay', 0.0005)]
        >>> optimizer = torch.optim.AdamW(groups)
    """
    check_flag("decay_bias", decay_bias)
    for name, value in (
        ("lr", lr),
        ("head_lr", head_lr),
        ("norm_lr", norm_lr),
        ("weight_decay", weight_decay),
    ):
        if value is not None or name in ("lr", "weight_decay"):
            check_rate(name, value)
    members = _members(unwrap(model), ledger_of(model))
    groups: dict[str, dict[str, Any]] = {}
    for parameter in trainable_parameters(model):
        member = members[id(parameter)]
        decays = decay_bias or parameter.ndim > 1
        key = member + ("" if decays else ", no decay")
        rate = {
            "adapters": lr,
            "head": lr if head_lr is None else head_lr,
            "norm": lr if norm_lr is None else norm_lr,
        }[member]
        group = {
            "params": [],
            "lr": rate,
            "weight_decay": weight_decay if decays else 0.0,
            "name": key,
        }
        groups.setdefault(key, group)["params"].append(parameter)
    if not groups:
        raise AdapterKeyError(
            "There is no parameter to train: no set is active, or all of it was frozen by hand. "
            "Call set_active_adapters(model, name), or requires_grad_(True) on what you want to "
            "train."
        )
    return [groups[key] for key in sorted(groups)]


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters, each counted once.

    Args:
        total: All of the model, the adapters of every set included.
        trainable: Those that require gradients.
        frozen: The others.
        adapters: Those of the active set's adapters.
        head: Those of the active set's head.
        norm: Those that are trained in norms of the active set's own.
    """

    total: int
    trainable: int
    frozen: int
    adapters: int
    head: int
    norm: int = 0


def count_parameters(model: nn.Module) -> ParameterCount:
    """Counts a model's parameters.

    Args:
        model: Any model. One that was not injected into has no adapters and no head.

    Returns:
        The counts. If the backbone is frozen and the set is not, ``trainable == adapters + head +
        norm``.

    Raises:
        AdapterError: The model has parameters without a size yet.

    Example:
        >>> from torchvision.models import resnet18
        >>> from resadapt import inject_adapters
        >>> count_parameters(inject_adapters(resnet18(num_classes=3), head="fc"))
        ParameterCount(total=11302147, trainable=125635, frozen=11176512, adapters=124096, head=1539, norm=0)
    """
    ledger, inner = find_ledger(model), unwrap(model)
    members = _members(inner, ledger) if ledger else {}
    if lazy := [name for name, parameter in _named(inner) if is_lazy(parameter)]:
        raise AdapterError(
            f"Parameter {lazy[0]!r} has no size yet. Run the model once, then count."
        )
    parameters = [parameter for _, parameter in _named(inner)]
    total = sum(p.numel() for p in parameters)
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return ParameterCount(
        total=total,
        trainable=trainable,
        frozen=total - trainable,
        **{
            kind: sum(p.numel() for p in parameters if members.get(id(p)) == kind)
            for kind in ("adapters", "head", "norm")
        },
    )


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Walks all parameters, even if the model has a `named_parameters` of its own that hides some."""
    return nn.Module.named_parameters(model)


def _members(model: nn.Module, ledger: Ledger) -> dict[int, str]:
    """Tells of the active set's tensors, by their identities, whether they are of its adapters, its
    head or its norms.

    What its norm policy does not train of a norm is of none of them.
    """
    if ledger.active_set is None:
        return {}
    spec = ledger.active_set.spec
    members = dict.fromkeys((id(tensor) for _, tensor in adapter_tensors(model, spec)), "adapters")
    members |= dict.fromkeys(
        (id(tensor) for tensor in private_tensors(model, spec, spec.head).values()), "head"
    )
    trained = (
        tensor
        for tensor in private_tensors(model, spec, spec.norms).values()
        if "affine" in spec.norm
    )
    return members | dict.fromkeys((id(tensor) for tensor in trained), "norm")
