"""The record of an injected model: its sets, and its state before the injection.

The record refers to no module of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from resadapt.adapters import Adapter
from resadapt.base.errors import AdapterError, AdapterKeyError, InjectionError, quote_names
from resadapt.base.fingerprint import Fingerprint
from resadapt.base.spec import SetSpec, SiteSpec
from resadapt.injection.private import private_module
from resadapt.injection.walk import (
    backbone_modules,
    backbone_tensors,
    find_module,
    find_slot,
    slots_of,
    unwrap,
)

__all__ = [
    "LEDGER",
    "AdapterSet",
    "Ledger",
    "adapter_of",
    "adapter_tensors",
    "backbone_differences",
    "find_ledger",
    "ledger_of",
    "set_modules",
    "set_tensors",
]

LEDGER = "_resadapt"
"""Attribute of the injected model that holds its ledger."""


@dataclass
class AdapterSet:
    """One set: the description, and the results of the checks made so far."""

    spec: SetSpec
    example: Any = None
    """Form of the example input, from which a probe can be generated."""
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of the adapters' tensors when built, by ``site.tensor``."""
    requires_grad: dict[str, bool] = field(default_factory=dict)
    """Flags of the set's tensors, saved while the set is not trained, by name in the model."""
    trainable: set[str] = field(default_factory=set)
    """The tensors that require a gradient when built, by name in the set."""
    runs_checked: bool = False
    """Whether a forward has shown which adapters and private modules run."""
    gradients_checked: bool = False
    """Whether a forward in train mode has shown which of them get a gradient."""


@dataclass
class Ledger:
    """The state of an injected model."""

    fingerprint: Fingerprint
    requires_grad: dict[str, bool]
    training: dict[str, bool]
    frozen: tuple[str, ...] = ()
    """The backbone's modules whose running statistics are frozen."""
    sets: dict[str, AdapterSet] = field(default_factory=dict)
    active: str | None = None
    mixing: tuple[str, ...] | None = None
    """The sets of the samples in the current batch, inside `adapters_for`; else None."""
    trained: set[str] = field(default_factory=set)
    """The trainable sets: the set activated last, and the sets of mixed batches since."""
    told: tuple[bool, bool] = (False, False)
    """Whether the last training forward found the running sets frozen, and the backbone thawed."""

    @property
    def active_set(self) -> AdapterSet | None:
        """The active set, or None."""
        return None if self.active is None else self.sets[self.active]

    @property
    def needed_set(self) -> AdapterSet:
        """The active set; raises if no set is active."""
        if self.active is None:
            raise InjectionError(
                "No adapter set is active. Call set_active_adapters(model, name) first."
            )
        return self.sets[self.active]

    @property
    def running(self) -> list[AdapterSet]:
        """The sets that a forward uses now: the active set, or those of a mixed batch."""
        names = (self.active,) if self.mixing is None else self.mixing
        return [self.sets[name] for name in names if name is not None]

    def set_named(self, name: object) -> AdapterSet:
        """Returns a set by name; the error for an unknown name lists the sets."""
        if not isinstance(name, str):
            raise AdapterError(
                f"name={name!r} is {type(name).__name__}: give the name of a set, a string, one of "
                f"{quote_names(self.sets)}."
            )
        if name not in self.sets:
            raise AdapterKeyError(
                f"There is no adapter set {name!r}; the model has {quote_names(self.sets)}."
            )
        return self.sets[name]

    def chosen(self, name: object) -> AdapterSet:
        """Returns the named set; without a name the active set, or the only set."""
        if name is None:
            name = self.active or (next(iter(self.sets)) if len(self.sets) == 1 else None)
        if name is None:
            raise AdapterKeyError(
                f"No adapter set is active; the model has {quote_names(self.sets)}. Choose a set "
                "with name=."
            )
        return self.set_named(name)


def find_ledger(model: nn.Module) -> Ledger | None:
    """Returns the ledger of a model, or None if nothing was injected into it."""
    ledger = unwrap(model).__dict__.get(LEDGER)
    return ledger if isinstance(ledger, Ledger) else None


def ledger_of(model: nn.Module) -> Ledger:
    """Returns the ledger of a model.

    Raises:
        InjectionError: Nothing was injected, or a submodule or parent was injected into instead.
    """
    if ledger := find_ledger(model):
        return ledger
    inside = [name for name, module in nn.Module.named_modules(model) if LEDGER in module.__dict__]
    if inside:
        hint = f"Its submodule {inside[0]!r} was: pass model.get_submodule({inside[0]!r})."
    elif next(slots_of(model), None) is not None:
        hint = "It is part of an injected model: pass the whole model."
    else:
        hint = "Call inject_adapters(model, ...) first."
    raise InjectionError(f"This {type(model).__name__} was not injected into. {hint}")


def adapter_of(model: nn.Module, spec: SetSpec, site: SiteSpec) -> Adapter:
    """Returns a set's adapter at a site.

    Raises:
        InjectionError: The adapter is no longer there.
    """
    slot = find_slot(find_module(model, site.owner))
    if slot is None or spec.name not in slot.sites:
        raise InjectionError(
            f"Module {site.owner!r} has lost its adapter of set {spec.name!r}: it was replaced "
            "after the injection. Put the injected module back, or inject again into a fresh model."
        )
    adapter: Adapter = slot.get_submodule(spec.name)  # type: ignore[assignment]
    return adapter


def adapter_tensors(model: nn.Module, spec: SetSpec) -> Iterator[tuple[str, Tensor]]:
    """Yields the parameters and buffers of a set's adapters as ``site.tensor``."""
    for site in spec.sites:
        yield from backbone_tensors(adapter_of(model, spec, site), site.name)


def set_modules(model: nn.Module, spec: SetSpec) -> Iterator[tuple[str, nn.Module]]:
    """Yields a set's adapters by site, then the private modules by name in the backbone.

    Raises:
        InjectionError: An adapter or private module is no longer there.
    """
    for site in spec.sites:
        yield f"adapter at {site.name}", adapter_of(model, spec, site)
    for name in spec.private:
        yield name, private_module(model, spec, name)


def set_tensors(model: nn.Module, spec: SetSpec) -> dict[str, Tensor]:
    """Returns the parameters and buffers of a set, by names that are unique within the set."""
    return {
        f"{name}: {path}": tensor
        for name, module in set_modules(model, spec)
        for path, tensor in backbone_tensors(module)
    }


def backbone_differences(
    model: nn.Module, fingerprint: Fingerprint, head: tuple[str, ...] = ()
) -> dict[str, str]:
    """Compares the backbone of a model, injected into or not, with a fingerprint.

    Args:
        model: The whole model.
        fingerprint: The fingerprint that the backbone should have.
        head: Names of modules that are not compared.
    """
    return fingerprint.differences(
        dict(backbone_modules(model)), dict(backbone_tensors(model)), head
    )
