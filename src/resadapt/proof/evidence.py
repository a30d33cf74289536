"""What a model with a set gives, collected without leaving a trace: tensors, outputs on a probe, a metric."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from resadapt.base.errors import AdapterError
from resadapt.base.undisturbed import undisturbed
from resadapt.injection.ledger import adapter_of, find_ledger, ledger_of
from resadapt.injection.switching import activated
from resadapt.proof.probe import ProbeRun
from resadapt.proof.state import adapter_state_dict

__all__ = ["Evidence", "Metric", "collect", "measure"]

Metric = Callable[[nn.Module], float]


@dataclass(frozen=True)
class Evidence:
    """What a model gives with one of its sets.

    Args:
        tensors: The set's tensors.
        run: What the model returned on a probe.
        idle: Sites whose adapters did not run on the probe.
        bystanders: Names of another model's modules that ran with it on the probe.
        metric: The metric's value, None if there is no metric, or it was not measured so far.
    """

    tensors: dict[str, Tensor]
    run: ProbeRun
    idle: tuple[str, ...]
    bystanders: tuple[str, ...] = ()
    metric: float | None = None


def collect(
    model: nn.Module, name: str, run: Callable[[], ProbeRun], metric: Metric | None = None, bystander: nn.Module | None = None
) -> Evidence:
    """Collects what a model gives with a set.

    Args:
        model: An injected model.
        name: The set.
        run: Runs the model on a probe.
        metric: A function from a model to a number.
        bystander: Another model, of which no module should run on the probe.

    Raises:
        AdapterError: The metric returns no number.
    """
    ledger = ledger_of(model)
    with activated(model, ledger, name):
        tensors = adapter_state_dict(model, name)
        with _running(bystander) as on_probe, _idle_sites(model, name) as idle:
            outputs = run()
        value = None if metric is None else measure(model, metric)[0]
    return Evidence(tensors, outputs, tuple(idle), tuple(on_probe), value)


def measure(model: nn.Module, metric: Metric, bystander: nn.Module | None = None) -> tuple[float, tuple[str, ...]]:
    """Returns a metric of a model with its active set, and the names of the modules of another model that ran for it.

    Raises:
        AdapterError: The metric returns no number.
    """
    with _unchanged(model), _unchanged(bystander), _running(bystander) as running:
        value: Any = metric(model)
    try:
        if isinstance(value, str | bytes):
            raise TypeError(f"{value!r} is text")
        return float(value), tuple(running)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise AdapterError(f"metric returned {type(value).__name__}, not a number: {error}. Return a float.") from error


@contextmanager
def _unchanged(model: nn.Module | None) -> Iterator[None]:
    """Runs the body undisturbed, and restores which set is active and which ones are trained."""
    ledger = None if model is None else find_ledger(model)
    if model is None or ledger is None:
        yield
        return
    trained, flags = {*ledger.trained}, {name: dict(each.requires_grad) for name, each in ledger.sets.items()}
    with undisturbed(model), activated(model, ledger, ledger.active):
        try:
            yield
        finally:
            ledger.trained = trained & ledger.sets.keys()
            for name in flags.keys() & ledger.sets.keys():
                ledger.sets[name].requires_grad = flags[name]


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
