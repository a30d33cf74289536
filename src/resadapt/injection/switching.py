"""Changing the active set: its head, its flags, its slots and its norm policy take the place of another's."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial

from torch import nn

from resadapt.base.errors import InjectionError
from resadapt.base.names import listing
from resadapt.base.undisturbed import put_over
from resadapt.injection.freeze import as_built, freeze_norm, freeze_norms, is_held, running_as_built, thaw_norm
from resadapt.injection.ledger import AdapterSet, Ledger, adapter_of, adapter_tensors, find_ledger, own_tensors
from resadapt.injection.mixture import Mixture, run_own
from resadapt.injection.owned import check_places, exchange, follow, replaced
from resadapt.injection.place import follow_flags, in_place_of
from resadapt.injection.sharding import are_sharded
from resadapt.injection.walk import backbone_modules, find_module, slots_of

__all__ = ["activate", "activated", "check_intact", "check_switchable", "mixed", "on_plain", "switch", "train"]


def activate(model: nn.Module, ledger: Ledger, name: str | None) -> None:
    """Makes one set, or none, the one that the model runs with; which ones are trained stays as it is.

    Raises:
        InjectionError: Something of the sets is no longer in its place; nothing was changed.
    """
    if name == ledger.active and ledger.mixing is None:
        return
    check_switchable(model, ledger, [ledger.sets[each] for each in ledger.sets.keys() & {name, ledger.active}])
    if old := ledger.active_set:
        old.parked = exchange(model, ledger.parked_plain)
        ledger.parked_plain = {}
        _rest(model, old)
    ledger.active = name
    new = ledger.active_set
    if new:
        ledger.parked_plain = exchange(model, new.parked)
        new.parked = {}
        _wake(model, new)
    for slot in slots_of(model):
        slot.activate(name)
    freeze_norms(model, running_as_built(new.spec) if new else ())


def switch(model: nn.Module, ledger: Ledger, name: str | None) -> None:
    """Makes a set the active one for good: the gradients of those left go, so that no optimizer can apply them later.

    Raises:
        InjectionError: As `activate`.
    """
    activate(model, ledger, name)
    train(model, ledger, () if name is None else (name,))


def train(model: nn.Module, ledger: Ledger, names: Collection[str]) -> None:
    """Has the adapters of some sets trained and those of no others, whose gradients go, so that no optimizer can apply them later.

    Raises:
        InjectionError: An adapter is no longer in its place; nothing was changed.
    """
    tensors = {name: dict(adapter_tensors(model, ledger.sets[name].spec)) for name in ledger.trained ^ {*names}}
    for name, own in tensors.items():
        record = ledger.sets[name]
        if name in ledger.trained:
            record.parked_requires_grad = {path: tensor.requires_grad for path, tensor in own.items()}
            for tensor in (*own.values(), *own_tensors(model, record).values()):
                tensor.grad = None
        for path, tensor in own.items():
            tensor.requires_grad_(name not in ledger.trained and record.parked_requires_grad.get(path, tensor.requires_grad))
    ledger.trained = {*names}


@contextmanager
def activated(model: nn.Module, ledger: Ledger, name: str | None) -> Iterator[None]:
    """Runs the body with one set, or none, active; the set that was active before becomes so again, if it is still there."""
    active = ledger.active
    activate(model, ledger, name)
    try:
        yield
    finally:
        if ledger.sets:  # the body may have removed them
            activate(model, ledger, active if active in ledger.sets else None)


@contextmanager
def on_plain(model: nn.Module) -> Iterator[None]:
    """Runs the body on the plain backbone, of the classes that it was built with, whether anything was injected or not.

    Raises:
        InjectionError: As `check_switchable`, of all sets: the body is to put another one beside them.
    """
    ledger = find_ledger(model)
    if ledger:
        check_switchable(model, ledger)
    with activated(model, ledger, None) if ledger else nullcontext(), as_built(module for _, module in backbone_modules(model)):
        yield


@contextmanager
def mixed(model: nn.Module, ledger: Ledger, mixture: Mixture) -> Iterator[None]:
    """Runs the body with the sets of a mixture, all of them trainable; they stay so until the active set is changed."""
    mixing = tuple(name for name in dict.fromkeys(mixture.names) if name is not None)
    records = [ledger.sets[name] for name in mixing]
    check_switchable(model, ledger, records)
    train(model, ledger, ledger.trained | {*mixing})
    with activated(model, ledger, None), ExitStack() as stack:
        for record in records:
            _wake(model, record)
            stack.callback(_rest, model, record)
            for place, module in record.parked.items():
                here = find_module(model, place)
                follow(module, here)
                stack.enter_context(in_place_of(here, module))
                mixture.own.setdefault(place, {})[record.spec.name] = module
        for slot in slots_of(model):
            slot.mixture = mixture
            stack.callback(setattr, slot, "mixture", None)
        for place, modules in mixture.own.items():
            here = find_module(model, place)
            flags = partial(follow_flags, model if is_held(here) else here)
            stack.enter_context(put_over(here, "forward", partial(run_own, flags, place, modules, mixture, here.forward)))
        ledger.mixing = mixing
        stack.callback(setattr, ledger, "mixing", None)
        yield


def check_intact(model: nn.Module, ledger: Ledger, records: Iterable[AdapterSet] | None = None) -> None:
    """Checks that everything of some sets, or of all, is where it was put.

    Raises:
        InjectionError: An adapter or head is no longer in its place.
    """
    for record in ledger.sets.values() if records is None else records:
        list(adapter_tensors(model, record.spec))
        if gone := replaced(model, record.spec.own):
            raise InjectionError(
                f"The set {record.spec.name!r} has lost {listing(gone)}: it was replaced after the injection. Put the injected "
                "module back."
            )
        check_places(model, record.parked)
    check_places(model, ledger.parked_plain)


def check_switchable(model: nn.Module, ledger: Ledger, records: Iterable[AdapterSet] | None = None) -> None:
    """Checks that some sets, or all, can be switched and removed, so that what follows cannot fail half-way.

    Raises:
        InjectionError: An adapter or head is no longer in its place, the model is sharded, or a batch is being mixed.
    """
    if ledger.mixing is not None:
        raise InjectionError("Inside adapters_for sets cannot be switched, injected, removed or saved. Leave it first.")
    check_intact(model, ledger, records)
    if are_sharded(module for _, module in backbone_modules(model)):
        raise InjectionError(
            "The model is sharded (fully_shard), which ties its parameters to their places. Switch or remove sets before sharding."
        )


def _wake(model: nn.Module, record: AdapterSet) -> None:
    """Lets the norms inside a set's adapters run as they were built."""
    for site in record.spec.sites:
        adapter = adapter_of(model, record.spec, site)
        for module in adapter.modules():
            if thaw_norm(module):
                module.training = adapter.training


def _rest(model: nn.Module, record: AdapterSet) -> None:
    """Fixes the statistics of the norms inside a set's adapters: what starts all of a model's norms anew must not reach these."""
    for site in record.spec.sites:
        for module in adapter_of(model, record.spec, site).modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                freeze_norm(module)
