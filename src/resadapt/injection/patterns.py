"""From what the user writes, names and globs, to the names of modules."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from torch import nn

from resadapt.base.errors import InjectionError
from resadapt.base.names import quote_names, within
from resadapt.base.tensors import address
from resadapt.injection.route import call_places
from resadapt.injection.walk import backbone_modules, backbone_tensors, find_module

__all__ = ["called_modules", "match", "names_in", "select_head"]


def names_in(names: object, argument: str) -> list[str]:
    """Returns a names argument as a list, and refuses what is not text."""
    if not isinstance(names, Iterable):
        raise InjectionError(f"{argument} takes names of modules, found {names!r}. Give a name, or a list of them.")
    listed = [names] if isinstance(names, str) else list(names)
    for name in listed:
        if not isinstance(name, str):
            raise InjectionError(f"{argument} takes names of modules, found {name!r} ({type(name).__name__}).")
    return listed


def match(modules: Mapping[str, nn.Module], pattern: str, argument: str) -> list[str]:
    """Returns the module names that a name or glob matches; a star stands for anything between two dots.

    Raises:
        InjectionError: Nothing matches; the message lists near misses.
    """
    if pattern and pattern in modules:
        return [pattern]
    parts = pattern.split(".")
    found = [
        name
        for name in modules
        if name
        and len(segments := name.split(".")) == len(parts)
        and all(fnmatchcase(segment, part) for segment, part in zip(segments, parts, strict=True))
    ]
    if not found:
        near = difflib.get_close_matches(pattern, [name for name in modules if name], n=5, cutoff=0.5)
        near += [name for name in modules if name.endswith(f".{pattern}") and name not in near][:5]
        hint = f"Did you mean {quote_names(near)}?" if near else f"The model has {quote_names([n for n in modules if n])}."
        raise InjectionError(f"{argument}: {pattern!r} matches no module of {type(modules['']).__name__}. {hint}")
    return found


def select_head(model: nn.Module, head: object) -> dict[str, nn.Module]:
    """Returns the outermost modules that `head` names, and for each the module that the set gets a copy of.

    Of those that a glob found some may have no parameters.

    Raises:
        InjectionError: A name matches nothing, has nothing to train, or shares a tensor with what stays frozen.
    """
    modules = dict(backbone_modules(model))
    given: dict[str, nn.Module] = {}
    asked: set[str] = set()
    for pattern in names_in(head, "head"):
        if isinstance(head, Mapping):
            module = head[pattern]
            if not isinstance(module, nn.Module):
                raise InjectionError(f"head: {pattern!r} is given {module!r}, not a torch.nn.Module.")
            if any(module is own for own in modules.values()):  # whose content is another one while a set is active
                raise InjectionError(
                    f"head: {pattern!r} is given a module of the model itself. Give its name alone, or a copy.deepcopy of it."
                )
            found = match(modules, pattern, "head")
            given |= dict.fromkeys(found, module)
            asked.update(found)
            continue
        trained = [name for name in match(modules, pattern, "head") if _has_parameters(modules[name])]
        if not trained:
            raise InjectionError(f"head: module {pattern!r} has no parameters to train. Choose one that has.")
        asked.update(trained)
    outermost = tuple(name for name in modules if name in asked and not within(name.rpartition(".")[0], asked))
    for name in outermost:
        owned = {address(tensor) for _, tensor in backbone_tensors(find_module(model, name))}
        for path, tensor in backbone_tensors(model):
            if not within(path, outermost) and address(tensor) in owned:
                raise InjectionError(
                    f"head: {name!r} shares the tensor {path!r} with the backbone, which stays frozen. Untie them."
                )
    heads: dict[str, nn.Module] = {}
    for name in outermost:
        for place in called_modules(model, (name,)):
            heads[place] = find_module(given[name], place[len(name) + 1 :]) if name in given else modules[place]
    return heads


def called_modules(model: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """Returns names of modules, and in place of containers that are never called the modules inside with parameters.

    Raises:
        InjectionError: There is no such module, or none in it is ever called.
    """
    found: list[str] = []
    for name in names:
        module = find_module(model, name)
        places = [place for place, inside in call_places(module, name) if place == name or _has_parameters(inside)]
        if not places:
            raise InjectionError(f"head: module {name!r} ({type(module).__name__}) has no forward, so it never runs. Choose another.")
        found += places
    return tuple(found)


def _has_parameters(module: nn.Module) -> bool:
    return any(isinstance(tensor, nn.Parameter) for _, tensor in backbone_tensors(module))
