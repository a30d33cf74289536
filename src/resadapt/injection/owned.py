"""A set's own modules, its head and its norms, whose content changes places with that of the backbone's."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from resadapt.base.errors import InjectionError
from resadapt.base.names import within
from resadapt.injection.place import HOOKS, computing
from resadapt.injection.slots import SLOT
from resadapt.injection.walk import backbone_modules, backbone_tensors, check_values, find_module, find_slot

__all__ = [
    "check_places",
    "exchange",
    "follow",
    "mark",
    "own_copies",
    "replaced",
    "settle",
    "tensors_in",
]

_MARK = "_resadapt_head"
"""Attribute of every module that a set has as its own. One that was put there after the injection lacks it."""
_IN_PLACE = frozenset({*HOOKS, "_is_full_backward_hook", "training", "_compiled_call_impl", "forward", "_modules", _MARK})
"""What belongs to a place, not to the content that changes places: `training`, hooks, what was put over the forward."""


def tensors_in(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Returns the live parameters and buffers of some of the backbone's modules, by their names in the model."""
    return {path: tensor for name in names for path, tensor in backbone_tensors(find_module(model, name), name)}


@torch.no_grad()
def own_copies(model: nn.Module, names: Iterable[str], given: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Returns copies of the backbone's modules, or of those given for their places, in which everything can be trained.

    Raises:
        InjectionError: A module cannot be copied, has no values yet, or is to be in two places.
    """
    sources = {name: given[name] if name in given else find_module(model, name) for name in names}
    memo: dict[int, Any] = {}  # one for all, so that what was tied stays tied
    for name, source in sources.items():
        for _, module in backbone_modules(source, name):
            for key, value in module.__dict__.items():
                if key in HOOKS:
                    memo[id(value)] = type(value)(computing(module) if key == "_forward_pre_hooks" else ())
                elif isinstance(value, Tensor):  # computed, as by weight_norm, and computed anew in every forward
                    memo[id(value)] = value.detach().clone()
            if slot := find_slot(module):
                memo[id(slot)] = nn.Identity()
        for path, tensor in backbone_tensors(source, name):
            if is_lazy(tensor) or (name in given and tensor.is_meta):
                raise InjectionError(
                    f"head: {path!r} has no values yet. Run the module once, or load its weights, and then inject."
                )
            trains = tensor.is_floating_point() or tensor.is_complex()
            own = tensor.clone()
            memo[id(tensor)] = nn.Parameter(own, trains) if isinstance(tensor, nn.Parameter) else own
    copies = {}
    for name, source in sources.items():
        try:
            copies[name] = copy.deepcopy(source, memo)
        except Exception as error:
            raise InjectionError(f"Module {name!r} cannot be copied: {type(error).__name__}: {error}") from error
        _check_independent(name, source, copies[name])
        for _, module in backbone_modules(copies[name]):
            module._modules.pop(SLOT, None)
            module.__dict__.pop("forward", None)
    _check_one_to_one(model, copies)
    return copies


def check_places(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Checks that `exchange` can put the content of modules into a model.

    Raises:
        InjectionError: There is no such place, or one of two tensors that would change places has no values.
    """
    halves = {}
    for name, module in modules.items():
        live = dict(backbone_tensors(find_module(model, name), name))
        for path, tensor in backbone_tensors(module, name):
            if path in live and live[path].is_meta is not tensor.is_meta:  # values cannot follow where there are none
                halves[path] = live[path] if live[path].is_meta else tensor
    check_values(halves)


def exchange(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Puts the content of modules in the places that their names tell; the modules have afterwards what was there.

    The tensors themselves are exchanged, not their values: an optimizer keeps the set it was built for, and a graph that is waiting
    for its backward pass keeps what it was computed with. The modules in the model stay the objects that they are.
    """
    pairs = [(find_module(model, name), module) for name, module in modules.items()]
    for live, parked in pairs:
        follow(parked, live)
    # Nothing has changed places so far, and nothing can fail from here on.
    done: set[int] = set()
    for live, parked in pairs:
        _swap(live, parked, done)
    return dict(modules)


@torch.no_grad()
def settle(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Makes the content of modules a plain model's own: values where sizes are the same, else the tensors themselves."""
    for name, module in modules.items():
        live, given = dict(backbone_tensors(find_module(model, name))), dict(backbone_tensors(module))
        if {path: tensor.shape for path, tensor in live.items()} != {path: tensor.shape for path, tensor in given.items()}:
            exchange(model, {name: module})
            continue
        for path, tensor in given.items():
            live[path].copy_(tensor)


def mark(model: nn.Module, names: Collection[str]) -> None:
    """Marks the modules that lie in one of these, and no others."""
    modules = list(backbone_modules(model))
    for _, module in modules:
        module.__dict__.pop(_MARK, None)
    for name, module in modules:  # one may have two names
        if within(name, names):
            module.__dict__[_MARK] = True


def replaced(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Names the outermost of a set's own modules that are not the ones that were injected into."""
    found: list[str] = []
    for name in names:
        try:
            inside = list(backbone_modules(find_module(model, name), name))
        except InjectionError:
            found.append(name)
            continue
        for path, module in inside:
            if _MARK not in module.__dict__ and not within(path, found):
                found.append(path)
    return found


def _check_independent(name: str, source: nn.Module, other: nn.Module) -> None:
    parts = {id(part) for part in (*source.modules(), *source.parameters(), *source.buffers())}
    if any(id(part) in parts for part in (*other.modules(), *other.parameters(), *other.buffers())):
        raise InjectionError(f"Module {name!r} cannot be copied: its own __deepcopy__ returns something that shares its parts.")


def _check_one_to_one(model: nn.Module, copies: Mapping[str, nn.Module]) -> None:
    """Refuses one module for two places, and two for one place that has two names: neither can change places."""
    to: dict[int, nn.Module] = {}
    for name, copied in copies.items():
        there = dict(backbone_modules(find_module(model, name), name))
        for path, module in backbone_modules(copied, name):
            for one, other in ((there.get(path), module), (module, there.get(path))):
                if one is not None and other is not None and to.setdefault(id(one), other) is not other:
                    raise InjectionError(
                        f"head: {path!r} cannot have a module that stands for another place too, or another one than its other "
                        "name. Give each place one module of its own."
                    )


@torch.inference_mode(False)  # what is converted here may be trained later
def follow(parked: nn.Module, live: nn.Module) -> None:
    """Converts a parked module as the model was converted meanwhile."""
    there = dict(backbone_tensors(live))
    usual = next((tensor for tensor in there.values() if tensor.is_floating_point()), None)
    for path, tensor in backbone_tensors(parked):
        like = there.get(path, usual)
        if like is None or like.is_meta:
            continue
        dtype = like.dtype if tensor.is_floating_point() and like.is_floating_point() else tensor.dtype
        if (tensor.device, tensor.dtype) != (like.device, dtype):
            tensor.data = tensor.data.to(like.device, dtype)


def _put_hooks(module: nn.Module, old: Collection[int], new: Mapping[int, Any]) -> None:
    others = {key: hook for key, hook in module._forward_pre_hooks.items() if key not in old}
    module._forward_pre_hooks.clear()
    module._forward_pre_hooks.update({**new, **others})  # the user's come after them


def _swap(one: nn.Module, other: nn.Module, done: set[int]) -> None:
    """Exchanges everything of two modules but what belongs to the place."""
    if id(one) in done:  # it has two names
        return
    done.add(id(one))
    mine, theirs = ({key: value for key, value in module.__dict__.items() if key not in _IN_PLACE} for module in (one, other))
    for key in mine:
        del one.__dict__[key]
    for key in theirs:
        del other.__dict__[key]
    one.__dict__.update(theirs)
    other.__dict__.update(mine)
    one.__class__, other.__class__ = other.__class__, one.__class__
    here, there = computing(one), computing(other)
    if here.keys() != there.keys():
        _put_hooks(one, here, there)
        _put_hooks(other, there, here)
    slot = one._modules.pop(SLOT, None)
    left, right = dict(one._modules), dict(other._modules)
    common = {key for key in left.keys() & right.keys() if left[key] is not None and right[key] is not None}
    for key in common:
        _swap(left[key], right[key], done)  # type: ignore[arg-type]
    for module, own, coming in ((one, left, right), (other, right, left)):
        module._modules.clear()
        module._modules.update({key: own[key] if key in common else child for key, child in coming.items()})
    for key in right.keys() - common:
        for child in right[key].modules() if right[key] is not None else ():  # type: ignore[union-attr]
            child.training = one.training
            child.__dict__[_MARK] = True
    if slot is not None:
        one._modules[SLOT] = slot
