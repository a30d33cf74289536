"""A copy of an injected model with one set, from which everything of this library is taken off."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import nn

from resadapt.adapters import Adapter
from resadapt.base.errors import AdapterError
from resadapt.injection.freeze import thaw_norm, wake_norms
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
        model: The backbone, of stock modules, without hooks of this library.
        adapters: The set's adapters by the modules that carried them.
        later_hooks: The numbers of the forward hooks that came after the adapter, by the same
            modules.
        requires_grad: The parameters' flags from before the injection.
    """

    model: nn.Module
    adapters: dict[str, Adapter]
    later_hooks: dict[str, list[int]]
    requires_grad: dict[str, bool]


def stock_copy(model: nn.Module, name: str) -> StockCopy:
    """Returns a copy of an injected model with one of its sets.

    Raises:
        InjectionError: A tensor has no values (offloaded).
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
        plain = copy.deepcopy(unwrap(model))
    except Exception as error:
        raise AdapterError(
            f"The model cannot be copied: {type(error).__name__}: {error}"
        ) from error
    ledger = ledger_of(plain)
    spec = ledger.sets[name].spec
    private = {path: private_module(plain, spec, path) for path in spec.private}
    adapters = {site.owner: adapter_of(plain, spec, site) for site in spec.sites}
    later = {owner: later_hooks(find_module(plain, owner)) for owner in adapters}
    for _, module in list(backbone_modules(plain)):
        if slot := find_slot(module):
            slot.routes.clear()
            detach(module)
    for adapter in adapters.values():
        wake_norms(adapter)
    for path, module in private.items():
        take_place(plain, path, module)
    for _, module in backbone_modules(plain):
        unroute(module)
        thaw_norm(module)
    unwatch(plain)
    del plain.__dict__[LEDGER]
    for _, module in list(backbone_modules(plain)):
        for key, child in module._modules.items():
            if child is not None:
                module._modules[key] = behind_wrappers(child)
    return StockCopy(plain.eval(), adapters, later, ledger.requires_grad)
