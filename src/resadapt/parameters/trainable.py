"""Trainable parameters: iterated, grouped for an optimizer, and counted."""

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
    """Iterates over the trainable parameters: the active set's adapters, head and private norms.

    Parameters of the set with ``requires_grad=False`` are left out. Parameters of the backbone are
    always left out, even with ``requires_grad=True``.

    Args:
        model: An injected model.

    Returns:
        An iterator over names, as in ``model.named_parameters()``, and parameters, without
        duplicates.

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
    """Iterates over the trainable parameters, as `named_trainable_parameters` without names.

    Args:
        model: An injected model.

    Returns:
        An iterator over parameters, without duplicates.

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
    by_ndim: bool = False,
) -> list[dict[str, Any]]:
    """Groups the trainable parameters for a torch optimizer.

    Args:
        model: An injected model.
        lr: Learning rate of the adapters.
        head_lr: Learning rate of the head; None means `lr`.
        norm_lr: Learning rate of the set's private norms; None means `lr`.
        weight_decay: Weight decay of all groups.
        decay_bias: Whether weight decay applies to biases and other one-dimensional parameters,
            such as norm weights.
        by_ndim: Whether parameters of different numbers of dimensions are in different groups. Each
            group then has the number as ``ndim``. `torch.optim.Muon` takes groups with 2 only.

    Returns:
        Groups with ``params``, ``lr``, ``weight_decay`` and ``name``, without empty groups,
        duplicate parameters or parameters of the backbone.

    Raises:
        AdapterError: A rate or decay is not a number >= 0.
        InjectionError: Nothing was injected.
        AdapterKeyError: No set is active, or all parameters of the set are frozen.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from resadapt import inject_adapters
        >>> model = inject_adapters(resnet18(num_classes=3), head="fc")
        >>> groups = parameter_groups(model, 1e-4, head_lr=5e-4, weight_decay=1e-4)
        >>> [(group["name"], group["lr"]) for group in groups]
        [('adapters', 0.0001), ('head', 0.0005)]
        >>> [group["name"] for group in parameter_groups(model, 1e-4, decay_bias=False)]
        ['adapters', 'adapters, no decay', 'head', 'head, no decay']
        >>> [group["name"] for group in parameter_groups(model, 1e-4, by_ndim=True)]
        ['adapters, 1-D', 'adapters, 2-D', 'head, 1-D', 'head, 2-D']
        >>> optimizer = torch.optim.AdamW(groups)
    """
    check_flag("decay_bias", decay_bias)
    check_flag("by_ndim", by_ndim)
    head_lr, norm_lr = (lr if rate is None else rate for rate in (head_lr, norm_lr))
    rates = {"lr": lr, "head_lr": head_lr, "norm_lr": norm_lr, "weight_decay": weight_decay}
    for name, value in rates.items():
        check_rate(name, value)
    members = _members(unwrap(model), ledger_of(model))
    groups: dict[str, dict[str, Any]] = {}
    for parameter in trainable_parameters(model):
        member = members[id(parameter)]
        decays = decay_bias or parameter.ndim > 1
        key = member + ("" if decays else ", no decay") + (f", {parameter.ndim}-D" * by_ndim)
        rate = {"adapters": lr, "head": head_lr, "norm": norm_lr}[member]
        decay = weight_decay if decays else 0.0
        group = {"params": [], "lr": rate, "weight_decay": decay, "name": key}
        group |= {"ndim": parameter.ndim} if by_ndim else {}
        groups.setdefault(key, group)["params"].append(parameter)
    if not groups:
        raise AdapterKeyError(
            "There are no trainable parameters: no set is active, or all its parameters have "
            "requires_grad=False. Call set_active_adapters(model, name), or requires_grad_(True) "
            "on the parameters to train."
        )
    return [groups[key] for key in sorted(groups)]


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters, each counted once.

    Args:
        total: All parameters of the model, with the adapters of every set.
        trainable: Parameters that require gradients.
        frozen: Parameters that do not require gradients.
        adapters: Parameters of the active set's adapters.
        head: Parameters of the active set's head.
        norm: Trainable parameters of the active set's private norms.
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
        model: Any model. Without an injection, the counts of adapters, head and norm are 0.

    Returns:
        The counts. ``trainable == adapters + head + norm`` if all parameters of the set and none of
        the backbone require gradients.

    Raises:
        AdapterError: The model has uninitialized lazy parameters.

    Example:
        >>> from torchvision.models import resnet18
        >>> from resadapt import inject_adapters
        >>> count = count_parameters(inject_adapters(resnet18(num_classes=3), head="fc"))
        >>> count.total, count.trainable, count.frozen, count.adapters, count.head, count.norm
        (11303686, 125635, 11178051, 124096, 1539, 0)
    """
    ledger, inner = find_ledger(model), unwrap(model)
    members = _members(inner, ledger) if ledger else {}
    if lazy := [name for name, parameter in _named(inner) if is_lazy(parameter)]:
        raise AdapterError(
            f"Parameter {lazy[0]!r} has no shape yet. Run the model once, then count."
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
    """Iterates over all parameters, even if the model overrides `named_parameters`."""
    return nn.Module.named_parameters(model)


def _members(model: nn.Module, ledger: Ledger) -> dict[int, str]:
    """Maps ids of the active set's tensors to ``"adapters"``, ``"head"`` or ``"norm"``.

    Tensors of norms that the norm policy does not train are left out.
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
