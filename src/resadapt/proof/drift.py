"""Whether a backbone is still what was injected into."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from resadapt.base.fingerprint import differences
from resadapt.injection.ledger import ledger_of, plain_tensors, unwrap
from resadapt.injection.slots import fleeting

__all__ = ["BackboneReport", "check_backbone"]


@dataclass(frozen=True)
class BackboneReport:
    """Whether the backbone is still what was injected into.

    Args:
        ok: No tensor has drifted.
        drifted: Names of the parameters and buffers that have, in the model's order.
        reasons: What is different about each of them.
    """

    ok: bool
    drifted: list[str]
    reasons: dict[str, str]


def check_backbone(model: nn.Module) -> BackboneReport:
    """Compares every parameter and buffer of the backbone with its fingerprint from the injection.

    Args:
        model: An injected model.

    Returns:
        The report. A tensor that was only converted to a wider dtype counts as the same; a non-persistent buffer that was made
        since is not looked at.

    Raises:
        InjectionError: Nothing was injected.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from resadapt import inject_adapters
        >>> model = inject_adapters(resnet18())
        >>> with torch.no_grad():
        ...     _ = model.bn1.running_mean.add_(1)
        >>> check_backbone(model).drifted
        ['bn1.running_mean']
    """
    ledger = ledger_of(model)
    inner = unwrap(model)
    reasons = differences(plain_tensors(inner, ledger), ledger.fingerprint, fleeting(inner))
    return BackboneReport(not reasons, list(reasons), reasons)
