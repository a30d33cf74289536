"""What a model with a set gives, collected without leaving a trace: tensors, outputs on a probe, a metric."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from resadapt.base.errors import AdapterError
from resadapt.base.undisturbed import undisturbed
from resadapt.injection.ledger import adapter_of, ledger_of
from resadapt.injection.switching import activated
from resadapt.proof.probe import ProbeRun
from resadapt.proof.state import adapter_state_dict, load_adapter_state_dict

__all__ = ["Evidence", "Metric", "collect"]

Metric = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Evidence:
    """What a model gives with one of its sets.

    Args:
        tensors: The set's tensors.
        run: What the model returned on a probe.
        idle: Sites whose adapters did not run on the probe.
        metric: The metric's value, None if there is no metric.
        bystanders_on_probe: Names of another model's modules that ran with it on the probe.
        bystanders_in_metric: Names of those that ran in its metric.
    """

    tensors: dict[str, Tensor]
    run: ProbeRun
    idle: tuple[str, ...]
    metric: float | None
    bystanders_on_probe: tuple[str, ...] = ()
    bystanders_in_metric: tuple[str, ...] = ()


def collect(
    model: nn.Module, name: str, run: Callable[[], ProbeRun], metric: Metric | None, bystander: nn.Module | None = None
) -> Evidence:
    """Collects what a model gives with a set.

    Args:
        model: An injected model.
        name: The set.
        run: Runs the model on a probe.
        metric: A function from a model to a number.
        bystander: Another model, of which no module should run.

    Raises:
        AdapterError: The metric returns no number.
    """
    ledger = ledger_of(model)
    with activated(model, ledger, name):
        tensors = adapter_state_dict(model, name)
        try:
            with _running(bystander) as on_probe, _idle_sites(model, name) as idle:
                outputs = run()
            with _running(bystander) as in_metric:
                value = None if metric is None else _evaluate(metric, model)
        except BaseException:
            with suppress(AdapterError):  # if it is still there, and of the form that it had
                load_adapter_state_dict(model, tensors, name)
            raise
    return Evidence(tensors, outputs, tuple(idle), value, tuple(on_probe), tuple(in_metric))


def _evaluate(metric: Metric, model: nn.Module) -> float:
    ledger = ledger_of(model)
    # The set is put back before flags and buffers are, which are those of the set's own head.
    with undisturbed(model), activated(model, ledger, ledger.active):
        value: Any = metric(model)
    try:
        if isinstance(value, str | bytes):
            raise TypeError(f"{value!r} is text")
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise AdapterError(f"metric returned {type(value).__name__}, not a number: {error}. Return a float.") from error


@contextmanager
def _idle_sites(model: nn.Module, name: str) -> Iterator[list[str]]:
    """Collects the sites of a set, and strikes off those whose adapters run in the body."""
    spec = ledger_of(model).set_named(name).spec
    idle = [site.name for site in spec.sites]

    def strike_off(site: str) -> None:
        if site in idle:
            idle.remove(site)

    with ExitStack() as stack:
        for site in spec.sites:
            adapter = adapter_of(model, spec, site)
            handle = adapter.register_forward_pre_hook(lambda _module, _args, site=site.name: strike_off(site))
            stack.callback(handle.remove)
        yield idle


@contextmanager
def _running(model: nn.Module | None) -> Iterator[list[str]]:
    """Collects the names of a model's modules that run in the body."""
    names = {id(module): name or "the model" for name, module in nn.Module.named_modules(model)} if model is not None else {}
    running: list[str] = []

    def record(module: nn.Module, _args: object) -> None:
        if id(module) in names and names[id(module)] not in running:
            running.append(names[id(module)])

    handle = nn.modules.module.register_module_forward_pre_hook(record)
    try:
        yield running
    finally:
        handle.remove()
