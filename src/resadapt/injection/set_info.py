"""Descriptions of the injected sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from resadapt.base.spec import SiteSpec
from resadapt.injection.ledger import adapter_tensors, find_ledger
from resadapt.injection.private import private_tensors
from resadapt.injection.walk import unwrap

__all__ = ["AdapterSetInfo", "list_adapters"]


@dataclass(frozen=True)
class AdapterSetInfo:
    """Description of a set.

    Args:
        name: Name of the set.
        active: Whether the set is active.
        family: Kind of adapter.
        sites: Each site with its channels and bottleneck.
        head: Names of the head's modules.
        norm: Norm policy.
        adapter_parameters: Number of parameters in the adapters.
        head_parameters: Number of parameters in the head.
        norm_parameters: Number of trainable parameters in the set's private norms.
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
    """Lists the adapter sets of a model.

    Args:
        model: Any model.

    Returns:
        One entry for each set, in the order of injection; empty if nothing was injected.

    Example:
        >>> from torchvision.models import resnet18
        >>> from resadapt import inject_adapters
        >>> model = inject_adapters(resnet18(), "layer4", 8)
        >>> [(info.name, info.adapter_parameters) for info in list_adapters(model)]
        [('default', 8712)]
    """
    ledger = find_ledger(model)
    if ledger is None:
        return []
    inner = unwrap(model)
    infos = []
    for name, adapter_set in ledger.sets.items():
        spec = adapter_set.spec
        head, norms = (
            _parameters(private_tensors(inner, spec, names)) for names in (spec.head, spec.norms)
        )
        infos.append(
            AdapterSetInfo(
                name=name,
                active=name == ledger.active,
                family=spec.family,
                sites=spec.sites,
                head=spec.head,
                norm=spec.norm,
                adapter_parameters=sum(
                    p.numel() for p in _parameters(dict(adapter_tensors(inner, spec)))
                ),
                head_parameters=sum(p.numel() for p in head),
                norm_parameters=sum(p.numel() for p in norms) if "affine" in spec.norm else 0,
            )
        )
    return infos


def _parameters(tensors: Mapping[str, Tensor]) -> list[nn.Parameter]:
    return [tensor for tensor in tensors.values() if isinstance(tensor, nn.Parameter)]
