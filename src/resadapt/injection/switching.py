"""Changing the active set: its head, its flags, its slots and its norm policy take the place of another's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from resadapt.base.errors import InjectionError
from resadapt.base.names import listing
from resadapt.injection.freeze import apply_norm_policy
from resadapt.injection.heads import check_places, exchange, replaced_heads
from resadapt.injection.ledger import AdapterSet, Ledger, adapter_tensors
from resadapt.injection.sharding import sharded_tensors
from resadapt.injection.walk import slots_of

__all__ = ["activate", "activated", "check_intact", "check_switchable", "drop_gradients"]


def activate(model: nn.Module, ledger: Ledger, name: str | None) -> None:
    """Makes one set, or none, the one that the model runs with.

    Raises:
        InjectionError: Something of the sets is no longer in its place; nothing was changed.
    """
    if name == ledger.active:
        return
    check_switchable(model, ledger)
    if old := ledger.active_set:
        old.parked_head = exchange(model, ledger.parked_plain)
        ledger.parked_plain = {}
        _park_flags(model, old)
    ledger.active = name
    new = ledger.active_set
    if new:
        ledger.parked_plain = exchange(model, new.parked_head)
        new.parked_head = {}
        _restore_flags(model, new)
    for slot in slots_of(model):
        slot.activate(name)
    if new:
        apply_norm_policy(model, new.spec.norm, new.spec.head)
    else:
        apply_norm_policy(model, "frozen", ())


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


def check_intact(model: nn.Module, ledger: Ledger) -> None:
    """Checks that everything of the sets is where it was put.

    Raises:
        InjectionError: An adapter or head is no longer in its place.
    """
    for record in ledger.sets.values():
        list(adapter_tensors(model, record.spec))
        check_places(model, record.parked_head)
        if replaced := replaced_heads(model, record.spec.head):
            raise InjectionError(
                f"The head has lost {listing(replaced)}: it was replaced after the injection. Put the injected module back."
            )
    check_places(model, ledger.parked_plain)


def check_switchable(model: nn.Module, ledger: Ledger) -> None:
    """Checks that sets can be switched and removed, so that what follows cannot fail half-way.

    Raises:
        InjectionError: An adapter or head is no longer in its place, or the model is sharded.
    """
    check_intact(model, ledger)
    if sharded_tensors(model):
        raise InjectionError(
            "The model is sharded (fully_shard), which ties its parameters to their places. Switch or remove sets before sharding."
        )


def drop_gradients(model: nn.Module, record: AdapterSet) -> None:
    """Drops the gradients of a set that is no longer active, so that no optimizer can apply them later."""
    for tensor in (*dict(adapter_tensors(model, record.spec)).values(), *record.parked_head.values()):
        tensor.grad = None


def _park_flags(model: nn.Module, record: AdapterSet) -> None:
    for path, tensor in adapter_tensors(model, record.spec):
        record.parked_requires_grad[path] = tensor.requires_grad
        tensor.requires_grad_(False)


def _restore_flags(model: nn.Module, record: AdapterSet) -> None:
    for path, tensor in adapter_tensors(model, record.spec):
        tensor.requires_grad_(record.parked_requires_grad.get(path, tensor.requires_grad))
    record.parked_requires_grad = {}
