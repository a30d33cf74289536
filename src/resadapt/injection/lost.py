"""What a model has lost since the injection, because other code replaced its modules."""

from __future__ import annotations

from torch import nn

from resadapt.base.errors import InjectionError
from resadapt.injection.freeze import is_frozen
from resadapt.injection.ledger import Ledger
from resadapt.injection.private import lost_modules
from resadapt.injection.walk import find_module, find_slot

__all__ = ["lost_parts"]


def lost_parts(model: nn.Module, ledger: Ledger) -> list[str]:
    """Returns the names of the replaced modules that were frozen, or that running sets need.

    A frozen module is not listed if the module around it is gone too: then a whole part of the
    backbone was removed, and no statistics of it can move.
    """
    lost = []
    for adapter_set in ledger.running:
        spec = adapter_set.spec
        lost += lost_modules(model, spec)
        lost += [site.name for site in spec.sites if not _adapts(model, spec.name, site.owner)]
    # Every training forward calls this, so the usual case is fast: nothing is lost or wrapped.
    if not all(_is_frozen_at(model, name) for name in ledger.frozen):
        lost += [name for name in ledger.frozen if _was_replaced(model, name)]
    return list(dict.fromkeys(lost))


def _adapts(model: nn.Module, name: str, owner: str) -> bool:
    """Tells whether a module still has a set's adapter, and a hook that may apply it."""
    try:
        module = find_module(model, owner)
    except InjectionError:
        return False
    # A conversion that builds a new module may move the children, but does not move the hooks.
    slot = find_slot(module)
    return slot is not None and name in slot.sites and len(module._forward_hooks) > 0


def _is_frozen_at(model: nn.Module, name: str) -> bool:
    """Tells whether a module of the backbone, inside no wrapper, is frozen."""
    module: nn.Module | None = model
    for part in name.split(".") if name else ():
        if module is None or part not in module._modules:
            return False
        module = module._modules[part]
    return module is not None and is_frozen(module)


def _was_replaced(model: nn.Module, name: str) -> bool:
    """Tells whether a frozen module is gone from a module that is still there."""
    try:
        return not is_frozen(find_module(model, name))
    except InjectionError:
        pass
    try:
        find_module(model, name.rpartition(".")[0])
    except InjectionError:
        return False
    return True
