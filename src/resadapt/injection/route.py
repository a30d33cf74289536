"""Places where sets run private modules: a mixin over a module's class that calls the active set's module, if it has one there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from typing_extensions import override

from resadapt.base.errors import InjectionError
from resadapt.base.overlay import Overlay, class_of, mixin_of, put_class
from resadapt.injection.slots import AdapterSlot
from resadapt.injection.walk import behind_wrappers, find_slot

__all__ = ["call_places", "holder_of", "private_of", "route", "running_at", "unroute"]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_PLACE = "_resadapt_place"
"""Attribute of a module that routes: its name in the model. A slice of a Sequential has the class but not the name."""


class Routed(Overlay):
    """Runs the active set's private module in place of the module's forward, if the set has one."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the output of the private module, or of the module itself."""
        slot = _slot(self)  # type: ignore[arg-type]
        if slot is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        place: str = self._resadapt_place  # type: ignore[attr-defined]
        if slot.mixture is None:
            private = slot.private(slot.active, place)
            return super().forward(*args, **kwargs) if private is None else private(*args, **kwargs)  # type: ignore[misc]
        stock = super().forward  # type: ignore[misc]

        def run(name: str | None, values: Any) -> Any:
            rows, keywords = values
            return (slot.private(name, place) or stock)(*rows, **keywords)

        return slot.mixture.run(place, {name for name in slot.routes if slot.private(name, place)}, run, (args, kwargs))

    @override
    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles the class by the one beneath it: this one is made at run time."""
        reduced: Any = super().__reduce_ex__(2)
        return _blank, (class_of(self),), *reduced[2:]  # type: ignore[arg-type]


def _blank(kind: type[nn.Module]) -> nn.Module:
    """Returns a routed module of a class, without content."""
    module = kind.__new__(kind)
    put_class(module, kind, Routed)
    return module


def route(module: nn.Module, place: str) -> tuple[nn.Module, str]:
    """Has a module run private modules.

    Args:
        module: A module of the backbone.
        place: A name of it.

    Returns:
        The module that is to carry the slot, and the name that private modules are to be known by: one module may have several.

    Raises:
        InjectionError: Its class cannot be extended, or a forward on the instance would run before the class's.
    """
    if "forward" in module.__dict__:
        raise InjectionError(
            f"The forward of {place!r} was replaced on the instance, and a set's module could not run in its place. Take it off "
            "before the injection; it can be put on again afterwards."
        )
    if mixin_of(module) is not Routed:
        try:
            put_class(module, class_of(module), Routed)
        except TypeError as error:
            raise InjectionError(f"{place!r}: {type(module).__name__} is a class that cannot be derived from: {error}.") from error
    return holder_of(module), module.__dict__.setdefault(_PLACE, place)


def unroute(module: nn.Module) -> None:
    """Has a module run itself again."""
    if mixin_of(module) is Routed:
        put_class(module, class_of(module), None)
    module.__dict__.pop(_PLACE, None)


def private_of(module: nn.Module, name: str) -> nn.Module | None:
    """Returns what a set runs in place of a module of the backbone, None if it has nothing there."""
    slot = _slot(module)
    return None if slot is None else slot.private(name, module.__dict__[_PLACE])


def running_at(module: nn.Module) -> nn.Module | None:
    """Returns what runs when a module is called: itself, or a private module; None in a mixed batch, where each sample decides."""
    slot = _slot(module)
    if slot is None:
        return module
    return slot.private(slot.active, module.__dict__[_PLACE]) or module if slot.mixture is None else None


def holder_of(module: nn.Module) -> nn.Module:
    """Returns the module that carries the slot for a place: itself, or for a container the last module inside.

    A container may run over its children, so a slot cannot be one of them.

    Raises:
        InjectionError: The container is empty.
    """
    module = behind_wrappers(module)
    while isinstance(module, _CONTAINERS):
        children = [child for child in module._modules.values() if child is not None]
        if not children:
            raise InjectionError(f"An empty {type(module).__name__} cannot be a head: use torch.nn.Identity() in its place.")
        module = behind_wrappers(children[-1])
    return module


def call_places(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Walks the outermost modules that are called: the module itself, or those inside of a container without a forward."""
    module = behind_wrappers(module)
    if type(module).forward is not nn.Module.forward or "forward" in module.__dict__:
        yield name, module
        return
    for key, child in module._modules.items():
        if child is not None and not isinstance(child, AdapterSlot):
            yield from call_places(child, f"{name}.{key}")


def _slot(module: nn.Module) -> AdapterSlot | None:
    return find_slot(holder_of(module)) if _PLACE in module.__dict__ and isinstance(module, Routed) else None
