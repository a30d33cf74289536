"""Comparing a live set with its file, restored on a clean backbone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from resadapt.base.autocast import AUTOCAST_DTYPES, current_autocast, device_kinds
from resadapt.base.errors import BackboneMismatchError, quote_names
from resadapt.base.fingerprint import Fingerprint
from resadapt.base.tensors import dtype_name, same_bits
from resadapt.files.adapter_file import AdapterInfo
from resadapt.injection.ledger import ledger_of
from resadapt.injection.sets import remove_adapters
from resadapt.proof.evidence import Evidence, Metric, collect, measure
from resadapt.proof.loading import load_file_content
from resadapt.proof.probe import (
    ProbeRun,
    compare_with_record,
    input_digest,
    probe_forms,
    run_again,
    run_probe,
    same,
)
from resadapt.proof.reconstruction import Reconstruction, replaced_forwards
from resadapt.proof.report import Check, VerificationReport, report_of

__all__ = ["Comparison"]

_ABSENT = "there is no live model with this set to compare with"


@dataclass(frozen=True)
class Comparison:
    """A file, and the model that the file should restore.

    Args:
        live: The live model.
        evidence: Results of the live set; None if the model does not have the file's set.
        info: Description of the file's content.
        stored: The file's tensors.
        probe: The user's input; None generates an input.
        metric: The metric, or None.
        tolerance: Largest allowed absolute difference of the metric.
        autocast: The dtype of autocast that probe and metric run under; None: without autocast.
    """

    live: nn.Module
    evidence: Evidence | None
    info: AdapterInfo
    stored: Mapping[str, Tensor]
    probe: object
    metric: Metric | None
    tolerance: float
    autocast: torch.dtype | None = None

    def on(
        self, reconstruction: Reconstruction, today: Fingerprint | None = None
    ) -> VerificationReport:
        """Restores the file on a clean backbone and compares the result with the evidence.

        Args:
            reconstruction: The clean backbone.
            today: The fingerprint of the clean backbone, if known.
        """
        size, clean = self.info.size, reconstruction.model
        checks = [
            Check(
                "file", "passed", f"every byte of {size:,} and {len(self.stored)} tensor digests"
            ),
            reconstruction.check,
        ]
        if clean is None:
            return report_of(
                self.info.path, checks, "there is no clean backbone to restore the file on"
            )
        try:
            load_file_content(clean, self.info, self.stored, self.info.set.name, today)
        except BackboneMismatchError as error:
            checks.append(Check("backbone", "failed", str(error)))
            return report_of(self.info.path, checks, "the backbone is a different one")
        try:
            return self._restored(clean, checks, reconstruction.shared)
        finally:
            remove_adapters(clean)  # the user may keep the model that rebuild() returned

    def _restored(self, clean: nn.Module, checks: list[Check], shared: str) -> VerificationReport:
        """Compares the clean backbone, with the file restored, with the evidence."""
        name = self.info.set.name
        checks.append(self._backbone())
        # Adapters that do not run are reported below: no warning.
        ledger_of(clean).set_named(name).runs_checked = True
        reloaded = collect(clean, name, lambda: self._run(clean), bystander=self.live)
        shared = shared or _why_shared("while the reloaded model ran", reloaded.bystanders)
        found = [self._sites(reloaded), self._outputs(reloaded), self._recorded(clean, reloaded)]
        failed = any(check.outcome == "failed" for check in found[1:])
        if failed and not self._is_deterministic(clean, reloaded):
            shared = shared or "the model's outputs differ in each run"
        if shared:
            found = [Check(check.name, "not checked", shared) for check in found]
        checks += [self._tensors(reloaded), *found]
        live = self.evidence.metric if self.evidence else None
        if self.metric is None or live is None:
            return report_of(self.info.path, checks, "no metric was given", live)
        value, bystanders = measure(clean, self.metric, self.autocast, self.live)
        shared = shared or _why_shared("while the metric ran on the reloaded model", bystanders)
        checks.append(self._metrics(live, value, shared))
        return report_of(self.info.path, checks, "", live, value)

    def _run(self, clean: nn.Module) -> ProbeRun:
        if self.evidence is None:
            form = self.info.probe.form if self.info.probe else None
            forms = probe_forms(clean, form, self.info.example)
            return run_probe(clean, self.probe, forms, self.autocast)
        if self.evidence.run.probe is None:
            return self.evidence.run
        return run_again(clean, self.evidence.run.probe)

    def _backbone(self) -> Check:
        tensors, modules = len(self.info.backbone.tensors), len(self.info.backbone.modules)
        detail = f"{tensors} tensors match their digests and {modules} modules their settings"
        return Check("backbone", "passed", detail)

    def _tensors(self, reloaded: Evidence) -> Check:
        if self.evidence is None:
            return Check("tensors", "not checked", _ABSENT)
        live = self.evidence.tensors
        if wrong := [
            key for key, tensor in live.items() if not same_bits(tensor, reloaded.tensors[key])
        ]:
            return Check("tensors", "failed", f"differ: {quote_names(wrong)}")
        return Check("tensors", "passed", f"{len(live)} tensors equal bit for bit")

    def _sites(self, reloaded: Evidence) -> Check:
        if not self.info.set.sites:
            return Check("sites", "not checked", "the set has no adapters")
        if reloaded.run.probe is None:
            return Check("sites", "not checked", reloaded.run.unusable)
        if idle := [site for site, runs in reloaded.runs.items() if not runs]:
            detail = f"the adapters at {quote_names(idle)} did not run on the probe"
            return Check("sites", "failed", detail)
        several = [f"{site!r} {runs} times" for site, runs in reloaded.runs.items() if runs > 1]
        detail = f"all {len(reloaded.runs)} adapters ran on the probe"
        return Check("sites", "passed", "; ".join([detail, *several]))

    def _outputs(self, reloaded: Evidence) -> Check:
        if self.evidence is None:
            return Check("outputs", "not checked", _ABSENT)
        if self.evidence.run.unusable:
            return Check("outputs", "not checked", self.evidence.run.unusable)
        if reloaded.run.unusable:
            return Check("outputs", "failed", f"reloaded model: {reloaded.run.unusable}")
        if not same(self.evidence.run.outputs, reloaded.run.outputs):
            replaced = replaced_forwards(self.live)
            cause = f"the forward of {quote_names(replaced)}" if replaced else "a hook or attribute"
            return Check(
                "outputs",
                "failed",
                f"live and reloaded model differ on the probe{self._under(self.autocast)}: was "
                f"{cause} changed, which the file does not contain?",
            )
        count = sum(tensor.numel() for tensor in reloaded.run.outputs.values())
        detail = f"{count:,} numbers on the probe equal bit for bit{self._under(self.autocast)}"
        return Check("outputs", "passed", detail)

    def _recorded(self, clean: nn.Module, reloaded: Evidence) -> Check:
        record, run = self.info.probe, reloaded.run
        if record is None:
            return Check("recorded outputs", "not checked", "the file has none")
        if run.probe is None or run.unusable:
            return Check("recorded outputs", "not checked", run.unusable)
        if input_digest(run.probe.inputs) != record.sha256:
            detail = "they were recorded on another input: pass that input as probe="
            return Check("recorded outputs", "not checked", detail)
        if run.probe.autocast != (recorded := AUTOCAST_DTYPES.get(record.autocast or "")):
            run = run_again(clean, replace(run.probe, autocast=recorded))
            if run.unusable:
                return Check("recorded outputs", "not checked", run.unusable)
        difference, ok = compare_with_record(record, self.stored, run.outputs)
        detail = f"largest relative difference {difference:.1e}{self._under(recorded)}"
        return Check("recorded outputs", "passed" if ok else "failed", detail)

    def _is_deterministic(self, clean: nn.Module, reloaded: Evidence) -> bool:
        """Tells whether the reloaded model gives the same outputs in another run."""
        probe = reloaded.run.probe
        return probe is None or same(reloaded.run.outputs, probe.outputs(clean))

    def _metrics(self, live: float, reloaded: float, shared: str) -> Check:
        """Compares a metric of the live model with that of the reloaded one."""
        if shared:
            return Check("metric", "not checked", shared)
        difference = abs(live - reloaded)
        detail = (
            f"live {live!r}, reloaded {reloaded!r}, difference {difference!r}, "
            f"tolerance {self.tolerance!r}{self._under(self.autocast)}"
        )
        if not math.isfinite(live) and str(live) == str(reloaded):
            return Check("metric", "not checked", f"{detail}: not finite")
        passed = difference <= self.tolerance  # not for NaN
        return Check("metric", "passed" if passed else "failed", detail)

    def _under(self, autocast: torch.dtype | None) -> str:
        """Returns the precision of a run, for a report; empty where there is only one."""
        if autocast is not None:
            return f", under autocast to {dtype_name(autocast)}"
        region = any(map(current_autocast, device_kinds(self.live)))
        return ", without autocast" if region or self.autocast is not None else ""


def _why_shared(when: str, modules: tuple[str, ...]) -> str:
    if not modules:
        return ""
    ran = f"modules of the live model ran {when} ({quote_names(modules, 3)})"
    return f"{ran}, so the results would agree in any case"
