"""Saving with proof: a file is read back into a clean reconstruction and compared before it takes its place."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from resadapt.base.errors import BackboneDriftError, VerificationError, listing
from resadapt.base.fingerprint import explained
from resadapt.files.adapter_file import read_adapter_file, staged, target_of
from resadapt.injection.freeze import within
from resadapt.injection.installation import activated
from resadapt.injection.ledger import find_ledger, ledger_of, unwrap
from resadapt.proof.checkpoint import adapter_state_dict
from resadapt.proof.compare import Check, Metric, VerificationReport, compare, run_probe
from resadapt.proof.drift import check_backbone
from resadapt.proof.probe import record_probe, same

__all__ = ["save_adapters", "verify_adapters"]


def save_adapters(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str = "default",
    probe: object = None,
    metric: Metric | None = None,
    tolerance: float = 0.0,
    metadata: Mapping[str, Any] | None = None,
    verify: bool = True,
) -> VerificationReport:
    """Saves a set to a file that is proven to give back the same model before it replaces the previous one.

    The file is written beside the target, flushed to disk, read back and restored into a clean copy of the backbone; tensors are
    compared bit for bit, outputs on a probe bit for bit, and the metric on live and reloaded model. Then it is renamed over the
    target. Whatever fails, the previous file is intact and the model is as it was. Memory for one copy of the model is needed.

    Args:
        model: An injected model.
        path: The file: ``.safetensors`` (extra ``resadapt[safetensors]``) or ``.pt``; with any other ending, the former if that
            package is installed, else the latter. The directory must exist.
        name: The set to save; it need not be the active one.
        probe: An input for the model (a tuple: its arguments; a dict: its keywords). None makes one from the example input's
            form, or from the first convolution where that comes first; if neither can be, outputs are not checked.
        metric: A function from a model to a number. It is called on the live and the reloaded model in evaluation mode from the
            same random state of torch, and must use the model it is given (not one it knows from elsewhere) and the same data
            both times.
        tolerance: Largest allowed absolute difference of the metric, in the metric's own units: for an F1 kept as a fraction,
            1.0 allows everything. Compare full figures with full figures: a metric over a subset says nothing about one over the
            whole. NaN never passes.
        metadata: Entries of your own, JSON values.
        verify: False skips all comparisons; the report then says "not checked".

    Returns:
        What was compared.

    Raises:
        BackboneDriftError: The backbone is no longer what was injected into; the message names the tensors.
        VerificationError: A comparison failed.
        AdapterFileError: The file cannot be written, or the metadata is not JSON.
        InjectionError: Nothing was injected.
        AdapterKeyError: There is no such set.

    Example:
        >>> import os, tempfile
        >>> from torchvision.models import resnet18
        >>> from resadapt import inject_adapters
        >>> path = os.path.join(tempfile.mkdtemp(), "adapters.pt")
        >>> report = save_adapters(inject_adapters(resnet18()), path, metric=lambda m: m.fc.weight.norm().item())
        >>> report.ok, report.metric_difference, report["outputs"].outcome
        (True, 0.0, 'passed')
    """
    target = target_of(path)
    ledger, inner = ledger_of(model), unwrap(model)
    record = ledger.set_named(name)
    _check_arguments(metric, tolerance)
    _refuse_drift(inner)
    with activated(inner, ledger, name):
        tensors = adapter_state_dict(inner, name)
        probed = run_probe(inner, probe, record.example)
        kept = record_probe(*probed) if isinstance(probed, tuple) else (None, {})
        backbone = {p: r for p, r in ledger.fingerprint.items() if not within(p, record.spec.head)}
        with staged(
            target,
            record.spec,
            backbone,
            tensors | kept[1],
            example=record.example,
            probe=kept[0],
            metadata=metadata,
        ) as beside:
            if not verify:
                names = ("file", "tensors", "outputs", "metric")
                return VerificationReport(target, tuple(Check(each, "not checked", "verify=False") for each in names))
            info, stored = read_adapter_file(beside)
            report = compare(inner, name, target, info, stored, probe, metric, tolerance)
            if not same(tensors, adapter_state_dict(inner, name)) or (metric and not check_backbone(inner).ok):
                failed = Check("tensors", "failed", "the metric or the probe changed the live model while it was being saved")
                report = VerificationReport(target, (*(c for c in report.checks if c.name != "tensors"), failed))
            if not report.ok:
                raise VerificationError(f"The file would not give back this model, so the target was left as it was.\n{report}")
    return report


def verify_adapters(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    probe: object = None,
    metric: Metric | None = None,
    tolerance: float = 0.0,
) -> VerificationReport:
    """Checks that a file gives back a model, without changing either.

    The file is restored into a clean copy of the backbone. If the model carries the file's set, live and restored model are
    compared as by `save_adapters`; in any case the restored model's outputs are held against those that the file recorded.

    Args:
        model: The injected model, or the plain backbone.
        path: The file.
        probe: As for `save_adapters`; needed for the recorded outputs if the file was saved with a probe of your own.
        metric: As for `save_adapters`.
        tolerance: As for `save_adapters`.

    Returns:
        What was compared; look at its ``ok``.

    Raises:
        AdapterFileError: The file is missing, damaged, of another kind, or of a newer format.
        VerificationError: The comparison itself cannot be made.

    Example:
        >>> import os, tempfile, torch
        >>> from torchvision.models import resnet18
        >>> from resadapt import inject_adapters
        >>> model = inject_adapters(resnet18())
        >>> path = os.path.join(tempfile.mkdtemp(), "adapters.pt")
        >>> report = save_adapters(model, path)
        >>> verify_adapters(model, path).ok
        True
        >>> with torch.no_grad():
        ...     _ = model.layer4[-1].resadapt.default.up.bias.add_(1)
        >>> verify_adapters(model, path).ok
        False
    """
    _check_arguments(metric, tolerance)
    info, tensors = read_adapter_file(path)
    inner = unwrap(model)
    ledger = find_ledger(inner)
    name = None
    if ledger is not None:
        name = info.set.name if info.set.name in ledger.sets else ledger.active
        if name is not None and (differing := info.set.differences(ledger.sets[name].spec)):
            detail = f"the model's set {name!r} differs from the file's in {listing(differing)}"
            return VerificationReport(info.path, (Check("tensors", "failed", detail),))
    if ledger is None or name is None:
        if metric is not None:
            raise VerificationError(
                "The model has no active set whose metric could be compared. Load the file first, or leave out metric=."
            )
        return compare(inner, None, info.path, info, tensors, probe, metric, tolerance)
    with activated(inner, ledger, name):
        return compare(inner, name, info.path, info, tensors, probe, metric, tolerance)


def _refuse_drift(model: nn.Module) -> None:
    report = check_backbone(model)
    if not report.ok:
        raise BackboneDriftError(
            f"{len(report.drifted)} tensors of the backbone are not what was injected into: {explained(report.reasons)}. The "
            "adapter file would not contain these changes. Keep the backbone frozen (no requires_grad=True on it, no loading into "
            "it after the injection), or change it first, then inject."
        )


def _check_arguments(metric: object, tolerance: float) -> None:
    if metric is not None and not callable(metric):
        raise VerificationError(f"metric is {type(metric).__name__}: give a function from a model to a number.")
    if not (isinstance(tolerance, int | float) and math.isfinite(tolerance) and tolerance >= 0):
        raise VerificationError(f"tolerance={tolerance!r}: give a finite number, 0 or more, in the units of the metric.")
