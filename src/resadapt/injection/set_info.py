"""What is injected where."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from resadapt.base.names import within
from resadapt.base.spec import SiteSpec
from resadapt.injection.ledger import adapter_tensors, find_ledger, own_tensors
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
        norm_parameters: Number of parameters trained in norms of its own.
    """

    name: str
    active: bool
    family: str
    sites: tuple[SiteSpec, ...]
    head: tuple[str, ...]
    norm: str
    adapter_parameters: int
    head_parameters: int
    norm_parameters: int


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
        own = [(path, tensor) for path, tensor in own_tensors(inner, record).items() if isinstance(tensor, nn.Parameter)]
        infos.append(
            AdapterSetInfo(
                name=name,
                active=name == ledger.active,
                family=spec.family,
                sites=spec.sites,
                head=spec.head,
                norm=spec.norm,
                adapter_parameters=sum(t.numel() for _, t in adapter_tensors(inner, spec) if isinstance(t, nn.Parameter)),
                head_parameters=sum(tensor.numel() for path, tensor in own if within(path, spec.head)),
                norm_parameters=sum(tensor.numel() for path, tensor in own if within(path, spec.norms) and tensor.requires_grad),
            )
        )
    return infos
