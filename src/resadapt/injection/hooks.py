"""Registering and removing the hooks that apply adapters and count runs.

The hooks are stateless module-level functions that find the adapters through the hooked module, so
a model with these hooks can be copied, pickled, replicated and compiled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from resadapt.injection.freeze import drop_hook
from resadapt.injection.slots import SLOT, AdapterSlot
from resadapt.injection.walk import find_slot
from resadapt.injection.watch import (
    begin_forward,
    check_first_forward,
    check_rules,
    end_forward,
    note_private,
    note_run,
)

__all__ = [
    "apply_adapter",
    "attach",
    "detach",
    "later_hooks",
    "slot_of",
    "unwatch",
    "unwatch_private",
    "watch",
    "watch_private",
]


def apply_adapter(module: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook of a site's owner: replaces the output by the active adapter's result."""
    slot: AdapterSlot = module._modules[SLOT]  # type: ignore[assignment]
    choice = slot.choice()
    if not torch.compiler.is_compiling() and (
        choice.active in slot.sites or choice.mixture is not None
    ):
        note_run(slot)
        if choice.mixture is None:
            check_rules(module, slot, later_hooks(module))
    return slot.adapt(choice, module, args, output)


def slot_of(owner: nn.Module) -> AdapterSlot:
    """Returns a module's slot, and creates the slot if there is none."""
    slot = find_slot(owner)
    if slot is None:
        slot = AdapterSlot()
        slot.train(owner.training)
        owner.add_module(SLOT, slot)
    return slot


def attach(owner: nn.Module) -> AdapterSlot:
    """Returns a module's slot, and registers the hook that applies the slot's adapters."""
    slot = slot_of(owner)
    if apply_adapter not in owner._forward_hooks.values():
        owner.register_forward_hook(apply_adapter)
    return slot


def detach(owner: nn.Module) -> None:
    """Removes the adapter hook from a module, and the slot unless private modules are in it."""
    drop_hook(owner._forward_hooks, apply_adapter)
    if not owner._modules[SLOT].routes:  # type: ignore[union-attr]
        del owner._modules[SLOT]


def later_hooks(owner: nn.Module) -> list[int]:
    """Returns the ids of the forward hooks that run after the adapter hook."""
    numbers = list(owner._forward_hooks)
    ours = next(number for number, hook in owner._forward_hooks.items() if hook is apply_adapter)
    return numbers[numbers.index(ours) + 1 :]


def watch(root: nn.Module) -> None:
    """Registers the hooks that watch every forward of the whole model."""
    if begin_forward not in root._forward_pre_hooks.values():
        root.register_forward_pre_hook(begin_forward)
        root.register_forward_hook(check_first_forward)
        root.register_forward_hook(end_forward, always_call=True)


def unwatch(root: nn.Module) -> None:
    """Removes the hooks of `watch`."""
    drop_hook(root._forward_pre_hooks, begin_forward)
    drop_hook(root._forward_hooks, check_first_forward)
    drop_hook(root._forward_hooks, end_forward)
    for key in set(root._forward_hooks_always_called) - set(root._forward_hooks):
        del root._forward_hooks_always_called[key]


def watch_private(module: nn.Module) -> None:
    """Registers the hook that counts the runs of a private module."""
    module.register_forward_pre_hook(note_private)


def unwatch_private(module: nn.Module) -> None:
    """Removes the hook of `watch_private`."""
    drop_hook(module._forward_pre_hooks, note_private)
