"""Holding a file against a model: what is compared, how, and with which of three outcomes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from resadapt.base.errors import AdapterError, BackboneMismatchError, VerificationError
from resadapt.base.quiet import undisturbed
from resadapt.files.adapter_file import AdapterInfo, ProbeRecord
from resadapt.injection.ledger import find_ledger
from resadapt.injection.sets import remove_adapters
from resadapt.proof.checkpoint import adapter_state_dict, restore
from resadapt.proof.probe import default_form, farthest, input_digest, outputs_of, probe_input, same

__all__ = ["Check", "Metric", "VerificationReport", "compare", "run_probe"]

Metric = Callable[[nn.Module], float]
Outcome = Literal["passed", "failed", "not checked"]


@dataclass(frozen=True)
class Check:
    """One thing that was compared, or was not.

    Args:
        name: ``"file"``, ``"backbone"``, ``"tensors"``, ``"outputs"``, ``"recorded outputs"`` or ``"metric"``.
        outcome: ``"passed"``, ``"failed"`` or ``"not checked"``; missing evidence is never a pass.
        detail: What was compared with what, or why not.
    """

    name: str
    outcome: Outcome
    detail: str


@dataclass(frozen=True)
class VerificationReport:
    """What a verification compared, with what result.

    Args:
        path: The file.
        checks: The checks, in the order in which they were made.
        metric_live: The metric of the live model, None if it was not evaluated.
        metric_reloaded: The metric of the reloaded model, None if it was not evaluated.
    """

    path: Path
    checks: tuple[Check, ...]
    metric_live: float | None = None
    metric_reloaded: float | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing failed and the file's tensors, at least, were proven."""
        outcomes = {check.name: check.outcome for check in self.checks}
        return "failed" not in outcomes.values() and "passed" in (
            outcomes.get("tensors"),
            outcomes.get("recorded outputs"),
        )

    @property
    def metric_difference(self) -> float | None:
        """The absolute difference of the metric, in the metric's own units; None if it was not evaluated."""
        if self.metric_live is None or self.metric_reloaded is None:
            return None
        return abs(self.metric_live - self.metric_reloaded)

    def __getitem__(self, name: str) -> Check:
        """Returns a check by its name."""
        return {check.name: check for check in self.checks}[name]

    def __str__(self) -> str:
        """Returns one line a check."""
        return "\n".join([str(self.path), *(f"  {c.name:<16}  {c.outcome:<11}  {c.detail}" for c in self.checks)])


def compare(
    model: nn.Module,
    name: str | None,
    path: Path,
    info: AdapterInfo,
    tensors: Mapping[str, Tensor],
    probe: object,
    metric: Metric | None,
    tolerance: float,
) -> VerificationReport:
    """Compares the live set, if the model carries one, with what the file gives on a clean copy of the backbone."""
    checks = [Check("file", "passed", f"every byte of {info.size:,} and {len(tensors)} tensor digests")]
    clean = _clean_copy(model)
    try:
        restore(clean, info, tensors, name or info.set.name)
    except BackboneMismatchError as error:
        checks.append(Check("backbone", "failed", str(error)))
        checks += [Check(each, "not checked", "the backbone is another one") for each in ("tensors", "outputs", "metric")]
        return VerificationReport(path, tuple(checks))
    checks.append(Check("backbone", "passed", f"{len(info.backbone)} tensors match their digests"))

    absent = "the model does not carry this set"
    if name is None:
        checks.append(Check("tensors", "not checked", absent))
    else:
        live, reloaded = adapter_state_dict(model, name), adapter_state_dict(clean, name)
        wrong = [key for key in live if not same({key: live[key]}, {key: reloaded[key]})]
        detail = f"differ: {', '.join(wrong)}" if wrong else f"{len(live)} tensors equal bit for bit"
        checks.append(Check("tensors", "failed" if wrong else "passed", detail))

    form = info.example if info.probe is None else info.probe.form
    probed = run_probe(clean, probe, form)
    if isinstance(probed, str):
        alone = name is not None and not isinstance(run_probe(model, probe, form), str)
        checks.append(Check("outputs", "failed" if alone else "not checked", f"reloaded model: {probed}" if alone else probed))
    else:
        _, _, inputs, outputs = probed
        found = [
            Check("outputs", "not checked", absent) if name is None else _check_outputs(model, inputs, outputs),
            _check_recorded(info.probe, tensors, inputs, outputs),
        ]
        if any(check.outcome == "failed" for check in found) and not same(outputs, outputs_of(clean, inputs)):
            found = [Check(check.name, "not checked", "the model itself gives other outputs each time") for check in found]
        checks += found

    if metric is None or name is None:
        checks.append(Check("metric", "not checked", absent if metric else "no metric was given"))
        return VerificationReport(path, tuple(checks))
    value_live = _evaluate(metric, model)
    astray: list[bool] = []
    watch = model.register_forward_pre_hook(lambda _module, _args: astray.append(True))
    try:
        values = value_live, _evaluate(metric, clean)
    finally:
        watch.remove()
    if astray:
        detail = "it ran the live model when it was given the reloaded one: use the model that it is called with"
        return VerificationReport(path, (*checks, Check("metric", "failed", detail)))
    difference = abs(values[0] - values[1])
    passed = difference <= tolerance  # false for NaN
    detail = f"live {values[0]!r}, reloaded {values[1]!r}, difference {difference!r}, tolerance {tolerance!r}"
    checks.append(Check("metric", "passed" if passed else "failed", detail))
    return VerificationReport(path, tuple(checks), *values)


def run_probe(model: nn.Module, probe: object, form: Any) -> tuple[str, Any, object, dict[str, Tensor]] | str:
    """Returns source, form, input and outputs of the probe, or why there are none."""
    if probe is not None:
        outputs = outputs_of(model, probe)
        return ("given", None, probe, outputs) if outputs else "the model returned no tensor on the probe"
    form = form or default_form(model)
    if form is None:
        return "no input could be made for this model: pass probe="
    try:
        inputs = probe_input(model, form)
        outputs = outputs_of(model, inputs)
    except AdapterError:
        raise
    except Exception as error:
        return f"the model does not take the input {form} that was made for it ({type(error).__name__}): pass probe="
    if not outputs or any(tensor.isnan().any() for tensor in outputs.values()):
        return f"the model returned NaN or no tensor on the input {form} that was made for it: pass probe="
    return "generated", form, inputs, outputs


def _check_outputs(model: nn.Module, inputs: object, reloaded: dict[str, Tensor]) -> Check:
    live = outputs_of(model, inputs)
    if any(tensor.isnan().any() for tensor in live.values()):
        return Check("outputs", "failed", "the outputs on the probe contain NaN, which proves nothing")
    if not same(live, reloaded):
        reason = "live and reloaded model differ on the probe: a hook or a state of yours that the file does not carry?"
        return Check("outputs", "failed", reason)
    if count := sum(tensor.numel() for tensor in live.values()):
        return Check("outputs", "passed", f"{count:,} numbers on the probe equal bit for bit")
    return Check("outputs", "not checked", "the model returned no numbers on the probe")


def _check_recorded(record: ProbeRecord | None, stored: Mapping[str, Tensor], inputs: object, outputs: dict[str, Tensor]) -> Check:
    if record is None:
        return Check("recorded outputs", "not checked", "the file recorded none")
    if input_digest(inputs) != record.sha256:
        return Check("recorded outputs", "not checked", "they were recorded on another input: pass that one as probe=")
    difference, ok = farthest(record, stored, outputs)
    return Check("recorded outputs", "passed" if ok else "failed", f"largest relative difference {difference:.1e}")


def _evaluate(metric: Metric, model: nn.Module) -> float:
    with undisturbed(model):
        value = metric(model)
    try:
        if isinstance(value, str | bytes):
            raise TypeError(f"{value!r} is text")
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise VerificationError(f"metric returned {type(value).__name__}, not a number: {error}. Return a float.") from error


def _clean_copy(model: nn.Module) -> nn.Module:
    try:
        clean = copy.deepcopy(model)
    except Exception as error:
        raise VerificationError(
            f"The model cannot be copied for the round trip: {error}. Mend that, or save with verify=False."
        ) from error
    own = {id(each) for each in (*model.modules(), *model.parameters(), *model.buffers())}
    if any(id(each) in own for each in (*clean.modules(), *clean.parameters(), *clean.buffers())):
        raise VerificationError(
            "A copy.deepcopy of the model shares parts with it (a __deepcopy__ of its own?), so nothing could be proven and the "
            "model itself would be changed. Mend that, or save with verify=False."
        )
    return remove_adapters(clean) if find_ledger(clean) is not None else clean
