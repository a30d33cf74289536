"""Hooks that watch each forward of an injected model for silent mistakes.

Errors: a module without weights runs twice, a module was replaced, DDP does not average a trainable
parameter.
Warnings, given once: an adapter never runs or gets no gradient, other code froze the set or thawed
the backbone, or a hook would treat a layer and its adapter as one layer.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Collection, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.parallel import DistributedDataParallel

from resadapt.base.errors import AdapterWarning, InjectionError, quote_names
from resadapt.base.inputs import named_in
from resadapt.base.spec import SetSpec
from resadapt.injection.freeze import hold_in_eval
from resadapt.injection.ledger import (
    LEDGER,
    AdapterSet,
    Ledger,
    adapter_of,
    set_modules,
    set_tensors,
)
from resadapt.injection.lost import lost_parts
from resadapt.injection.private import private_module
from resadapt.injection.recomputation import checkpointed_calls
from resadapt.injection.slots import AdapterSlot
from resadapt.injection.walk import backbone_tensors, find_module, find_slot, is_leaf

__all__ = [
    "begin_forward",
    "check_first_forward",
    "check_may_repeat",
    "check_rules",
    "end_forward",
    "note_private",
    "note_run",
]


@dataclass
class _Forward:
    """One forward of a whole model, with the slots and private modules that ran so far."""

    root: weakref.ref[nn.Module]
    outer: _Forward | None
    ran: set[int] = field(default_factory=set)


_AVERAGED = "_resadapt_averaged"
"""Attribute of a DistributedDataParallel: ids of the averaged parameters."""
_current: ContextVar[_Forward | None] = ContextVar("resadapt_forward", default=None)
"""The current forward of this thread."""


def begin_forward(root: nn.Module, args: Any) -> None:
    """Forward pre-hook of the root.

    Starts counting, and in train mode checks that the trainable modules are still in place.
    """
    # A compiled or exported graph must not have side effects, and recomputing is no forward.
    if torch.compiler.is_compiling() or checkpointed_calls()[1] is not None:
        return
    outer = _current.get()
    if outer is not None and outer.root() is root:
        outer = outer.outer
    _current.set(_Forward(weakref.ref(root), outer))
    ledger = root.__dict__.get(LEDGER)
    if root.training and isinstance(ledger, Ledger):
        _check_not_replaced(root, ledger)
        for adapter_set in ledger.running:
            _check_averaged(root, adapter_set)


def note_run(slot: AdapterSlot) -> None:
    """Notes a run of a slot's owner in the current forward of the whole model, if any.

    Raises:
        InjectionError: The site has no parameters or buffers, and ran before in this forward.
    """
    if torch.compiler.is_compiling() or (forward := _current.get()) is None:
        return
    if id(slot) in forward.ran:
        root, site = forward.root(), slot.site().name
        if root is None or not _is_running(root):
            _current.set(None)  # it was interrupted, and a part of the model is called directly
        else:
            check_may_repeat(site, find_module(root, site))
    forward.ran.add(id(slot))


def check_may_repeat(site: str, module: nn.Module) -> None:
    """Refuses a site that ran several times in one forward, unless its module has weights.

    A module with weights shares them among its runs, and so its adapter; the runs of an activation
    are layers of their own.

    Raises:
        InjectionError: The module has no parameters and buffers.
    """
    if next(backbone_tensors(module), None) is None:
        raise InjectionError(
            f"Site {site!r} ran more than once in one forward, and has no weights: the runs are "
            "separate layers, which one adapter cannot serve. Choose the modules around it, such "
            "as the blocks."
        )


def note_private(module: nn.Module, args: Any) -> None:
    """Forward pre-hook of a private module: notes a run in the current forward, if any."""
    if not torch.compiler.is_compiling() and (forward := _current.get()) is not None:
        forward.ran.add(id(module))


def check_rules(owner: nn.Module, slot: AdapterSlot, later: Collection[int]) -> None:
    """Warns of hooks on a layer that may define a gradient rule, as attribution methods do.

    Args:
        owner: The module that has the slot.
        slot: The slot.
        later: Ids of the forward hooks that run after the adapter hook.
    """
    if owner.training or not torch.is_grad_enabled() or not is_leaf(owner):
        return
    around = later and any(hook is not hold_in_eval for hook in owner._forward_pre_hooks.values())
    if around or owner._backward_hooks or owner._backward_pre_hooks:
        site = slot.site().name
        _warn(
            f"The hooks on site {site!r} see the layer and its adapter as one layer. A method with "
            "a gradient rule for that layer (DeepLift, deconvolution) gives wrong results: use it "
            "on resadapt.inference_copy(model)."
        )


def check_first_forward(root: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of the root.

    After a set's first forward, warns of adapters that did not run or get no gradient.
    """
    forward, ledger = (
        (None, None)
        if torch.compiler.is_compiling()
        else (_current.get(), root.__dict__.get(LEDGER))
    )
    if forward is not None and forward.root() is root and isinstance(ledger, Ledger):
        for adapter_set in ledger.running:
            _check_first_of(root, adapter_set, forward, output)
        if ledger.running and root.training and torch.is_grad_enabled():
            _check_flags(root, ledger)


def _check_first_of(
    root: nn.Module, adapter_set: AdapterSet, forward: _Forward, output: object
) -> None:
    first = not adapter_set.runs_checked
    training = not adapter_set.gradients_checked and root.training and torch.is_grad_enabled()
    if not first and not training:
        return
    adapter_set.runs_checked = True
    adapter_set.gradients_checked |= training
    spec = adapter_set.spec
    idle = [
        site.name
        for site in spec.sites
        if not _ran(root, site.owner, id(find_slot(find_module(root, site.owner))), forward)
    ]
    unused = [
        name
        for name in spec.private
        if not _ran(root, name, id(private_module(root, spec, name)), forward)
    ]
    if first and idle:
        _warn(
            f"The adapters at {quote_names(idle)} did not run in the first forward: the model does "
            "not call these modules, or calls only their forward. Unless they run later, remove "
            "them from layers, or choose the modules around them."
        )
    if first and unused:
        _warn(
            f"The head or norms {quote_names(unused)} of set {spec.name!r} did not run in the "
            "first forward: the model does not call these modules, or reads the weights of "
            "the backbone's modules directly. Unless they run later, choose the modules around "
            "them."
        )
    if training and (cut_off := _cut_off(root, spec, output, {*idle, *unused})):
        _warn(
            f"Set {spec.name!r}: {quote_names(cut_off)} get no gradient from the model's output. "
            "The forward runs under no_grad there, or detaches the result. They will not be "
            "trained."
        )


def _check_flags(root: nn.Module, ledger: Ledger) -> None:
    """Warns, once for each change, if other code froze all running sets, or thawed the backbone."""
    trained = [each.spec for each in ledger.running if each.trainable]
    # Every training forward asks, so the usual case stops early.
    frozen = bool(trained) and not any(
        parameter.requires_grad
        for spec in trained
        for _, module in set_modules(root, spec)
        for parameter in module.parameters()
    )
    told, ledger.told = ledger.told, (frozen, _is_thawed(root))
    name = ledger.running[0].spec.name
    mend = f"Call set_active_adapters(model, {name!r})"
    if frozen and not told[0]:
        _warn(
            f"Set {name!r}: none of its parameters requires a gradient any more, so nothing "
            f"is trained. {mend}, which restores the flags; then build the optimizer."
        )
    if ledger.told[1] and not told[1]:
        thawed = [
            path
            for path, tensor in backbone_tensors(root)
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad
        ]
        _warn(
            f"The backbone is not frozen any more: {quote_names(thawed)} require gradients. An "
            f"adapter file would not contain their training. {mend}, which freezes the backbone "
            "again. A callback that thaws a backbone, or trains its norms, is not needed with "
            "adapters."
        )


def _is_thawed(root: nn.Module) -> bool:
    """Tells whether a parameter of the backbone requires a gradient, faster than a list of them."""
    waiting = [root]
    while waiting:
        module = waiting.pop()
        for parameter in module._parameters.values():
            if parameter is not None and parameter.requires_grad:
                return True
        for child in module._modules.values():
            if child is not None and type(child) is not AdapterSlot:
                waiting.append(child)
    return False


def end_forward(root: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of the root, called after errors too: ends the forward."""
    if not torch.compiler.is_compiling():
        forward = _current.get()
        if forward is not None and forward.root() is root:
            _current.set(forward.outer)


def _warn(message: str) -> None:
    warnings.warn(message, AdapterWarning, stacklevel=2)


def _is_running(root: nn.Module) -> bool:
    """Tells whether a forward of a module is on the call stack.

    An interrupted forward leaves its count behind.
    """
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is root:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _check_not_replaced(root: nn.Module, ledger: Ledger) -> None:
    if gone := lost_parts(root, ledger):
        raise InjectionError(
            f"The modules {quote_names(gone)} were replaced after the injection, and with them "
            "their adapters, private modules or frozen statistics. Put the injected modules back. "
            "Convert norms (Lightning: sync_batchnorm=True), swap layers or replace the head "
            "before the injection."
        )


def _check_averaged(root: nn.Module, adapter_set: AdapterSet) -> None:
    """Refuses to train parameters that DistributedDataParallel does not average."""
    ddp = DistributedDataParallel._active_ddp_module
    if ddp is None or not torch.is_grad_enabled():
        return
    if _AVERAGED not in ddp.__dict__:  # fixed when the model was wrapped
        buckets = ddp.reducer._get_zeros_like_grad_buckets()
        ddp.__dict__[_AVERAGED] = {
            id(parameter) for bucket in buckets for parameter in bucket.parameters()
        }
    averaged = ddp.__dict__[_AVERAGED]
    trained = set_tensors(root, adapter_set.spec)
    left_out = [
        path
        for path, tensor in trained.items()
        if tensor.requires_grad and id(tensor) not in averaged
    ]
    if left_out and any(module is root for module in ddp.module.modules()):
        raise InjectionError(
            f"DistributedDataParallel does not average the gradients of {quote_names(left_out)}: "
            f"the set {adapter_set.spec.name!r} became the active one, or one of a mixed batch, "
            "after the model was wrapped. Wrap the model again, "
            "DistributedDataParallel(wrapper.module), once the set to train is active; it can be "
            "only one."
        )


def _ran(root: nn.Module, name: str, key: int, forward: _Forward) -> bool:
    return key in forward.ran or _is_compiled(root, name)


def _is_compiled(root: nn.Module, name: str) -> bool:
    """Tells whether a module is part of a compiled block, where runs cannot be counted."""
    module, remaining = root, name.split(".")
    while True:
        forward = module.__dict__.get("forward")
        if hasattr(forward, "_torchdynamo_orig_callable") or module._compiled_call_impl:
            return True
        wrapped = module._modules.get("_checkpoint_wrapped_module")
        if wrapped is None and not remaining:
            return False
        module = wrapped or module._modules[remaining.pop(0)]  # type: ignore[assignment]


def _cut_off(root: nn.Module, spec: SetSpec, output: object, idle: set[str]) -> list[str]:
    """Returns the sites and private modules that get no gradient from the output."""
    tensors = [tensor for _, tensor in named_in(output)]
    reached = _reached_from(tensors)
    if not tensors or reached is None:
        return []
    parts: dict[str, nn.Module] = {site.name: adapter_of(root, spec, site) for site in spec.sites}
    parts |= {name: private_module(root, spec, name) for name in spec.private if name not in parts}
    cut_off = []
    for name, module in parts.items():
        trained = {id(p) for p in module.parameters() if p.requires_grad}
        if name not in idle and trained and not trained & reached:
            cut_off.append(name)
    return cut_off


def _reached_from(tensors: Iterable[Tensor]) -> set[int] | None:
    """Returns the ids of the parameters in the autograd graph of some tensors.

    None if a node hides a part of the graph (reentrant checkpoints).
    """
    waiting = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    reached, seen = set(), set(waiting)
    while waiting:
        node = waiting.pop()
        if isinstance(node, BackwardCFunction):
            return None
        if (variable := getattr(node, "variable", None)) is not None:
            reached.add(id(variable))
        fresh = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= fresh
        waiting += fresh
    return reached
