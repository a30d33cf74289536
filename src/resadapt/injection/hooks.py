"""The one forward hook of every site, and the check at the first forward that each site runs once.

The functions are stateless and live at module level: they find the adapters through the module they are given, so a model that
carries them can be copied, pickled, replicated and compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident
from typing import Any

import torch
from torch import nn

from resadapt.injection.slots import SLOT, AdapterSlot, slots_of

__all__ = ["attach", "begin_first_forward", "detach", "drop_hook", "unwatch", "watch_first_forward"]


def apply_adapter(module: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook of a site's owner: the active adapter's result in place of the output."""
    slot: AdapterSlot = module._modules[SLOT]  # type: ignore[assignment]
    return slot.adapt(output)


def attach(owner: nn.Module) -> AdapterSlot:
    """Returns the slot of a module, which is made and hooked if it has none."""
    slot = owner._modules.get(SLOT)
    if not isinstance(slot, AdapterSlot):
        slot = AdapterSlot()
        slot.train(owner.training)
        owner.add_module(SLOT, slot)
        owner.register_forward_hook(apply_adapter)
    return slot


def detach(owner: nn.Module) -> None:
    """Takes the slot and its hook off a module."""
    del owner._modules[SLOT]
    drop_hook(owner._forward_hooks, apply_adapter)


def begin_first_forward(root: nn.Module, args: Any) -> None:
    """Forward pre-hook of the root: starts counting how often each site runs."""
    if not torch.compiler.is_compiling():  # a count is a side effect that a compiled or exported graph must not have
        for slot in slots_of(root):
            slot.calls[get_ident()] = 0


def end_first_forward(root: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of the root, called after errors too: once every site ran once in a forward, nobody need count again."""
    if not torch.compiler.is_compiling():
        counts = [slot.calls.pop(get_ident(), None) for slot in slots_of(root)]
        if all(count == 1 for count in counts):
            unwatch(root)


def watch_first_forward(root: nn.Module) -> None:
    """Has the next complete forward of the root checked for sites that run more than once."""
    if begin_first_forward not in root._forward_pre_hooks.values():
        root.register_forward_pre_hook(begin_first_forward)
        root.register_forward_hook(end_first_forward, always_call=True)


def unwatch(root: nn.Module) -> None:
    """Ends the watch."""
    drop_hook(root._forward_pre_hooks, begin_first_forward)
    drop_hook(root._forward_hooks, end_first_forward)
    for key in set(root._forward_hooks_always_called) - set(root._forward_hooks):
        del root._forward_hooks_always_called[key]
    for slot in slots_of(root):
        slot.calls = {}


def drop_hook(hooks: dict[int, Callable[..., Any]], hook: Callable[..., Any]) -> None:
    """Removes a hook by its function: a handle would not survive copying and pickling."""
    for key in [key for key, value in hooks.items() if value is hook]:
        hooks.pop(key, None)
