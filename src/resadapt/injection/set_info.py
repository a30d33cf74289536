"""What is injected where."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from resadapt.base.spec import SiteSpec
from resadapt.injection.heads import head_tensors
from resadapt.injection.ledger import adapter_tensors, find_ledger
from resadapt.injection.walk import unwrap

__all__ = ["AdapterSetInfo", "list_adapters"]


@dataclass(frozen=True)
class AdapterSetInfo:
    """What one set is and holds.

    Args:
        name: Name of the set.
        active: Whether the model runs with it now.
        family: Kind of adapter.
        sites: Each site with its channels and bottleneck.
        head: Names of the modules trained with it.
        norm: Norm policy.
        adapter_parameters: Number of parameters in the adapters.
        head_parameters: Number of parameters in the head.
    """

    name: str
    active: bool
    family: str
    sites: tuple[SiteSpec, ...]
    head: tuple[str, ...]
    norm: str
    adapter_parameters: int
    head_parameters: int


def list_adapters(model: nn.Module) -> list[AdapterSetInfo]:
    """Tells what is injected where.

    Args:
        model: Any model.

    Returns:
        One entry a set, in the order of injection; empty if nothing was injected.

    Example:
        >>> from torchvision.models import resnet18
        >>> from resadapt import inject_adapters
        >>> [(info.name, info.adapter_parameters) for info in list_adapters(inject_adapters(resnet18(), "layer4", 8))]
        [('default', 8712)]
    """
    ledger = find_ledger(model)
    if ledger is None:
        return []
    inner = unwrap(model)
    infos = []
    for name, record in ledger.sets.items():
        spec = record.spec
        head = record.parked_head or head_tensors(inner, spec.head)
        infos.append(
            AdapterSetInfo(
                name=name,
                active=name == ledger.active,
                family=spec.family,
                sites=spec.sites,
                head=spec.head,
                norm=spec.norm,
                adapter_parameters=sum(t.numel() for _, t in adapter_tensors(inner, spec) if isinstance(t, nn.Parameter)),
                head_parameters=sum(t.numel() for t in head.values() if isinstance(t, nn.Parameter)),
            )
        )
    return infos
