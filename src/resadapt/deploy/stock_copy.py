"""A copy of an injected model with one set, without hooks and attributes of this library."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import nn

from resadapt.adapters import Adapter
from resadapt.base.errors import AdapterError
from resadapt.injection.freeze import allow_statistics_reset, unfreeze_norm
from resadapt.injection.hooks import detach, later_hooks, unwatch
from resadapt.injection.installation import take_place
from resadapt.injection.ledger import LEDGER, adapter_of, ledger_of
from resadapt.injection.private import private_module, unroute
from resadapt.injection.walk import (
    backbone_modules,
    behind_wrappers,
    check_not_meta,
    find_module,
    find_slot,
    named_tensors,
    unwrap,
)

__all__ = ["StockCopy", "stock_copy"]


@dataclass(frozen=True)
class StockCopy:
    """A copy of a model's backbone with a set's head and norms, in evaluation mode.

    Args:
        model: The backbone, with stock modules and without hooks of this library.
        adapters: The set's adapters, by the name of the module that each adapts.
        replaced: The modules of the backbone that the set's head and norms replace, by name.
        later_hooks: Ids of the forward hooks that run after the adapter, by the same names.
        requires_grad: The parameters' flags from before the injection, by name.
    """

    model: nn.Module
    adapters: dict[str, Adapter]
    replaced: dict[str, nn.Module]
    later_hooks: dict[str, list[int]]
    requires_grad: dict[str, bool]


def stock_copy(model: nn.Module, name: str) -> StockCopy:
    """Returns a copy of an injected model with one of its sets.

    Raises:
        InjectionError: The model has meta tensors (offloaded).
        AdapterError: The model cannot be copied.
    """
    check_not_meta(
        {
            path: tensor
            for path, module in nn.Module.named_modules(model)
            for path, tensor in named_tensors(module, path)
        }
    )
    try:
        copied = copy.deepcopy(unwrap(model))
    except Exception as error:
        raise AdapterError(
            f"The model cannot be copied: {type(error).__name__}: {error}"
        ) from error
    ledger = ledger_of(copied)
    spec = ledger.sets[name].spec
    private = {path: private_module(copied, spec, path) for path in spec.private}
    adapters = {site.owner: adapter_of(copied, spec, site) for site in spec.sites}
    replaced = {path: find_module(copied, path) for path in spec.private}
    later = {owner: later_hooks(find_module(copied, owner)) for owner in adapters}
    for _, module in list(backbone_modules(copied)):
        if slot := find_slot(module):
            slot.routes.clear()
            detach(module)
    for adapter in adapters.values():
        allow_statistics_reset(adapter)
    for path, module in private.items():
        take_place(copied, path, module)
    for _, module in backbone_modules(copied):
        unroute(module)
        unfreeze_norm(module)
    unwatch(copied)
    del copied.__dict__[LEDGER]
    for _, module in list(backbone_modules(copied)):
        for key, child in module._modules.items():
            if child is not None:
                module._modules[key] = behind_wrappers(child)
    return StockCopy(copied.eval(), adapters, replaced, later, ledger.requires_grad)
