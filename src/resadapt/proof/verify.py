"""Saving and verifying adapter files.

A new file is restored on a clean backbone and compared before it replaces the target.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from resadapt.base.autocast import AUTOCAST_DTYPES, check_autocast, device_kinds
from resadapt.base.errors import AdapterError, check_flag, quote_names
from resadapt.files.adapter_file import as_json, encode_adapter_file, read_adapter_file
from resadapt.files.atomic import atomic_write, created_directory
from resadapt.files.location import files_to_write
from resadapt.injection.ledger import find_ledger, ledger_of
from resadapt.injection.private import lost_modules
from resadapt.injection.walk import check_ranks, on_one_rank, unwrap
from resadapt.proof.card import write_card
from resadapt.proof.compare import Comparison
from resadapt.proof.drift import refuse_drift
from resadapt.proof.evidence import Metric, collect, sets_kept
from resadapt.proof.loading import fingerprint_of, in_called_modules
from resadapt.proof.probe import probe_forms, record_probe, run_probe
from resadapt.proof.reconstruction import Rebuild, check_rebuild, reconstruct
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
    autocast: torch.dtype | None = None,
) -> VerificationReport:
    """Saves a set to a file, and verifies the file before it replaces the previous file.

    The file is written beside the target, flushed to disk, read again and restored on a clean
    backbone. Tensors and outputs on a probe are compared bit for bit, and the metric of the live
    model with that of the reloaded model. Then the file is renamed to the target. If anything
    fails, the previous file and the model are unchanged. Needs memory for a second model.

    Args:
        model: An injected model. If it is sharded (FSDP2), all processes must call, rank 0 writes,
            and `rebuild` is required.
        path: The file: ``.safetensors`` (extra ``resadapt[safetensors]``) or ``.pt``. Other
            suffixes give the safetensors format if the package is installed, else the ``.pt``
            format. The directory must exist. Or a directory, which exists or ends in a slash: it
            gets the file ``adapters.safetensors`` or ``adapters.pt``, and a model card,
            ``README.md``.
        name: The set to save; None is the active set.
        probe: An input for the model (a tuple: positional arguments; a dict: keyword arguments).
            None generates an input from the form of the example input, or from the model's first
            convolution; if the model accepts neither, outputs are not checked.
        metric: A function from a model to a number. It is called on the live and on the reloaded
            model, in eval mode and with the same random state of torch. It must use the model that
            is passed (not a model from a closure), and the same data both times.
        tolerance: Largest allowed absolute difference of the metric, in the metric's units: for an
            F1 score in [0, 1], 1.0 allows everything. Use the full data set both times: a metric on
            a subset does not estimate the metric on all data exactly. NaN never passes.
        metadata: Your entries, JSON values.
        verify: False skips all comparisons; the report then says "not checked".
        rebuild: A function that builds the backbone without adapters, with its weights, as another
            process would. The file is then verified on the returned model. None copies the live
            model; the copy may share code or state with the live model, and the report says so.
        autocast: `torch.bfloat16` or `torch.float16`: probe and metric run under autocast to this
            dtype, and the file records it. None: they run without autocast, even if the call is in
            an autocast region.

    Returns:
        The report of all checks.

    Raises:
        BackboneDriftError: The backbone has changed since the injection; the message lists the
            changed tensors and modules.
        VerificationError: A comparison failed, or an adapter did not run on the probe.
        AdapterFileError: The file cannot be written, or something in the metadata or the head
            cannot be stored.
        InjectionError: Nothing was injected.
        AdapterKeyError: There is no such set, or an adapter's tensors were changed in number or
            shape.
        AdapterError: An argument is unsuitable.

    Example:
        >>> import os, tempfile
        >>> from torchvision.models import resnet18
        >>> from resadapt import inject_adapters
        >>> path = os.path.join(tempfile.mkdtemp(), "adapters.pt")
        >>> model = inject_adapters(resnet18())
        >>> report = save_adapters(model, path, metric=lambda m: m.fc.weight.norm().item())
        >>> report.ok, report.metric_difference, report["outputs"].outcome
        (True, 0.0, 'passed')
    """
    ledger, inner = ledger_of(model), unwrap(model)
    adapter_set = ledger.chosen(name)
    check_flag("verify", verify)
    _check_arguments(metric, tolerance, rebuild)
    check_autocast(autocast, device_kinds(inner))
    sharded = check_ranks(inner)
    target, card = on_one_rank(sharded, lambda: files_to_write(path))
    entries = as_json(metadata, target)
    if metric is not None or lost_modules(inner, adapter_set.spec):  # before a slow metric
        refuse_drift(inner)
    refuse_unsaved_state(inner, adapter_set)
    looked_at = [adapter_set] if metric is None else list(ledger.sets.values())
    forms = probe_forms(inner, adapter_set.example)
    with sets_kept(inner, target, looked_at):
        evidence = collect(
            inner,
            adapter_set.spec.name,
            lambda: run_probe(inner, probe, forms, autocast),
            metric,
            autocast=autocast,
        )
    # Hash the weights only once: the copy has the same weights as the live model.
    plain = verify and rebuild is None and not sharded
    copied = reconstruct(inner, None, adapter_set.spec) if plain else None
    today = fingerprint_of(copied.model) if copied and copied.model else None
    if today != ledger.fingerprint:
        refuse_drift(inner)

    def write_and_verify() -> VerificationReport:
        reconstruction = copied or (reconstruct(inner, rebuild) if verify else None)
        if reconstruction and reconstruction.model is None:
            reason = "there is no clean backbone to restore the file on"
            raise failure_of(report_of(target, [reconstruction.check], reason))
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
        with created_directory(target.parent), atomic_write(target, data) as temporary:
            if reconstruction is None:
                report = report_of(target, [], "verify=False", evidence.metric)
            else:
                info, stored = read_adapter_file(temporary)
                info = replace(info, path=target)
                with sets_kept(inner, target, [] if sharded else looked_at):
                    report = Comparison(
                        inner, evidence, info, stored, probe, metric, tolerance, autocast
                    ).on(reconstruction, today)
                if not report.ok:
                    raise failure_of(report)
                if metric is not None and not sharded:  # the second call may have changed the model
                    refuse_drift(inner)
        if card is not None:
            write_card(card, inner, adapter_set.spec, report, entries, data)
        return report

    return on_one_rank(sharded, write_and_verify)


def verify_adapters(
    model: nn.Module,
    path: str | bytes | os.PathLike[str],
    *,
    probe: object = None,
    metric: Metric | None = None,
    tolerance: float = 0.0,
    rebuild: Rebuild | None = None,
    autocast: torch.dtype | None = None,
) -> VerificationReport:
    """Checks that a file restores a model, without changing either.

    The file is restored on a clean backbone. If the model has the file's set, the live and the
    restored model are compared as in `save_adapters`. In any case the restored model's outputs are
    compared with the outputs recorded in the file.

    Args:
        model: The injected model, or the backbone without adapters.
        path: The file, as for `load_adapters`.
        probe: As for `save_adapters`; required to check recorded outputs if the file was saved with
            a probe.
        metric: As for `save_adapters`.
        tolerance: As for `save_adapters`.
        rebuild: As for `save_adapters`.
        autocast: As for `save_adapters`; None is the precision that the file records. Recorded
            outputs are always compared in the recorded precision.

    Returns:
        The report of all checks; ``ok`` tells whether the file passed.

    Raises:
        AdapterFileError: The file is missing, damaged, of another kind, or of a newer format.
        VerificationError: The metric changed a set of the model, which is restored where possible.
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
    inner = unwrap(model)
    _check_arguments(metric, tolerance, rebuild)
    check_autocast(autocast, device_kinds(inner))
    info, stored = read_adapter_file(path)
    if autocast is None and info.probe and info.probe.autocast:
        autocast = AUTOCAST_DTYPES[info.probe.autocast]
        check_autocast(autocast, device_kinds(inner))
    ledger = find_ledger(inner)
    looked_at = ledger.sets.values() if ledger and metric is not None else []
    with sets_kept(inner, info.path, looked_at):
        evidence, spec = None, None
        if ledger is not None and (
            name := info.set.name if info.set.name in ledger.sets else ledger.active
        ):
            spec = ledger.sets[name].spec
            if differing := in_called_modules(inner, info).set.differences(spec):
                detail = f"set {name!r} differs from the file's set in {quote_names(differing)}"
                checks = [Check("tensors", "failed", detail)]
                return report_of(info.path, checks, "the sets are not the same")
            forms = probe_forms(inner, info.probe.form if info.probe else None, info.example)
            evidence = collect(
                inner,
                name,
                lambda: run_probe(inner, probe, forms, autocast),
                metric,
                autocast=autocast,
            )
        elif metric is not None:
            raise AdapterError(
                "The model has no active set to compare the metric with. Load the file first, or "
                "remove metric=."
            )
        return Comparison(inner, evidence, info, stored, probe, metric, tolerance, autocast).on(
            reconstruct(inner, rebuild, spec)
        )


def _check_arguments(metric: object, tolerance: object, rebuild: object) -> None:
    if metric is not None and not callable(metric):
        raise AdapterError(
            f"metric is {type(metric).__name__}: give a function from a model to a number."
        )
    check_rebuild(rebuild)
    number = isinstance(tolerance, int | float) and not isinstance(tolerance, bool)
    if not number or not 0 <= tolerance < math.inf:  # type: ignore[operator]
        raise AdapterError(
            f"tolerance={tolerance!r}: give a finite number, 0 or more, in the units of the metric."
        )
