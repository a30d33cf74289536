"""Checking that the backbone has not changed since the injection."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from torch import nn

from resadapt.base.errors import BackboneDriftError, BackboneMismatchError, quote_reasons
from resadapt.base.fingerprint import Fingerprint
from resadapt.base.html_table import html_table
from resadapt.base.tensors import dtype_name
from resadapt.injection.freeze import freeze_norm, frozen_modules
from resadapt.injection.ledger import backbone_differences, ledger_of
from resadapt.injection.private import lost_modules
from resadapt.injection.switching import check_switchable
from resadapt.injection.walk import backbone_modules, backbone_tensors, check_not_meta, unwrap

__all__ = [
    "BackboneReport",
    "accept_backbone",
    "check_backbone",
    "refuse_drift",
    "refuse_other_backbone",
]


@dataclass(frozen=True)
class BackboneReport:
    """Result of comparing the backbone with its fingerprint; a notebook shows a table.

    Args:
        ok: Whether nothing has drifted.
        drifted: Names of the drifted parameters, buffers and modules, in the model's order.
        reasons: The difference of each drifted name.
    """

    ok: bool
    drifted: list[str]
    reasons: dict[str, str]

    def _repr_html_(self) -> str:
        """Returns a table of what has drifted."""
        title = f"The backbone has drifted in {len(self.drifted)} tensors and modules."
        if self.ok:
            title = "The backbone has not drifted."
        return html_table(("name", "difference"), self.reasons.items(), title=title)


def check_backbone(model: nn.Module) -> BackboneReport:
    """Compares the backbone's parameters, buffers and settings with the injection's fingerprint.

    Args:
        model: An injected model.

    Returns:
        The report. A tensor that was only converted to a wider dtype counts as unchanged. A
        non-persistent buffer is compared only if its size is unchanged. A head module that was
        replaced after the injection counts as drifted. So does a tensor that was converted to a
        narrower dtype: after ``model.bfloat16()`` on purpose, call `accept_backbone`.

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
    """Accepts the backbone as it is now, and updates its fingerprint.

    Use it after a full checkpoint was loaded into an injected model, or after an intended change of
    the backbone, such as ``model.bfloat16()``. `check_backbone` then compares with the new
    fingerprint, and adapter files saved from now on require the new backbone. The sets do not
    change: only a metric can tell whether adapters that were trained on another backbone fit this
    one.

    Args:
        model: An injected model.

    Raises:
        InjectionError: Nothing was injected, a head or adapter was lost, or a tensor is on the meta
            device (offloaded).

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
    for module in modules.values():  # norms added since the injection are frozen too
        freeze_norm(module)
    ledger.frozen = frozen_modules(inner)
    ledger.fingerprint = Fingerprint.of(modules, tensors)


def refuse_drift(model: nn.Module) -> None:
    """Checks that the backbone has not changed since the injection.

    Raises:
        BackboneDriftError: It has; the message lists what differs.
    """
    report = check_backbone(model)
    if report.ok:
        return
    if dtypes := _conversion(model, ledger_of(model).fingerprint, report.reasons.keys()):
        before, now = dtypes
        mend = (
            f"What differs is the dtype: the model was converted from {before} to {now}. If that "
            "is intended, call accept_backbone(model); a file saved then loads into the backbone "
            f"in {now}. If not, load the original weights again, and run the model in {before}, or "
            "under torch.autocast."
        )
    else:
        mend = (
            "Keep the backbone frozen: where a trainer thaws it, call "
            "set_active_adapters(model, name) before training starts. Or, if the change is "
            "intended (a full checkpoint was loaded), call accept_backbone(model). If this is an "
            "average of models (EMA), "
            "which rounds frozen tensors too, load its set into the trained model or a newly "
            "injected model, load_adapter_state_dict(model, adapter_state_dict(average)), and save "
            "that model."
        )
    raise BackboneDriftError(
        f"{len(report.drifted)} tensors and modules of the backbone have changed since the "
        f"injection: {quote_reasons(report.reasons)}. What is saved would not contain these "
        f"changes. {mend}",
        report,
    )


def refuse_other_backbone(
    model: nn.Module, recorded: Fingerprint, head: tuple[str, ...], where: str, source: str
) -> None:
    """Checks that a model, injected or not, has the backbone that was recorded.

    Args:
        model: The model.
        recorded: The fingerprint that its backbone should have.
        head: Names of modules that are not compared.
        where: The file or state, to begin the message with.
        source: The same in the middle of a sentence, such as ``"the file"``.

    Raises:
        BackboneMismatchError: The backbone is another one; the message lists what differs.
    """
    wrong = backbone_differences(model, recorded, head)
    if not wrong:
        return
    if dtypes := _conversion(model, recorded, wrong.keys()):
        stored, here = dtypes
        mend = (
            f"What differs is the dtype, and values in {stored} cannot be compared after a "
            f"conversion. Load {source} into the backbone in {stored}, with its original "
            f"weights. To use it in {here}, then convert the whole model, for example by "
            "model.bfloat16(), and call accept_backbone(model)."
        )
    else:
        mend = (
            "Build the same backbone and load its original weights, in the original dtype, first."
        )
        owner, *others = {path.rpartition(".")[0] for path in wrong}
        if not others and f"{owner}.weight" in wrong:
            mend += (
                f" If {owner!r} is a new layer with random weights, train it with the adapters: "
                f"inject_adapters(..., head={owner!r})."
            )
    raise BackboneMismatchError(
        f"{where}: the backbone is not the one these adapters were trained on; "
        f"{len(wrong)} tensors and modules differ from {source}: {quote_reasons(wrong)}. {mend}"
    )


def _conversion(
    model: nn.Module, recorded: Fingerprint, differing: Set[str]
) -> tuple[str, str] | None:
    """Returns the recorded and the present dtypes if nothing but dtypes of tensors differs.

    Args:
        model: The model.
        recorded: The fingerprint that the backbone was compared with.
        differing: The names that differ from it.
    """
    tensors = dict(backbone_tensors(model))
    if not differing <= tensors.keys() & recorded.tensors.keys():
        return None
    pairs = [(recorded.tensors[name], tensors[name]) for name in differing]
    if any(
        record.difference_of_form(tensor) or record.dtype == dtype_name(tensor)
        for record, tensor in pairs
    ):
        return None
    before = sorted({record.dtype for record, _ in pairs})
    now = sorted({dtype_name(tensor) for _, tensor in pairs})
    return " and ".join(before), " and ".join(now)
