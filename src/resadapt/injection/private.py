"""A set's private modules: copying modules of the backbone, and running the copies instead."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from resadapt.base.errors import InjectionError
from resadapt.base.overlay import Mixin, class_of, mixin_of, put_class
from resadapt.base.spec import SetSpec
from resadapt.injection.own_dtype import dtype_of, in_own_dtype, promoted
from resadapt.injection.slots import SLOT, AdapterSlot, Part
from resadapt.injection.walk import (
    backbone_modules,
    backbone_tensors,
    behind_wrappers,
    find_module,
    find_slot,
    ids_of_parts,
)

__all__ = [
    "HOOKS",
    "call_places",
    "computing_hooks",
    "convert",
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
"""Attribute of a `Routed` module: the module's name in the model.

A slice of a Sequential has the class but not this attribute.
"""


class Routed(Mixin):
    """Runs the active set's private module, if any, in place of the module's forward."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the output of the private module, or of the backbone's module."""
        if not isinstance(self, Routed):  # bound before the class was restored
            return type(self).forward(self, *args, **kwargs)
        slot = _slot(self)  # type: ignore[arg-type]
        if slot is None:
            if _PLACE in self.__dict__:  # a slice of a Sequential has the class without the name
                raise InjectionError(
                    f"Module {self.__dict__[_PLACE]!r} has lost the private modules that sets run "
                    "in place of it: its last module was replaced, or another one was appended. "
                    "Undo that."
                )
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        place: str = self._resadapt_place  # type: ignore[attr-defined]
        stock = super().forward  # type: ignore[misc]

        def run(part: Part, values: Any) -> Any:
            rows, keywords = values
            private = part.private
            if private is None or part.place != place:
                return stock(*rows, **keywords)
            usual = dtype_of(self, without=SLOT)  # type: ignore[arg-type]
            if dtype_of(private) == usual:
                return private(*rows, **keywords)
            return in_own_dtype(private, rows, keywords, usual)

        def changes(name: str | None) -> bool:
            return slot.routes.get(name) == place  # type: ignore[arg-type]

        return slot.run(slot.choice(), place, changes, run, (args, kwargs))


def route(module: nn.Module, place: str) -> tuple[nn.Module, str]:
    """Makes a module run the active set's private module.

    Args:
        module: A module of the backbone.
        place: A name of the module.

    Returns:
        The module to put the slot on, and the name for private modules: a shared module keeps the
        name of the first call.

    Raises:
        InjectionError: The module's class cannot be subclassed, or a forward set on the instance
            would hide the class's.
    """
    holder = holder_of(module)
    if isinstance(holder, fx.GraphModule):
        raise InjectionError(
            f"{place!r} is an fx.GraphModule, whose copies keep only what its graph uses and would "
            "lose a set's private module. Inject before tracing, or name modules inside it."
        )
    if mixin_of(module) is not Routed:
        if "forward" in module.__dict__:
            raise InjectionError(
                f"The forward of {place!r} was replaced on the instance, so a set's private module "
                "could not run. Restore the forward, inject, and then replace it again."
            )
        try:
            put_class(module, class_of(module), Routed)
        except TypeError as error:
            raise InjectionError(
                f"{place!r}: the class {type(module).__name__} cannot be subclassed: {error}."
            ) from error
    return holder, module.__dict__.setdefault(_PLACE, place)


def unroute(module: nn.Module) -> None:
    """Undoes `route`."""
    if mixin_of(module) is Routed:
        put_class(module, class_of(module), None)
    module.__dict__.pop(_PLACE, None)


def private_of(module: nn.Module, name: str) -> nn.Module | None:
    """Returns the module that a set runs in place of a module of the backbone, or None."""
    slot = _slot(module)
    return None if slot is None else slot.private(name, module.__dict__[_PLACE])


def running_at(module: nn.Module) -> nn.Module | None:
    """Returns the module that runs when a module is called: the module or a private module.

    None in a mixed batch, where each sample decides.
    """
    slot = _slot(module)
    if slot is None:
        return module
    choice = slot.choice()
    if choice.mixture is not None:
        return None
    return slot.private(choice.active, module.__dict__[_PLACE], module)  # type: ignore[no-any-return]


def holder_of(module: nn.Module) -> nn.Module:
    """Returns the module that carries the slot: the module, or a container's last module.

    A container may iterate over its children, so the slot cannot be one of them.

    Raises:
        InjectionError: The container is empty.
    """
    module = behind_wrappers(module)
    while isinstance(module, _CONTAINERS):
        children = [child for child in module._modules.values() if child is not None]
        if not children:
            raise InjectionError(
                f"An empty {type(module).__name__} cannot be a head: use torch.nn.Identity() "
                "instead."
            )
        module = behind_wrappers(children[-1])
    return module


def call_places(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Yields the module, or the outermost modules with a forward inside a container without."""
    module = behind_wrappers(module)
    if type(module).forward is not nn.Module.forward or "forward" in module.__dict__:
        yield name, module
        return
    for key, child in module._modules.items():
        if child is not None and not isinstance(child, AdapterSlot):
            yield from call_places(child, f"{name}.{key}")


def _slot(module: nn.Module) -> AdapterSlot | None:
    if _PLACE not in module.__dict__ or not isinstance(module, Routed):
        return None
    return find_slot(holder_of(module))


HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_COMPUTING = (WeightNorm, SpectralNorm, BasePruningMethod)
"""Forward pre-hooks of torch that compute a module's weights from other tensors."""


def private_module(model: nn.Module, spec: SetSpec, name: str) -> nn.Module:
    """Returns the module that a set runs in place of a module of the backbone.

    Raises:
        InjectionError: The private module is no longer there.
    """
    private = private_of(find_module(model, name), spec.name)
    if private is None:
        raise InjectionError(
            f"The set {spec.name!r} has lost {name!r}: it was replaced after the injection. Put "
            "the injected module back."
        )
    return private


def private_modules(model: nn.Module, spec: SetSpec) -> Iterator[tuple[str, nn.Module]]:
    """Yields the modules of a set's head and norms, with submodules, by name in the backbone."""
    for name in spec.private:
        yield from backbone_modules(private_module(model, spec, name), name)


def private_tensors(
    model: nn.Module, spec: SetSpec, names: Iterable[str] | None = None
) -> dict[str, Tensor]:
    """Returns parameters and buffers of a set's private modules, by name in the backbone.

    Args:
        model: The model.
        spec: The set.
        names: The private modules to include; None for all.
    """
    chosen = spec.private if names is None else names
    return {
        path: tensor
        for name in chosen
        for path, tensor in backbone_tensors(private_module(model, spec, name), name)
    }


def lost_modules(model: nn.Module, spec: SetSpec) -> list[str]:
    """Returns the names of the private modules that were lost when their module was replaced."""
    lost = []
    for name in spec.private:
        try:
            private_module(model, spec, name)
        except InjectionError:
            lost.append(name)
    return lost


@torch.no_grad()
def private_copies(
    model: nn.Module,
    names: Iterable[str],
    given: Mapping[str, nn.Module],
    dtype: torch.dtype | None = None,
) -> dict[str, nn.Module]:
    """Returns trainable copies of modules of the backbone.

    Args:
        model: The model.
        names: Names of the modules to copy.
        given: Modules to copy instead, by name in the backbone.
        dtype: Least dtype of the copies; None for the dtypes of the backbone's modules.

    Raises:
        InjectionError: A module cannot be copied, has no values yet, or is given for two places.
    """
    sources = {name: given[name] if name in given else find_module(model, name) for name in names}
    _check_one_to_one(model, sources)
    memo: dict[int, Any] = {}  # shared by all copies, so that tied tensors stay tied
    for name, source in sources.items():
        for _, module in backbone_modules(source, name):
            for key, value in module.__dict__.items():
                if key in HOOKS:
                    memo[id(value)] = type(value)(
                        computing_hooks(module) if key == "_forward_pre_hooks" else ()
                    )
                elif isinstance(value, Tensor):  # computed in every forward, as by weight_norm
                    memo[id(value)] = value.detach().clone()
            if slot := find_slot(module):
                memo[id(slot)] = nn.Identity()
        for path, tensor in backbone_tensors(source, name):
            if is_lazy(tensor) or (name in given and tensor.is_meta):
                raise InjectionError(
                    f"head: {path!r} has no values yet. Run the module once, or load its weights, "
                    "and then inject."
                )
            copied = tensor.clone()
            if isinstance(tensor, nn.Parameter):
                copied = nn.Parameter(copied, copied.is_floating_point() or copied.is_complex())
            memo[id(tensor)] = copied
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
        convert(copies[name], find_module(model, name), dtype)
    return copies


def computing_hooks(module: nn.Module) -> dict[int, Any]:
    """Returns the pre-hooks that compute a module's weights."""
    return {
        key: hook for key, hook in module._forward_pre_hooks.items() if isinstance(hook, _COMPUTING)
    }


def convert(module: nn.Module, place: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Moves a module to the device and floating-point dtypes of the backbone's module.

    Args:
        module: A module that is to run in place of the backbone's module.
        place: The backbone's module.
        dtype: Least dtype of the module.
    """
    there = dict(backbone_tensors(place))
    usual = next((tensor for tensor in there.values() if tensor.is_floating_point()), None)
    for path, tensor in backbone_tensors(module):
        like = there.get(path, usual)
        if like is not None and not like.is_meta:
            floats = tensor.is_floating_point() and like.is_floating_point()
            target = promoted(dtype, like.dtype) if floats else tensor.dtype
            tensor.data = tensor.data.to(like.device, target)


def _check_independent(name: str, source: nn.Module, other: nn.Module) -> None:
    if ids_of_parts(source) & ids_of_parts(other):
        raise InjectionError(
            f"Module {name!r} cannot be copied: its __deepcopy__ returns a module that shares "
            "modules or tensors with the original."
        )


def _check_one_to_one(model: nn.Module, sources: Mapping[str, nn.Module]) -> None:
    """Refuses one module given for two modules, or two given for one that has two names."""
    pairs = [(find_module(model, name), source) for name, source in sources.items()]
    for number, (place, source) in enumerate(pairs):
        for other_place, other in pairs[:number]:
            if (place is other_place) is not (source is other):
                raise InjectionError(
                    f"head: {list(sources)[number]!r} is given a module that is given for another "
                    "name too, or two names of one module are given different modules. Give each "
                    "module of the backbone its own replacement."
                )
