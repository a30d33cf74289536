"""A set's private modules.

Where they run in place of the backbone's, and how they are copied from these.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from typing_extensions import override

from resadapt.base.errors import InjectionError
from resadapt.base.overlay import Overlay, class_of, mixin_of, put_class
from resadapt.base.spec import SetSpec
from resadapt.injection.slots import SLOT, AdapterSlot
from resadapt.injection.walk import (
    backbone_modules,
    backbone_tensors,
    behind_wrappers,
    find_module,
    find_slot,
)

__all__ = [
    "HOOKS",
    "call_places",
    "computing_hooks",
    "holder_of",
    "lost_modules",
    "private_copies",
    "private_module",
    "private_modules",
    "private_of",
    "private_tensors",
    "route",
    "running_at",
    "unroute",
]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_PLACE = "_resadapt_place"
"""Attribute of a module that routes.

Its name in the model. A slice of a Sequential has the class but not the name.
"""


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

        return slot.mixture.run(
            place, {name for name in slot.routes if slot.private(name, place)}, run, (args, kwargs)
        )

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
        The module that is to carry the slot, and the name that private modules are to be known by:
        one module may have several.

    Raises:
        InjectionError: Its class cannot be extended, or a forward on the instance would run before
            the class's.
    """
    if "forward" in module.__dict__:
        raise InjectionError(
            f"The forward of {place!r} was replaced on the instance, and a set's module could not "
            "run in its place. Take it off before the injection; it can be put on again afterwards."
        )
    if mixin_of(module) is not Routed:
        try:
            put_class(module, class_of(module), Routed)
        except TypeError as error:
            raise InjectionError(
                f"{place!r}: {type(module).__name__} is a class that cannot be derived from: "
                f"{error}."
            ) from error
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
    """Returns what runs when a module is called.

    Itself, or a private module; None in a mixed batch, where each sample decides.
    """
    slot = _slot(module)
    if slot is None:
        return module
    return (
        slot.private(slot.active, module.__dict__[_PLACE]) or module
        if slot.mixture is None
        else None
    )


def holder_of(module: nn.Module) -> nn.Module:
    """Returns the module that carries the slot for a place: itself, or for a container the last
    module inside.

    A container may run over its children, so a slot cannot be one of them.

    Raises:
        InjectionError: The container is empty.
    """
    module = behind_wrappers(module)
    while isinstance(module, _CONTAINERS):
        children = [child for child in module._modules.values() if child is not None]
        if not children:
            raise InjectionError(
                f"An empty {type(module).__name__} cannot be a head: use torch.nn.Identity() in "
                "its place."
            )
        module = behind_wrappers(children[-1])
    return module


def call_places(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Walks the outermost modules that are called.

    The module itself, or those inside of a container without a forward.
    """
    module = behind_wrappers(module)
    if type(module).forward is not nn.Module.forward or "forward" in module.__dict__:
        yield name, module
        return
    for key, child in module._modules.items():
        if child is not None and not isinstance(child, AdapterSlot):
            yield from call_places(child, f"{name}.{key}")


def _slot(module: nn.Module) -> AdapterSlot | None:
    return (
        find_slot(holder_of(module))
        if _PLACE in module.__dict__ and isinstance(module, Routed)
        else None
    )


HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *(
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
        "_backward_hooks",
        "_backward_pre_hooks",
    ),
    *(
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
        "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks",
    ),
)
_COMPUTING = (WeightNorm, SpectralNorm, BasePruningMethod)
"""Forward pre-hooks of torch that compute a module's tensors from others."""


def private_module(model: nn.Module, spec: SetSpec, name: str) -> nn.Module:
    """Returns the module that a set runs in place of one of the backbone.

    Raises:
        InjectionError: It is no longer there.
    """
    private = private_of(find_module(model, name), spec.name)
    if private is None:
        raise InjectionError(
            f"The set {spec.name!r} has lost {name!r}: it was replaced after the injection. Put "
            "the injected module back."
        )
    return private


def private_modules(model: nn.Module, spec: SetSpec) -> Iterator[tuple[str, nn.Module]]:
    """Walks the modules of a set's head and norms, with those inside them, by the backbone's names."""
    for name in spec.private:
        yield from backbone_modules(private_module(model, spec, name), name)


def private_tensors(
    model: nn.Module, spec: SetSpec, names: Iterable[str] | None = None
) -> dict[str, Tensor]:
    """Returns the parameters and buffers of a set's head and norms, or of some of them, by the backbone's names."""
    chosen = spec.private if names is None else names
    return {
        path: tensor
        for name in chosen
        for path, tensor in backbone_tensors(private_module(model, spec, name), name)
    }


def lost_modules(model: nn.Module, spec: SetSpec) -> list[str]:
    """Names the modules of the backbone that no longer run a set's private ones, since others were put there."""
    lost = []
    for name in spec.private:
        try:
            private_module(model, spec, name)
        except InjectionError:
            lost.append(name)
    return lost


@torch.no_grad()
def private_copies(
    model: nn.Module, names: Iterable[str], given: Mapping[str, nn.Module]
) -> dict[str, nn.Module]:
    """Returns copies of the backbone's modules, or of those given for their places, in which
    everything can be trained.

    Raises:
        InjectionError: A module cannot be copied, has no values yet, or is given for two places.
    """
    sources = {name: given[name] if name in given else find_module(model, name) for name in names}
    _check_one_to_one(model, sources)
    memo: dict[int, Any] = {}  # one for all, so that what was tied stays tied
    for name, source in sources.items():
        for _, module in backbone_modules(source, name):
            for key, value in module.__dict__.items():
                if key in HOOKS:
                    memo[id(value)] = type(value)(
                        computing_hooks(module) if key == "_forward_pre_hooks" else ()
                    )
                elif isinstance(
                    value, Tensor
                ):  # computed, as by weight_norm, and computed anew in every forward
                    memo[id(value)] = value.detach().clone()
            if slot := find_slot(module):
                memo[id(slot)] = nn.Identity()
        for path, tensor in backbone_tensors(source, name):
            if is_lazy(tensor) or (name in given and tensor.is_meta):
                raise InjectionError(
                    f"head: {path!r} has no values yet. Run the module once, or load its weights, "
                    "and then inject."
                )
            trains = tensor.is_floating_point() or tensor.is_complex()
            copied = tensor.clone()
            memo[id(tensor)] = (
                nn.Parameter(copied, trains) if isinstance(tensor, nn.Parameter) else copied
            )
    copies = {}
    for name, source in sources.items():
        try:
            copies[name] = copy.deepcopy(source, memo)
        except Exception as error:
            raise InjectionError(
                f"Module {name!r} cannot be copied: {type(error).__name__}: {error}"
            ) from error
        _check_independent(name, source, copies[name])
        for _, module in backbone_modules(copies[name]):
            module._modules.pop(SLOT, None)
            module.__dict__.pop("forward", None)
        _convert(copies[name], find_module(model, name))
    return copies


def computing_hooks(module: nn.Module) -> dict[int, Any]:
    """Returns a module's pre-hooks that compute its tensors."""
    return {
        key: hook for key, hook in module._forward_pre_hooks.items() if isinstance(hook, _COMPUTING)
    }


def _convert(copied: nn.Module, place: nn.Module) -> None:
    """Brings a copy to the device and the floating-point dtype of the module in whose place it runs."""
    there = dict(backbone_tensors(place))
    usual = next((tensor for tensor in there.values() if tensor.is_floating_point()), None)
    for path, tensor in backbone_tensors(copied):
        like = there.get(path, usual)
        if like is not None and not like.is_meta:
            floats = tensor.is_floating_point() and like.is_floating_point()
            tensor.data = tensor.data.to(like.device, like.dtype if floats else tensor.dtype)


def _check_independent(name: str, source: nn.Module, other: nn.Module) -> None:
    parts = {id(part) for part in (*source.modules(), *source.parameters(), *source.buffers())}
    if any(id(part) in parts for part in (*other.modules(), *other.parameters(), *other.buffers())):
        raise InjectionError(
            f"Module {name!r} cannot be copied: its own __deepcopy__ returns something that shares "
            "its parts."
        )


def _check_one_to_one(model: nn.Module, sources: Mapping[str, nn.Module]) -> None:
    """Refuses one module for two places, and two modules for a place that has two names."""
    pairs = [(find_module(model, name), source) for name, source in sources.items()]
    for number, (place, source) in enumerate(pairs):
        for other_place, other in pairs[:number]:
            if (place is other_place) is not (source is other):
                raise InjectionError(
                    f"head: {list(sources)[number]!r} cannot have a module that stands for another "
                    "place too, or another one than its other name. Give each place one module of "
                    "its own."
                )
