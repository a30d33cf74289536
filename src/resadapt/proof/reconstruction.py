"""The clean backbone that a file is proven on.

Built by the user, or a copy of the live model, which may share what is proven.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resadapt.base.errors import AdapterError, quote_names
from resadapt.base.tensors import is_dense, is_sharded
from resadapt.base.undisturbed import random_states_kept
from resadapt.injection.ledger import find_ledger
from resadapt.injection.sets import remove_adapters
from resadapt.injection.walk import backbone_modules, backbone_tensors, slots_of, unwrap
from resadapt.proof.report import Check

__all__ = ["Rebuild", "Reconstruction", "reconstruct", "replaced_forwards"]

Rebuild = Callable[[], nn.Module]
_LINE = "reconstruction"


@dataclass(frozen=True)
class Reconstruction:
    """A plain backbone that is independent of the live model.

    Args:
        check: What the report says of it.
        model: The backbone; None if there is none.
        shared: Why what it computes proves nothing; empty if it shares nothing known with the live
            model.
    """

    check: Check
    model: nn.Module | None = None
    shared: str = ""


def reconstruct(live: nn.Module, rebuild: Rebuild | None) -> Reconstruction:
    """Returns a plain backbone for a file to be restored into.

    Args:
        live: The live model.
        rebuild: Builds the backbone as in another process; None takes a copy of the live model.

    Raises:
        AdapterError: `rebuild` returns no plain backbone.
    """
    return _rebuilt(live, rebuild) if rebuild is not None else _copied(live)


def _rebuilt(live: nn.Module, rebuild: Rebuild) -> Reconstruction:
    devices = {tensor.device for tensor in nn.Module.parameters(live)}
    with random_states_kept(devices), torch.inference_mode(False):
        built = rebuild()
    if not isinstance(built, nn.Module):
        raise AdapterError(
            f"rebuild returned {type(built).__name__}: return the backbone, a torch.nn.Module."
        )
    model = unwrap(built)
    if find_ledger(model) is not None or next(slots_of(model), None) is not None:
        raise AdapterError(
            "rebuild returned a model with adapters: return the plain backbone, as it was before "
            "the injection."
        )
    if shared := _shared_parts(live, model):
        return Reconstruction(
            Check(
                _LINE,
                "failed",
                f"rebuild() returned a model that shares {quote_names(shared)} with the live one: "
                "build it afresh",
            )
        )
    if len(devices) == 1:
        model.to(devices.pop())
    _lay_out(model, dict(backbone_tensors(live)))
    return Reconstruction(Check(_LINE, "passed", "rebuild() built the backbone afresh"), model)


def _lay_out(model: nn.Module, like: Mapping[str, Tensor]) -> None:
    """Gives tensors the memory format of others of the same name (channels_last), on which the rounding of outputs depends."""
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


def _copied(live: nn.Module) -> Reconstruction:
    # Nothing of the adapters, of however many sets, which are taken out of the copy at once.
    unused = dict.fromkeys(
        (id(adapter) for slot in slots_of(live) for adapter in slot.children()), nn.Identity()
    )
    try:
        model = copy.deepcopy(live, unused)
        if shared := _shared_parts(live, model):
            detail = f"a copy.deepcopy of the live model shares {quote_names(shared)} with it: pass rebuild="
            return Reconstruction(Check(_LINE, "failed", detail))
        if find_ledger(model) is not None:
            remove_adapters(model)
    except Exception as error:
        detail = f"the live model cannot be copied ({type(error).__name__}: {error}): pass rebuild="
        return Reconstruction(Check(_LINE, "failed", detail))
    detail = (
        "a copy of the live model; pass rebuild= to prove that the backbone can be built without it"
    )
    replaced = replaced_forwards(model)
    reason = f"the forward of {quote_names(replaced)} was replaced on the instance and may run the live model: pass rebuild="
    return Reconstruction(Check(_LINE, "not checked", detail), model, reason if replaced else "")


def replaced_forwards(model: nn.Module) -> list[str]:
    """Names the modules whose forward was replaced on the instance, by a closure for instance, or to autocast."""
    return [
        name or "the model"
        for name, module in backbone_modules(model)
        if "forward" in module.__dict__
    ]


def _shared_parts(live: nn.Module, other: nn.Module) -> list[str]:
    """Names the modules and tensors of a model that are the live model's own, or use its memory."""
    own = {id(part) for part in (*nn.Module.modules(live), *_tensors(live))}
    memory = {pointer for tensor in _tensors(live) if (pointer := _memory(tensor))}
    modules = [
        name or "the model" for name, module in nn.Module.named_modules(other) if id(module) in own
    ]
    named = (*nn.Module.named_parameters(other), *nn.Module.named_buffers(other))
    return modules + [
        name for name, tensor in named if id(tensor) in own or _memory(tensor) in memory
    ]


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*nn.Module.parameters(model), *nn.Module.buffers(model)]


def _memory(tensor: Tensor) -> int:
    """Returns the address of a tensor's memory, 0 if it has none of its own."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (
        NotImplementedError,
        RuntimeError,
        ValueError,
    ):  # a tensor that is made of others, or has no size yet
        return 0
