"""Collecting a set's tensors, outputs on a probe and metric, without changing the model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resadapt.base.errors import AdapterError
from resadapt.base.undisturbed import undisturbed
from resadapt.injection.ledger import AdapterSet, adapter_of, find_ledger, ledger_of
from resadapt.injection.sets import remove_adapters
from resadapt.injection.switching import activated
from resadapt.proof.probe import ProbeRun, same
from resadapt.proof.report import Check, failure_of, report_of
from resadapt.proof.state import adapter_state_dict, convert_set, load_adapter_state_dict

__all__ = ["Evidence", "Metric", "collect", "measure", "sets_kept"]

Metric = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Evidence:
    """Results of a model with one of its sets.

    Args:
        tensors: The set's tensors.
        run: The model's outputs on a probe.
        runs: How often each site's adapter ran on the probe.
        bystanders: Names of another model's modules that also ran on the probe.
        metric: The metric's value, None if not measured.
    """

    tensors: dict[str, Tensor]
    run: ProbeRun
    runs: dict[str, int]
    bystanders: tuple[str, ...] = ()
    metric: float | None = None


def collect(
    model: nn.Module,
    name: str,
    run: Callable[[], ProbeRun],
    metric: Metric | None = None,
    bystander: nn.Module | None = None,
    autocast: torch.dtype | None = None,
) -> Evidence:
    """Collects the results of a model with a set.

    Args:
        model: An injected model.
        name: The set.
        run: Runs the model on a probe.
        metric: A function from a model to a number.
        bystander: Another model, whose modules should not run on the probe.
        autocast: As for `measure`.

    Raises:
        AdapterError: The metric does not return a number.
    """
    ledger = ledger_of(model)
    with activated(model, ledger, name):
        tensors = adapter_state_dict(model, name)
        with _running(bystander) as on_probe, _counted(model, name) as runs:
            outputs = run()
        value = None if metric is None else measure(model, metric, autocast)[0]
    return Evidence(tensors, outputs, runs, tuple(on_probe), value)


def measure(
    model: nn.Module,
    metric: Metric,
    autocast: torch.dtype | None,
    bystander: nn.Module | None = None,
) -> tuple[float, tuple[str, ...]]:
    """Returns a metric of a model, and the names of another model's modules that ran for it.

    Args:
        model: An injected model, measured with its active set.
        metric: A function from a model to a number.
        autocast: The dtype of autocast that the metric runs under; None runs without autocast.
        bystander: Another model, whose modules should not run.

    Raises:
        AdapterError: The metric does not return a number.
    """
    with ExitStack() as stack:
        for each in (model, bystander):
            stack.enter_context(_unchanged(each, autocast))
        running = stack.enter_context(_running(bystander))
        value: Any = metric(model)
    try:
        if isinstance(value, str | bytes):
            raise TypeError(f"{value!r} is a string")
        return float(value), tuple(running)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise AdapterError(
            f"metric returned {type(value).__name__}, not a number: {error}. Return a float."
        ) from error


@contextmanager
def _unchanged(model: nn.Module | None, autocast: torch.dtype | None) -> Iterator[None]:
    """Restores a model's state after the body, and which sets are active and trainable."""
    ledger = None if model is None else find_ledger(model)
    if model is None or ledger is None:
        yield
        return
    trained = {*ledger.trained}
    flags = {name: dict(each.requires_grad) for name, each in ledger.sets.items()}
    with undisturbed(model, autocast), activated(model, ledger, ledger.active):
        try:
            yield
        finally:
            ledger.trained = trained & ledger.sets.keys()
            for name in flags.keys() & ledger.sets.keys():
                ledger.sets[name].requires_grad = flags[name]


@contextmanager
def _counted(model: nn.Module, name: str) -> Iterator[dict[str, int]]:
    """Counts in the body how often the adapter at each site of a set runs."""
    spec = ledger_of(model).set_named(name).spec
    runs = dict.fromkeys((site.name for site in spec.sites), 0)

    def count(site: str) -> None:
        runs[site] += 1

    with ExitStack() as stack:
        for site in spec.sites:
            handle = adapter_of(model, spec, site).register_forward_pre_hook(
                lambda _module, _args, site=site.name: count(site)
            )
            stack.callback(handle.remove)
        yield runs


@contextmanager
def _running(model: nn.Module | None) -> Iterator[list[str]]:
    """Collects the names of a model's modules that run in the body."""
    names = (
        {id(module): name or "the model" for name, module in nn.Module.named_modules(model)}
        if model is not None
        else {}
    )
    running: list[str] = []

    def record(module: nn.Module, _args: object) -> None:
        if id(module) in names and names[id(module)] not in running:
            running.append(names[id(module)])

    handle = nn.modules.module.register_module_forward_pre_hook(record)
    try:
        yield running
    finally:
        handle.remove()


@contextmanager
def sets_kept(model: nn.Module, target: Path, sets: Iterable[AdapterSet]) -> Iterator[None]:
    """Restores a model's sets after the body, and raises if the body changed them.

    Args:
        model: The model.
        target: The file, for the report.
        sets: The sets to check.

    Raises:
        VerificationError: The metric or probe in the body changed a set.
    """
    ledger = find_ledger(model)
    names = list(ledger.sets) if ledger else []
    before = {
        adapter_set.spec.name: (adapter_set, adapter_state_dict(model, adapter_set.spec.name))
        for adapter_set in sets
    }
    try:
        yield
    except BaseException:
        with suppress(AdapterError):
            _restore_sets(model, names, before)
        raise
    if changed := _restore_sets(model, names, before):
        detail = f"the metric or the probe changed the live model: {'; '.join(changed)}"
        raise failure_of(
            report_of(target, [Check("tensors", "failed", detail)], "the model changed")
        )


def _restore_sets(
    model: nn.Module,
    names: Collection[str],
    before: Mapping[str, tuple[AdapterSet, dict[str, Tensor]]],
) -> list[str]:
    """Restores sets where possible, and returns a description of each change."""
    ledger = find_ledger(model)
    there = ledger.sets if ledger else {}
    changed = []
    for name in [name for name in there if name not in names]:
        remove_adapters(model, name)
        changed.append(f"{name!r} was added, and is removed again")
    for name, (adapter_set, tensors) in before.items():
        if there.get(name) is not adapter_set:
            changed.append(f"{name!r} was removed")
            continue
        try:
            if same(tensors, adapter_state_dict(model, name)):
                continue
            convert_set(model, adapter_set, tensors)
            load_adapter_state_dict(model, tensors, name)
            changed.append(f"{name!r} was changed, and is restored")
        except AdapterError as error:
            changed.append(f"{name!r} cannot be restored: {error}")
    return changed
