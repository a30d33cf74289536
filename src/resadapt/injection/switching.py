"""Changing which sets are active and which are trainable."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext

from torch import nn

from resadapt.base.errors import InjectionError, quote_names
from resadapt.base.overlay import stock_classes
from resadapt.injection.freeze import allow_statistics_reset, block_statistics_reset
from resadapt.injection.ledger import AdapterSet, Ledger, find_ledger, set_modules, set_tensors
from resadapt.injection.mixture import Mixture
from resadapt.injection.walk import backbone_modules, reshard, slots_of

__all__ = [
    "activate",
    "activated",
    "check_switchable",
    "lone_samples_refused",
    "mixed",
    "on_backbone",
    "switch",
    "train",
]


def activate(model: nn.Module, ledger: Ledger, name: str | None) -> None:
    """Makes one set, or none, active; which sets are trainable does not change.

    Raises:
        InjectionError: A part of a set was lost; nothing was changed.
    """
    if name == ledger.active and ledger.mixing is None:
        return
    changing = [ledger.sets[each] for each in ledger.sets.keys() & {name, ledger.active}]
    check_switchable(model, ledger, changing)
    for adapter_set in changing:
        _set_statistics_reset(model, adapter_set, adapter_set.spec.name == name)
    ledger.active = name
    for slot in slots_of(model):
        slot.activate(name)


def switch(model: nn.Module, ledger: Ledger, name: str | None) -> None:
    """Makes a set the active set and the only trainable set.

    Raises:
        InjectionError: As `activate`.
    """
    activate(model, ledger, name)
    train(model, ledger, () if name is None else (name,))


def train(model: nn.Module, ledger: Ledger, names: Collection[str]) -> None:
    """Makes some sets trainable, and freezes all other sets.

    Gradients of the frozen sets are dropped, so that no optimizer can apply them later.

    Raises:
        InjectionError: A part of a set was lost; nothing was changed.
    """
    if changing := ledger.trained ^ {*names}:
        reshard(model)
        by_name = {name: set_tensors(model, ledger.sets[name].spec) for name in changing}
        for name, tensors in by_name.items():
            adapter_set, trained = ledger.sets[name], name not in ledger.trained
            if not trained:
                adapter_set.requires_grad = {
                    path: tensor.requires_grad for path, tensor in tensors.items()
                }
            for path, tensor in tensors.items():
                tensor.requires_grad_(
                    trained and adapter_set.requires_grad.get(path, tensor.requires_grad)
                )
                if not trained:
                    tensor.grad = None
    ledger.trained = {*names}


@contextmanager
def activated(model: nn.Module, ledger: Ledger, name: str | None) -> Iterator[None]:
    """Runs the body with one set, or none, active.

    The previously active set becomes active again, if it is still there.
    """
    active = ledger.active
    activate(model, ledger, name)
    try:
        yield
    finally:
        if ledger.sets:  # the body may have removed them
            activate(model, ledger, active if active in ledger.sets else None)


@contextmanager
def on_backbone(model: nn.Module) -> Iterator[None]:
    """Runs the body with no set active and every module of its stock class.

    The model may be injected or not.

    Raises:
        InjectionError: As `activate`.
    """
    ledger = find_ledger(model)
    with (
        activated(model, ledger, None) if ledger else nullcontext(),
        stock_classes(m for _, m in backbone_modules(model)),
    ):
        yield


@contextmanager
def mixed(model: nn.Module, ledger: Ledger, mixture: Mixture) -> Iterator[None]:
    """Runs the body with the sets of a mixture, all of them trainable.

    The sets stay trainable until the active set changes.
    """
    mixing = tuple(name for name in dict.fromkeys(mixture.names) if name is not None)
    mixed_sets = [ledger.sets[name] for name in mixing]
    check_switchable(model, ledger, mixed_sets)
    train(model, ledger, ledger.trained | {*mixing})
    with activated(model, ledger, None), ExitStack() as stack:
        for adapter_set in mixed_sets:
            _set_statistics_reset(model, adapter_set, True)
            stack.callback(_set_statistics_reset, model, adapter_set, False)
        for slot in slots_of(model):
            slot.mixture = mixture
            stack.callback(setattr, slot, "mixture", None)
        ledger.mixing = mixing
        stack.callback(setattr, ledger, "mixing", None)
        yield


@contextmanager
def lone_samples_refused(model: nn.Module, ledger: Ledger, mixture: Mixture) -> Iterator[None]:
    """Undoes the body's changes of statistics if a norm cannot use the only sample of a set.

    Raises:
        InjectionError: In place of the norm's error.
    """
    lone = [name for name in mixture.names if name and mixture.names.count(name) == 1]
    if not lone or not model.training:
        yield
        return
    buffers = [
        buffer
        for name in {*mixture.names} - {None}
        for _, module in set_modules(model, ledger.sets[name].spec)  # type: ignore[index]
        for buffer in module.buffers()
    ]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    except ValueError as error:
        if _ONE_VALUE not in str(error):
            raise
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
        raise InjectionError(
            f"A norm needs more than one value per channel in train mode, and the batch has a "
            f"single sample for {quote_names(lone)}. Give each set with norm='stats' two samples "
            "or none, or call model.eval(). The running statistics were restored."
        ) from error


_ONE_VALUE = "more than 1 value per channel when training"
"""Part of the message of torch.nn.functional.batch_norm."""


def check_switchable(
    model: nn.Module, ledger: Ledger, sets: Iterable[AdapterSet] | None = None
) -> None:
    """Checks that sets are complete and can be switched, so that a later step cannot fail half-way.

    Args:
        model: The model.
        ledger: The model's ledger.
        sets: The sets to check; None for all.

    Raises:
        InjectionError: A part of a set was lost, or the call is inside `adapters_for`.
    """
    if ledger.mixing is not None:
        raise InjectionError(
            "Inside adapters_for sets cannot be switched, injected, removed or saved. Leave the "
            "with block first."
        )
    for adapter_set in ledger.sets.values() if sets is None else sets:
        list(set_modules(model, adapter_set.spec))  # raises if one was lost


def _set_statistics_reset(model: nn.Module, adapter_set: AdapterSet, allowed: bool) -> None:
    """Allows or blocks `reset_running_stats` in a set's modules."""
    for _, module in set_modules(model, adapter_set.spec):
        (allow_statistics_reset if allowed else block_statistics_reset)(module)
