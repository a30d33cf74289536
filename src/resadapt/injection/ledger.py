"""What an injected model remembers: its sets, and what it was before. Names and parked tensors only, no reference to a module."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from resadapt.base.errors import AdapterKeyError, InjectionError, listing
from resadapt.base.fingerprint import TensorRecord
from resadapt.base.spec import SetSpec
from resadapt.injection.slots import SLOT, AdapterSlot, backbone_tensors

__all__ = [
    "LEDGER",
    "AdapterSet",
    "Ledger",
    "adapter_tensors",
    "find_ledger",
    "head_tensors",
    "ledger_of",
    "plain_tensors",
    "swap",
    "unwrap",
]

LEDGER = "_resadapt"
"""Attribute of the injected model that holds its ledger."""


@dataclass
class AdapterSet:
    """One set: its description, and what it keeps aside while another set is active."""

    spec: SetSpec
    example: Any = None
    """Description of the example input, from which a probe can be made."""
    parked_head: dict[str, Tensor] = field(default_factory=dict)
    parked_requires_grad: dict[str, bool] = field(default_factory=dict)


@dataclass
class Ledger:
    """The state of an injected model."""

    fingerprint: dict[str, TensorRecord]
    requires_grad: dict[str, bool]
    training: dict[str, bool]
    sets: dict[str, AdapterSet] = field(default_factory=dict)
    active: str | None = None
    parked_plain: dict[str, Tensor] = field(default_factory=dict)
    """The backbone's own tensors where the active set's head is in their place."""

    def set_named(self, name: str) -> AdapterSet:
        """Returns a set, or says which there are."""
        if name not in self.sets:
            raise AdapterKeyError(f"There is no adapter set {name!r}; the model has {listing(list(self.sets))}.")
        return self.sets[name]


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the model inside DataParallel, DistributedDataParallel or torch.compile."""
    if not isinstance(model, nn.Module):
        raise InjectionError(f"model is {type(model).__name__}, not a torch.nn.Module.")
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def find_ledger(model: nn.Module) -> Ledger | None:
    """Returns the ledger of a model, or None if nothing was injected into it."""
    ledger = unwrap(model).__dict__.get(LEDGER)
    return ledger if isinstance(ledger, Ledger) else None


def ledger_of(model: nn.Module) -> Ledger:
    """Returns the ledger of a model.

    Raises:
        InjectionError: Nothing was injected into this very model.
    """
    if ledger := find_ledger(model):
        return ledger
    inside = [name for name, module in model.named_modules() if LEDGER in module.__dict__]
    if inside:
        hint = f"Its submodule {inside[0]!r} was: pass model.get_submodule({inside[0]!r})."
    elif any(isinstance(module, AdapterSlot) for module in model.modules()):
        hint = "It is a part of an injected model: pass the whole model."
    else:
        hint = "Call inject_adapters(model, ...) first."
    raise InjectionError(f"This {type(model).__name__} was not injected into. {hint}")


def head_tensors(model: nn.Module, head: tuple[str, ...]) -> dict[str, Tensor]:
    """Returns the live parameters and buffers of the head, by their names in the model."""
    return {path: tensor for name in head for path, tensor in backbone_tensors(model.get_submodule(name), name)}


def adapter_tensors(model: nn.Module, spec: SetSpec) -> Iterator[tuple[str, nn.Parameter | Tensor]]:
    """Walks the parameters and buffers of a set's adapters as ``site.tensor``."""
    for site in spec.sites:
        owner = model.get_submodule(site.owner)
        slot = owner._modules.get(SLOT)
        if not isinstance(slot, AdapterSlot) or spec.name not in slot._modules:
            raise InjectionError(
                f"Module {site.owner!r} has lost its adapter of set {spec.name!r}: it was replaced after the injection. "
                "Put the injected module back, or inject again into a fresh model."
            )
        for key, tensor in backbone_tensors(slot.get_submodule(spec.name)):
            yield f"{site.name}.{key}", tensor


def plain_tensors(model: nn.Module, ledger: Ledger) -> dict[str, Tensor]:
    """Returns every tensor of the plain backbone, those under the active head included."""
    return dict(backbone_tensors(model)) | ledger.parked_plain


def swap(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Puts tensors in the places that their names tell and returns those that were there.

    The objects are exchanged, not their values: an optimizer keeps the set it was built for, and a graph that is waiting for its
    backward pass keeps what it was computed with.
    """
    before = dict(backbone_tensors(model))
    if gone := [path for path, tensor in tensors.items() if path not in before or before[path].shape != tensor.shape]:
        raise InjectionError(
            f"The head has lost {listing(gone)}: it was replaced after the injection. Put the injected module back."
        )
    for path, tensor in tensors.items():
        parent, _, key = path.rpartition(".")
        module = model.get_submodule(parent)
        place = module._parameters if key in module._parameters else module._buffers
        live = before[path]
        if (tensor.device, tensor.dtype) != (live.device, live.dtype):  # the model moved while this one was parked
            tensor.data = tensor.data.to(live.device, live.dtype)
        place[key] = tensor  # type: ignore[assignment]
    return {path: before[path] for path in tensors}


@torch.no_grad()
def clone_head(model: nn.Module, head: tuple[str, ...]) -> dict[str, Tensor]:
    """Returns trainable copies of the head's tensors."""
    clones: dict[int, Tensor] = {}  # by the identity of the original, so that what was tied stays tied
    for tensor in head_tensors(model, head).values():
        if id(tensor) not in clones:
            trains = tensor.is_floating_point() or tensor.is_complex()
            copy = tensor.clone()
            clones[id(tensor)] = nn.Parameter(copy, trains) if isinstance(tensor, nn.Parameter) else copy
    return {path: clones[id(tensor)] for path, tensor in head_tensors(model, head).items()}
