"""Whether a backbone is still what was injected into."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from resadapt.base.fingerprint import Fingerprint
from resadapt.injection.freeze import freeze_norm
from resadapt.injection.ledger import backbone_differences, ledger_of
from resadapt.injection.private import lost_modules
from resadapt.injection.switching import check_switchable
from resadapt.injection.walk import backbone_modules, backbone_tensors, check_not_meta, unwrap

__all__ = ["BackboneReport", "accept_backbone", "check_backbone"]


@dataclass(frozen=True)
class BackboneReport:
    """Whether the backbone is still what was injected into.

    Args:
        ok: Nothing has drifted.
        drifted: Names of the parameters, buffers and modules that have, in the model's order.
        reasons: What is different about each of them.
    """

    ok: bool
    drifted: list[str]
    reasons: dict[str, str]


def check_backbone(model: nn.Module) -> BackboneReport:
    """Compares the backbone with its fingerprint from the injection: every parameter, buffer and
    setting of its modules.

    Args:
        model: An injected model.

    Returns:
        The report. A tensor that was only converted to a wider dtype counts as the same; a
        non-persistent buffer is compared if it has the size that it had. A head's module that is
        not the one that was injected into counts as drifted.

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
    reasons = backbone_differences(inner, ledger.fingerprint)
    for adapter_set in ledger.sets.values():
        for name in lost_modules(inner, adapter_set.spec):
            reasons.setdefault(name, "was replaced after the injection")
    return BackboneReport(not reasons, list(reasons), reasons)


def accept_backbone(model: nn.Module) -> None:
    """Takes the backbone as it is now for the one that was injected into.

    For a full checkpoint that was loaded into an injected model, and for a backbone that was
    changed on purpose. From then on `check_backbone` compares with it, adapter files ask for it
    when they are loaded, and the plain model is the one with it. The sets stay as they are: whether
    adapters that were trained on another backbone suit this one, only a metric can tell.

    Args:
        model: An injected model.

    Raises:
        InjectionError: Nothing was injected, a head or adapter is no longer in its place, or a
            tensor has no values (offloaded).

    Example:
        >>> from torchvision.models import resnet18
        >>> from resadapt import inject_adapters
        >>> trained = inject_adapters(resnet18(num_classes=3), head="fc")
        >>> skeleton = inject_adapters(resnet18(num_classes=3), head="fc")
        >>> _ = skeleton.load_state_dict(trained.state_dict())
        >>> check_backbone(skeleton).ok
        False
        >>> accept_backbone(skeleton)
        >>> check_backbone(skeleton).ok
        True
    """
    ledger = ledger_of(model)
    inner = unwrap(model)
    check_switchable(inner, ledger)
    modules, tensors = dict(backbone_modules(inner)), dict(backbone_tensors(inner))
    check_not_meta(tensors)
    for module in modules.values():  # norms that came in since are frozen too
        freeze_norm(module)
    ledger.fingerprint = Fingerprint.of(modules, tensors)
