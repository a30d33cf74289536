"""Saving with proof.

A file is read back on a clean backbone and compared before it takes its place.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from resadapt.base.errors import (
    AdapterError,
    BackboneDriftError,
    check_flag,
    quote_names,
    quote_reasons,
)
from resadapt.files.adapter_file import as_json, encode_adapter_file, read_adapter_file
from resadapt.files.atomic import atomic_write, target_of
from resadapt.files.container import format_for
from resadapt.injection.ledger import find_ledger, ledger_of
from resadapt.injection.private import lost_modules
from resadapt.injection.walk import check_ranks, on_one_rank, unwrap
from resadapt.proof.compare import Comparison
from resadapt.proof.drift import check_backbone
from resadapt.proof.evidence import Metric, collect, sets_kept
from resadapt.proof.loading import fingerprint_of, in_called_modules
from resadapt.proof.probe import probe_forms, record_probe, run_probe
from resadapt.proof.reconstruction import Rebuild, reconstruct
from resadapt.proof.report import Check, VerificationReport, failure_of, report_of
from resadapt.proof.state import refuse_unsaved_state

__all__ = ["save_adapters", "verify_adapters"]


def save_adapters(
    model: nn.Module,
    path: str | bytes | os.PathLike[str],
    *,
    name: str | None = None,
    probe: object = None,
    metric: Metric | None = None,
    tolerance: float = 0.0,
    metadata: Mapping[str, Any] | None = None,
    verify: bool = True,
    rebuild: Rebuild | None = None,
) -> VerificationReport:
    """Saves a set to a file that is proven to give back the same model before it replaces the
    previous one.

    The file is written beside the target, flushed to disk, read back and restored on a clean
    backbone; tensors are compared bit for bit, outputs on a probe bit for bit, and the metric on
    live and reloaded model. Then it is renamed over the target. Whatever fails, the previous file
    is intact and the model is as it was. Memory for one more model is needed.

    Args:
        model: An injected model. If it is sharded (FSDP2), all processes must call; rank 0 writes,
            and `rebuild` is needed.
        path: The file: ``.safetensors`` (extra ``resadapt[safetensors]``) or ``.pt``; with any
            other ending, the former if that package is installed, else the latter. The directory
            must exist.
        name: The set to save; None is the active one.
        probe: An input for the model (a tuple: its arguments; a dict: its keywords). None makes one
            from the example input's form, or from the model's first convolution; if the model takes
            neither, outputs are not checked.
        metric: A function from a model to a number. It is called on the live and the reloaded model
            in evaluation mode from the same random state of torch, and must use the model it is
            given (not one it knows from elsewhere) and the same data both times.
        tolerance: Largest allowed absolute difference of the metric, in the metric's own units: for
            an F1 kept as a fraction, 1.0 allows everything. Compare full figures with full figures:
            a metric over a subset says nothing about one over the whole. NaN never passes.
        metadata: Entries of your own, JSON values.
        verify: False skips all comparisons; the report then says "not checked".
        rebuild: A function that builds the plain backbone, with its weights, as another process
            would. The file is then proven on what it returns. None takes a copy of the live model,
            which may share code or state with it; the report says so.

    Returns:
        What was compared.

    Raises:
        BackboneDriftError: The backbone is no longer what was injected into; the message names what
            moved.
        VerificationError: A comparison failed, or an adapter did not run on the probe.
        AdapterFileError: The file cannot be written, or something in the metadata or the head
            cannot be put into it.
        InjectionError: Nothing was injected.
        AdapterKeyError: There is no such set, or an adapter's tensors are no longer those of its
            family.
        AdapterError: An argument is unsuitable.

    Example:
        >>> import os, tempfile
        >>> from torchvision.models import resnet18
        >>> from resadapt import inject_adapters
        >>> path = os.path.join(tempfile.mkdtemp(), "adapters.pt")
        >>> report = save_adapters(inject_adapters(resnet18()), path, metric=lambda m: m.fc.weight.norm().item())
        >>> report.ok, report.metric_difference, report["outputs"].outcome
        (True, 0.0, 'passed')
    """
    ledger, inner = ledger_of(model), unwrap(model)
    adapter_set = ledger.chosen(name)
    check_flag("verify", verify)
    _check_arguments(metric, tolerance, rebuild)
    sharded = check_ranks(inner)
    target = on_one_rank(sharded, lambda: _writable(path))
    entries = as_json(metadata, target)
    if metric is not None or lost_modules(
        inner, adapter_set.spec
    ):  # before the metric takes its time
        _refuse_drift(inner)
    refuse_unsaved_state(inner, adapter_set)
    looked_at = [adapter_set] if metric is None else list(ledger.sets.values())
    forms = probe_forms(inner, adapter_set.example)
    with sets_kept(inner, target, looked_at):
        evidence = collect(
            inner, adapter_set.spec.name, lambda: run_probe(inner, probe, forms), metric
        )
    # The weights are hashed once where a copy of them serves: what it has is what the live model
    # has.
    copied = reconstruct(inner, None) if verify and rebuild is None and not sharded else None
    today = fingerprint_of(copied.model) if copied and copied.model else None
    if today != ledger.fingerprint:
        _refuse_drift(inner)

    def write_and_prove() -> VerificationReport:
        reconstruction = copied or (reconstruct(inner, rebuild) if verify else None)
        if reconstruction and reconstruction.model is None:
            raise failure_of(
                report_of(
                    target,
                    [reconstruction.check],
                    "there is no clean backbone to restore the file on",
                )
            )
        kept, samples = record_probe(evidence.run)
        data = encode_adapter_file(
            target,
            adapter_set.spec,
            ledger.fingerprint.without(adapter_set.spec.head),
            evidence.tensors | samples,
            example=adapter_set.example,
            probe=kept,
            metadata=entries,
        )
        with atomic_write(target, data) as temporary:
            if reconstruction is None:
                return report_of(target, [], "verify=False", evidence.metric)
            info, stored = read_adapter_file(temporary)
            info = replace(info, path=target)
            with sets_kept(inner, target, [] if sharded else looked_at):
                report = Comparison(inner, evidence, info, stored, probe, metric, tolerance).on(
                    reconstruction, today
                )
            if not report.ok:
                raise failure_of(report)
            if metric is not None and not sharded:  # it was called once more
                _refuse_drift(inner)
        return report

    return on_one_rank(sharded, write_and_prove)


def verify_adapters(
    model: nn.Module,
    path: str | bytes | os.PathLike[str],
    *,
    probe: object = None,
    metric: Metric | None = None,
    tolerance: float = 0.0,
    rebuild: Rebuild | None = None,
) -> VerificationReport:
    """Checks that a file gives back a model, without changing either.

    The file is restored on a clean backbone. If the model carries the file's set, live and restored
    model are compared as by `save_adapters`; in any case the restored model's outputs are compared
    with those that the file recorded.

    Args:
        model: The injected model, or the plain backbone.
        path: The file.
        probe: As for `save_adapters`; needed for the recorded outputs if the file was saved with a
            probe of your own.
        metric: As for `save_adapters`.
        tolerance: As for `save_adapters`.
        rebuild: As for `save_adapters`.

    Returns:
        What was compared; look at its ``ok``.

    Raises:
        AdapterFileError: The file is missing, damaged, of another kind, or of a newer format.
        VerificationError: The metric changed a set of the model, which is put back where it can be.
        AdapterError: An argument is unsuitable.

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
    _check_arguments(metric, tolerance, rebuild)
    info, stored = read_adapter_file(path)
    inner = unwrap(model)
    ledger = find_ledger(inner)
    looked_at = ledger.sets.values() if ledger and metric is not None else []
    with sets_kept(inner, info.path, looked_at):
        evidence = None
        if ledger is not None and (
            name := info.set.name if info.set.name in ledger.sets else ledger.active
        ):
            if differing := in_called_modules(inner, info).set.differences(ledger.sets[name].spec):
                detail = (
                    f"the model's set {name!r} differs from the file's in {quote_names(differing)}"
                )
                return report_of(
                    info.path, [Check("tensors", "failed", detail)], "the sets are not the same"
                )
            forms = probe_forms(inner, info.probe.form if info.probe else None, info.example)
            evidence = collect(inner, name, lambda: run_probe(inner, probe, forms), metric)
        elif metric is not None:
            raise AdapterError(
                "The model has no active set whose metric could be compared. Load the file first, "
                "or leave out metric=."
            )
        return Comparison(inner, evidence, info, stored, probe, metric, tolerance).on(
            reconstruct(inner, rebuild)
        )


def _writable(path: object) -> Path:
    target = target_of(path)
    format_for(target)
    return target


def _refuse_drift(model: nn.Module) -> None:
    report = check_backbone(model)
    if not report.ok:
        raise BackboneDriftError(
            f"{len(report.drifted)} tensors and modules of the backbone are not what was injected "
            f"into: {quote_reasons(report.reasons)}. The adapter file would not contain these "
            "changes. Keep the backbone frozen; or, if it is meant to be as it is now (a full "
            "checkpoint was loaded), call accept_backbone(model). If this is an average of models "
            "(EMA), whose arithmetic rounds frozen tensors too, load its set into the model that "
            "was trained, or one injected afresh, load_adapter_state_dict(model, "
            "adapter_state_dict(average)), and save that.",
            report,
        )


def _check_arguments(metric: object, tolerance: object, rebuild: object) -> None:
    if metric is not None and not callable(metric):
        raise AdapterError(
            f"metric is {type(metric).__name__}: give a function from a model to a number."
        )
    if rebuild is not None and not callable(rebuild):
        raise AdapterError(
            f"rebuild is {type(rebuild).__name__}: give a function that builds the plain backbone."
        )
    number = isinstance(tolerance, int | float) and not isinstance(tolerance, bool)
    if not number or not 0 <= tolerance < math.inf:  # type: ignore[operator]
        raise AdapterError(
            f"tolerance={tolerance!r}: give a finite number, 0 or more, in the units of the metric."
        )
