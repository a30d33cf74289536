"""The clean backbone that a file is verified on: built by the user, or a copy of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import BuiltinFunctionType, FunctionType

import torch
from torch import Tensor, nn

from resadapt.base.errors import AdapterError, quote_names
from resadapt.base.module_record import other_state
from resadapt.base.overlay import uncover
from resadapt.base.spec import SetSpec, within
from resadapt.base.tensors import all_modules, all_tensors, is_dense, is_sharded
from resadapt.base.undisturbed import random_states_kept
from resadapt.injection.installation import take_place, uninstall
from resadapt.injection.ledger import find_ledger
from resadapt.injection.private import private_copies, private_module
from resadapt.injection.select import heads_to_give
from resadapt.injection.slots import AdapterSlot
from resadapt.injection.walk import (
    backbone_modules,
    backbone_tensors,
    find_slot,
    slots_of,
    unwrap,
)
from resadapt.proof.report import Check

__all__ = ["Rebuild", "Reconstruction", "check_rebuild", "reconstruct", "replaced_forwards"]

Rebuild = Callable[[], nn.Module]
_LINE = "reconstruction"
_MAY_DIFFER = ("training", "_modules")


@dataclass(frozen=True)
class Reconstruction:
    """A backbone without adapters that is independent of the live model.

    Args:
        check: The report's line about the backbone.
        model: The backbone; None if there is none.
        shared: Why equal outputs would prove nothing; empty if the backbone is known to share
            nothing with the live model.
    """

    check: Check
    model: nn.Module | None = None
    shared: str = ""


def check_rebuild(rebuild: object) -> None:
    """Checks an argument ``rebuild=``.

    Raises:
        AdapterError: The argument is neither None nor a function; a module can be called too.
    """
    if rebuild is not None and (not callable(rebuild) or isinstance(rebuild, nn.Module)):
        raise AdapterError(
            f"rebuild is {type(rebuild).__name__}: give a function that builds the backbone "
            "without adapters."
        )


def reconstruct(
    live: nn.Module, rebuild: Rebuild | None, spec: SetSpec | None = None
) -> Reconstruction:
    """Returns a backbone without adapters to restore a file on.

    Args:
        live: The live model.
        rebuild: Builds the backbone as in another process; None copies the live model.
        spec: The live model's set of which the file is, if there is one. A copy has the set's head
            where a load needs to be given the head.

    Raises:
        AdapterError: `rebuild` does not return a backbone without adapters.
    """
    return _rebuilt(live, rebuild) if rebuild is not None else _copied(live, spec)


def _rebuilt(live: nn.Module, rebuild: Rebuild) -> Reconstruction:
    devices = {tensor.device for tensor in nn.Module.parameters(live)}
    flags = [(module, module.training) for module in nn.Module.modules(live)]
    copied: list[str] = []
    try:
        with random_states_kept(devices), torch.inference_mode(False):
            built = rebuild()
        if isinstance(built, nn.Module):
            copied = _copy_stateless(built, live)
    finally:
        for module, flag in flags:  # rebuild() may have called eval() on modules that both share
            module.training = flag
    if not isinstance(built, nn.Module):
        raise AdapterError(
            f"rebuild returned {type(built).__name__}: return the backbone, a torch.nn.Module."
        )
    model = unwrap(built)
    injected = find_ledger(model) is not None
    if not injected and (shared := _shared_parts(live, model)):
        detail = (
            f"rebuild() returned a model that shares {quote_names(shared)} with the live model: "
            "build a new model. If every new model has this module (a class attribute, a default "
            "argument or a global), give the live model a copy.deepcopy of the module before you "
            "add adapters or hooks to it"
        )
        return Reconstruction(Check(_LINE, "failed", detail))
    if injected or next(slots_of(model), None) is not None:
        raise AdapterError(
            "rebuild returned a model with adapters: return the backbone as it was before the "
            "injection."
        )
    if len(devices) == 1:
        model.to(devices.pop())
    _copy_strides(model, dict(backbone_tensors(live)))
    detail = "rebuild() built the backbone afresh"
    if copied:
        detail += f", with the live model's settings of {quote_names(copied, 3)}, which both share"
    return Reconstruction(Check(_LINE, "passed", detail), model)


def _copy_stateless(model: nn.Module, live: nn.Module) -> list[str]:
    """Replaces modules that a new model shares with the live model, and that keep nothing.

    An activation that is a class attribute, a default argument or a global is in every model.

    Returns:
        Their names.
    """
    live_ids = {id(module) for module in nn.Module.modules(live)}
    memo: dict[int, object] = {}
    names: list[str] = []
    for name, parent in list(nn.Module.named_modules(model)):
        if id(parent) in live_ids:  # not to be changed
            continue
        for key, child in list(parent._modules.items()):
            if id(child) in live_ids and all(map(_is_stateless, nn.Module.modules(child))):
                names += [f"{name}.{key}" if name else key] if id(child) not in memo else []
                parent._modules[key] = copy.deepcopy(child, memo)
                for each in nn.Module.modules(parent._modules[key]):
                    uncover(each)
    return names


def _is_stateless(module: nn.Module) -> bool:
    """Returns whether a module, without its children, has only its class and plain settings."""
    own, new = module.__dict__, nn.Module().__dict__
    return (
        all(own.get(key) == value for key, value in new.items() if key not in _MAY_DIFFER)
        and all(_is_setting(key, value) for key, value in own.items() if key not in new)
        and find_slot(module) is None
        and not other_state(module)
    )


def _is_setting(name: str, value: object) -> bool:
    if isinstance(value, tuple):
        return all(_is_setting(name, item) for item in value)
    if isinstance(value, FunctionType):  # a forward on the instance may run the live model
        held = (*(value.__defaults__ or ()), *(value.__closure__ or ()))
        return not hasattr(nn.Module, name) and all(_is_setting("", item) for item in held)
    if isinstance(value, BuiltinFunctionType):
        return not isinstance(value.__self__, Tensor)
    plain = bool | int | float | complex | str | bytes | torch.dtype | type
    return value is None or isinstance(value, plain)


def _copy_strides(model: nn.Module, like: Mapping[str, Tensor]) -> None:
    """Gives tensors the memory format of those of the same name; rounding depends on it."""
    for name, tensor in backbone_tensors(model):
        other = like.get(name)
        if (
            other is None
            or is_sharded(other)
            or not is_dense(tensor)
            or tensor.shape != other.shape
        ):
            continue
        if tensor.stride() != other.stride():
            tensor.data = torch.empty_like(other, dtype=tensor.dtype, device=tensor.device).copy_(
                tensor.detach()
            )


def _copied(live: nn.Module, spec: SetSpec | None) -> Reconstruction:
    # The sets are not copied, since the copy's would be removed at once.
    memo: dict[int, object] = {id(slot): AdapterSlot() for slot in slots_of(live)}
    if ledger := find_ledger(live):
        memo[id(ledger)] = replace(ledger, sets={}, active=None, trained=set())
    try:
        model = copy.deepcopy(live, memo)
        if shared := _shared_parts(live, model):
            detail = (
                f"a copy.deepcopy of the live model shares {quote_names(shared)} with the model: "
                "pass rebuild="
            )
            return Reconstruction(Check(_LINE, "failed", detail))
        if copied := find_ledger(model):  # with sets, if the model's __deepcopy__ ignores the memo
            uninstall(model, copied, list(copied.sets))
        heads = {} if spec is None else _given_heads(live, model, spec)
        for name, head in heads.items():
            take_place(model, name, head)
    except Exception as error:
        detail = f"the live model cannot be copied ({type(error).__name__}: {error}): pass rebuild="
        return Reconstruction(Check(_LINE, "failed", detail))
    own = f" and its head {quote_names(heads)} (load_adapters needs head=)" if heads else ""
    mend = "pass rebuild= to verify on a backbone built without it"
    detail = f"a copy of the live model{own}; {mend}"
    replaced, reason = replaced_forwards(model), ""
    if replaced:
        reason = (
            f"the forward of {quote_names(replaced)} was replaced on the instance and may run the "
            "live model: pass rebuild="
        )
    return Reconstruction(Check(_LINE, "not checked", detail), model, reason)


def _given_heads(live: nn.Module, model: nn.Module, spec: SetSpec) -> dict[str, nn.Module]:
    """Returns copies of the modules of a set's head that a load needs to be given."""
    heads = {name: private_module(live, spec, name) for name in spec.head}
    given = {name: heads[name] for name in heads_to_give(model, heads)}
    return private_copies(model, given, given)


def replaced_forwards(model: nn.Module) -> list[str]:
    """Returns the names of the modules whose forward was replaced on the instance."""
    return [
        name or "the model"
        for name, module in backbone_modules(model)
        if "forward" in module.__dict__
    ]


def _shared_parts(live: nn.Module, other: nn.Module) -> list[str]:
    """Returns the names of a model's modules and tensors that the live model shares."""
    live_tensors = all_tensors(live)
    live_ids = {id(part) for part in (*all_modules(live), *live_tensors)}
    memory = {pointer for tensor in live_tensors if (pointer := _memory(tensor))}
    modules = [name for name, module in nn.Module.named_modules(other) if id(module) in live_ids]
    named = (*nn.Module.named_parameters(other), *nn.Module.named_buffers(other))
    tensors = [
        name for name, tensor in named if id(tensor) in live_ids or _memory(tensor) in memory
    ]
    shared = [*modules, *tensors]
    return [
        name or "the model"
        for name in shared
        if not within(name, [other for other in modules if other != name])
    ]


def _memory(tensor: Tensor) -> int:
    """Returns the address of a tensor's memory; 0 for tensor subclasses and lazy tensors."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError, ValueError):
        return 0
