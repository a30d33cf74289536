"""A set's private modules: copies for its head and norms, and where they are in the model."""

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

from resadapt.base.errors import InjectionError
from resadapt.base.spec import SetSpec
from resadapt.injection.route import private_of
from resadapt.injection.slots import SLOT
from resadapt.injection.walk import backbone_modules, backbone_tensors, find_module, find_slot

__all__ = ["HOOKS", "computing_hooks", "lost_modules", "private_copies", "private_module", "private_modules", "private_tensors"]

HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks"),
    *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
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
            f"The set {spec.name!r} has lost {name!r}: it was replaced after the injection. Put the injected module back."
        )
    return private


def private_modules(model: nn.Module, spec: SetSpec) -> Iterator[tuple[str, nn.Module]]:
    """Walks the modules of a set's head and norms, with those inside them, by the backbone's names."""
    for name in spec.private:
        yield from backbone_modules(private_module(model, spec, name), name)


def private_tensors(model: nn.Module, spec: SetSpec, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Returns the parameters and buffers of a set's head and norms, or of some of them, by the backbone's names."""
    chosen = spec.private if names is None else names
    return {path: tensor for name in chosen for path, tensor in backbone_tensors(private_module(model, spec, name), name)}


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
def private_copies(model: nn.Module, names: Iterable[str], given: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Returns copies of the backbone's modules, or of those given for their places, in which everything can be trained.

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
                    memo[id(value)] = type(value)(computing_hooks(module) if key == "_forward_pre_hooks" else ())
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
            copied = tensor.clone()
            memo[id(tensor)] = nn.Parameter(copied, trains) if isinstance(tensor, nn.Parameter) else copied
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
        _convert(copies[name], find_module(model, name))
    return copies


def computing_hooks(module: nn.Module) -> dict[int, Any]:
    """Returns a module's pre-hooks that compute its tensors."""
    return {key: hook for key, hook in module._forward_pre_hooks.items() if isinstance(hook, _COMPUTING)}


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
        raise InjectionError(f"Module {name!r} cannot be copied: its own __deepcopy__ returns something that shares its parts.")


def _check_one_to_one(model: nn.Module, sources: Mapping[str, nn.Module]) -> None:
    """Refuses one module for two places, and two modules for a place that has two names."""
    pairs = [(find_module(model, name), source) for name, source in sources.items()]
    for number, (place, source) in enumerate(pairs):
        for other_place, other in pairs[:number]:
            if (place is other_place) is not (source is other):
                raise InjectionError(
                    f"head: {list(sources)[number]!r} cannot have a module that stands for another place too, or another one than "
                    "its other name. Give each place one module of its own."
                )
