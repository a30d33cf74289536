"""Resolving arguments: names and globs to sites and heads, bottlenecks to widths."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from numbers import Integral

from torch import nn
from torch.nn.parameter import is_lazy

from resadapt.adapters.family import Adapter, takes
from resadapt.base.errors import InjectionError, quote_names
from resadapt.base.spec import SiteSpec, blueprint_of, form_of, within
from resadapt.base.tensors import address, is_dense, kind_name
from resadapt.injection.channels import Shape
from resadapt.injection.measure import measure_sites
from resadapt.injection.private import call_places
from resadapt.injection.slots import SLOT
from resadapt.injection.walk import (
    backbone_modules,
    backbone_tensors,
    find_module,
    find_slot,
    persistent_tensors,
)

__all__ = [
    "RESNET_STAGES",
    "called_modules",
    "heads_to_give",
    "match",
    "names_in",
    "owner_of",
    "select_head",
    "select_sites",
]

RESNET_STAGES = ("layer1", "layer2", "layer3", "layer4")


def names_in(names: object, argument: str) -> list[str]:
    """Returns a names argument as a list of strings, and refuses anything else."""
    if not isinstance(names, Iterable):
        raise InjectionError(
            f"{argument} takes names of modules, found {names!r:.100}. Give a name, a list of "
            "names, or a mapping from names."
        )
    listed = [names] if isinstance(names, str) else list(names)
    for name in listed:
        if not isinstance(name, str):
            raise InjectionError(
                f"{argument} takes names of modules, found {name!r} ({type(name).__name__})."
            )
    return listed


def match(names: Iterable[str], pattern: str, argument: str, where: str) -> list[str]:
    """Returns the names that a name or glob matches; a star does not match dots.

    Args:
        names: The names to choose from; "" is ignored.
        pattern: A name or glob.
        argument: The argument that the pattern was given as, for the message.
        where: What the names are of, for the message: "module of ResNet".

    Raises:
        InjectionError: Nothing matches; the message lists similar names.
    """
    names = [name for name in names if name]
    if pattern in names:
        return [pattern]
    parts = pattern.split(".")
    found = [
        name
        for name in names
        if len(segments := name.split(".")) == len(parts)
        and all(fnmatchcase(segment, part) for segment, part in zip(segments, parts, strict=True))
    ]
    if not found:
        names.sort(key=lambda name: name.count("."))  # stages before what is in them
        near = difflib.get_close_matches(pattern, names, n=5)
        near += [name for name in names if name.endswith(f".{pattern}") and name not in near][:5]
        hint = (
            f"Did you mean {quote_names(near)}?"
            if near
            else f"There is {quote_names(names) or 'none'}."
        )
        raise InjectionError(f"{argument}: {pattern!r} matches no {where}. {hint}")
    return found


def select_head(model: nn.Module, head: object) -> dict[str, nn.Module]:
    """Returns the outermost modules that `head` names, each with the module to copy for the set.

    Modules without parameters are skipped if the pattern matches another module with parameters.

    Raises:
        InjectionError: A name matches nothing, has nothing to train, or shares a tensor with the
            frozen backbone.
    """
    modules, modules_of = dict(backbone_modules(model)), f"module of {type(model).__name__}"
    given: dict[str, nn.Module] = {}
    asked: set[str] = set()
    for pattern in names_in(head, "head"):
        if isinstance(head, Mapping):
            module = head[pattern]
            if not isinstance(module, nn.Module):
                raise InjectionError(
                    f"head: {pattern!r} is given {module!r}, not a torch.nn.Module."
                )
            if any(module is other for other in modules.values()):
                raise InjectionError(
                    f"head: {pattern!r} is given a module that is part of the model. Give only the "
                    "name, or a copy.deepcopy of the module."
                )
            found = match(modules, pattern, "head", modules_of)
            given |= dict.fromkeys(found, module)
            asked.update(found)
            continue
        trained = [
            name
            for name in match(modules, pattern, "head", modules_of)
            if _has_parameters(modules[name])
        ]
        if not trained:
            raise InjectionError(
                f"head: module {pattern!r} has no parameters to train. Choose a module that has."
            )
        asked.update(trained)
    outermost = tuple(
        name for name in modules if name in asked and not within(name.rpartition(".")[0], asked)
    )
    for name in outermost:
        inside = dict(backbone_tensors(given.get(name, find_module(model, name)), name))
        if wrapped := [path for path, tensor in inside.items() if not is_dense(tensor)]:
            raise InjectionError(
                f"head: {wrapped[0]!r} is {kind_name(inside[wrapped[0]])}, and only dense tensors "
                "that are not quantized can be trained and saved. Give such a head, for example "
                f"head={{{name!r}: torch.nn.Linear(...)}}, or leave the module out of head."
            )
        owned = {address(tensor) for _, tensor in backbone_tensors(find_module(model, name))}
        for path, tensor in backbone_tensors(model):
            if not within(path, outermost) and address(tensor) in owned:
                raise InjectionError(
                    f"head: {name!r} shares the tensor {path!r} with the backbone, which stays "
                    "frozen. Untie them."
                )
    heads: dict[str, nn.Module] = {}
    for name in outermost:
        for place in called_modules(model, (name,)):
            heads[place] = (
                find_module(given[name], place[len(name) + 1 :])
                if name in given
                else modules[place]
            )
    return heads


def heads_to_give(model: nn.Module, heads: Mapping[str, nn.Module]) -> list[str]:
    """Returns the names of a set's head modules that `load_adapters` needs as ``head=``.

    They cannot be built from a blueprint, and the backbone's modules differ in classes or shapes.

    Args:
        model: The backbone.
        heads: The set's head, by name in the model.
    """
    return [
        name
        for name, head in heads.items()
        if blueprint_of(head) is None
        and (form_of(head), _shapes(head))
        != (form_of(place := find_module(model, name)), _shapes(place))
    ]


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {
        path: () if is_lazy(tensor) else tuple(tensor.shape)
        for name, each in backbone_modules(module)
        for path, tensor in persistent_tensors(each, name)
    }


def called_modules(model: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """Returns the modules' names, with containers without a forward replaced by their content.

    Of the content, only modules with parameters count.

    Raises:
        InjectionError: There is no such module, or no module inside has a forward.
    """
    found: list[str] = []
    for name in names:
        module = find_module(model, name)
        places = [
            place
            for place, inside in call_places(module, name)
            if place == name or _has_parameters(inside)
        ]
        if not places:
            raise InjectionError(
                f"head: module {name!r} ({type(module).__name__}) has no forward, so it never "
                "runs. Choose another module."
            )
        found += places
    return tuple(found)


def _has_parameters(module: nn.Module) -> bool:
    return any(isinstance(tensor, nn.Parameter) for _, tensor in backbone_tensors(module))


_DEFAULT_BOTTLENECK = 64


def select_sites(
    model: nn.Module,
    family: type[Adapter],
    layers: object,
    bottleneck: object,
    example_input: object = None,
    channel_dim: object = None,
) -> tuple[SiteSpec, ...]:
    """Returns the sites that `layers` selects.

    Args:
        model: The model.
        family: The kind of adapter.
        layers: Names or globs, or a mapping from them to bottlenecks.
        bottleneck: Size where `layers` gives none: a number of channels, or a fraction of the
            site's channels in (0, 1).
        example_input: An input for one call of the model that measures the sites' outputs; None
            generates an input if needed.
        channel_dim: Dimension of the channels in the sites' outputs, 1 or -1, or a mapping from
            names or globs of sites to it; None detects it.

    Returns:
        The sites, possibly none, in the order of ``model.named_modules()``.

    Raises:
        InjectionError: A pattern matches nothing, two sites share an output, or a module cannot
            be a site.
    """
    patterns = names_in(layers, "layers")
    sizes = dict(layers) if isinstance(layers, Mapping) else dict.fromkeys(patterns, bottleneck)
    modules, modules_of = dict(backbone_modules(model)), f"module of {type(model).__name__}"
    if layers == RESNET_STAGES:
        modules_of += ": the default layers are the stages of a ResNet, so pass layers="
    wide = takes(family, "bottleneck")
    if not wide and (
        bottleneck != _DEFAULT_BOTTLENECK
        or any(isinstance(layers, Mapping) and size != 0 for size in sizes.values())
    ):
        raise InjectionError(
            f"{family.__name__} has no hidden layer: remove bottleneck=, and give layers as names "
            "without sizes."
        )
    size_of: dict[str, int | float] = {}
    site_at: dict[str, str] = {}
    for pattern, size in sizes.items():
        checked = _checked_size(pattern, size) if wide else 0
        for name in match(modules, pattern, "layers", modules_of):
            owner = owner_of(model, name)
            if owner in site_at:
                raise InjectionError(
                    f"Layers {site_at[owner]!r} and {name!r} (pattern {pattern!r}) both "
                    f"adapt the output of {owner!r}. Keep one of them in layers."
                )
            site_at[owner] = name
            size_of[name] = checked
    owners = {name: owner for owner, name in site_at.items()}
    ordered = {name: owners[name] for name in modules if name in owners}
    shapes = measure_sites(model, ordered, example_input, _channel_dims(channel_dim, ordered))
    return tuple(_site(name, owners[name], shape, size_of[name]) for name, shape in shapes.items())


def _channel_dims(channel_dim: object, sites: Iterable[str]) -> dict[str, int]:
    """Returns the dimension of the channels of the sites for which the user gives it.

    Raises:
        InjectionError: A dimension is neither 1 nor -1, a name matches no site, or two names give
            a site different dimensions.
    """
    if channel_dim is None:
        return {}
    if not isinstance(channel_dim, Mapping):
        return dict.fromkeys(sites, _checked_dim("channel_dim", channel_dim))
    dims: dict[str, int] = {}
    for pattern in names_in(channel_dim, "channel_dim"):
        dim = _checked_dim(f"channel_dim for {pattern!r}", channel_dim[pattern])
        for name in match(sites, pattern, "channel_dim", "site"):
            if dims.setdefault(name, dim) != dim:
                raise InjectionError(
                    f"channel_dim gives site {name!r} both 1 and -1. Remove one of the names that "
                    "match it."
                )
    return dims


def _checked_dim(what: str, dim: object) -> int:
    if type(dim) is not int or dim not in (1, -1):
        raise InjectionError(
            f"{what}={dim!r:.100}: give 1 for outputs [N, C, ...], -1 for [N, ..., C], or None; or "
            "a mapping from sites to 1 or -1."
        )
    return dim


def owner_of(model: nn.Module, name: str) -> str:
    """Returns the module to attach a site's adapter to: the site, or a Sequential's last block.

    A Sequential iterates over its children, so an adapter cannot be one of them; the last block
    returns the same output.

    Raises:
        InjectionError: The module cannot be a site.
    """
    module = find_module(model, name)
    while type(module).forward is nn.Sequential.forward and "forward" not in module.__dict__:
        if not module._modules:
            raise InjectionError(
                f"Module {name!r} is an empty container without an output. Choose another layer."
            )
        name = f"{name}.{list(module._modules)[-1]}"
        module = find_module(model, name)
    kind = type(module).__name__
    if type(module).forward is nn.Module.forward:
        raise InjectionError(
            f"Module {name!r} ({kind}) is never called: it has no forward. Choose a module inside "
            "it."
        )
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        raise InjectionError(
            f"Module {name!r} ({kind}) is a container with a custom forward, which would call the "
            "adapter as one of its children. Choose a module inside it."
        )
    if hasattr(module, SLOT) and find_slot(module) is None:
        raise InjectionError(
            f"Module {name!r} ({kind}) has a child or attribute named {SLOT!r}, a name reserved "
            "for adapters. Rename it."
        )
    aliases = [other for other, candidate in backbone_modules(model) if candidate is module]
    if len(aliases) > 1:
        raise InjectionError(
            f"Module {name!r} is shared: it is also "
            f"{quote_names([a for a in aliases if a != name])}, but an adapter needs a module with "
            "one name. Choose the module around it, or copy the shared module."
        )
    return name


def _site(name: str, owner: str, shape: Shape, size: int | float) -> SiteSpec:
    width = size if isinstance(size, int) else max(1, round(size * shape.channels))
    return SiteSpec(name, owner, shape.channels, shape.spatial_dims, width, shape.channel_dim)


def _checked_size(pattern: str, size: object) -> int | float:
    if isinstance(size, Integral) and not isinstance(size, bool) and int(size) >= 1:
        return int(size)
    if isinstance(size, float) and 0.0 < size < 1.0:
        return size
    raise InjectionError(
        f"bottleneck for {pattern!r} is {size!r}: give a number of channels (an int, 1 or more) or "
        "a fraction of the site's channels (a float between 0 and 1, both excluded)."
    )
