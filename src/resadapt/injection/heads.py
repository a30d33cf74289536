"""Heads: modules of the backbone that a set trains as its own, and whose tensors change places with the backbone's."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from resadapt.base.errors import InjectionError
from resadapt.base.names import listing, within
from resadapt.injection.walk import backbone_modules, backbone_tensors, check_values, find_module

__all__ = ["check_places", "clone_head", "exchange", "head_tensors", "mark_heads", "replaced_heads"]

_MARK = "_resadapt_head"
"""Attribute of every module in a head. One that was put there after the injection lacks it."""


def head_tensors(model: nn.Module, head: Collection[str]) -> dict[str, Tensor]:
    """Returns the live parameters and buffers of the head, by their names in the model."""
    return {path: tensor for name in head for path, tensor in backbone_tensors(find_module(model, name), name)}


@torch.no_grad()
def clone_head(model: nn.Module, head: Collection[str]) -> dict[str, Tensor]:
    """Returns trainable copies of the head's tensors."""
    clones: dict[int, Tensor] = {}  # by the identity of the original, so that what was tied stays tied
    for tensor in head_tensors(model, head).values():
        if id(tensor) not in clones:
            trains = tensor.is_floating_point() or tensor.is_complex()
            copy = tensor.clone()
            clones[id(tensor)] = nn.Parameter(copy, trains) if isinstance(tensor, nn.Parameter) else copy
    return {path: clones[id(tensor)] for path, tensor in head_tensors(model, head).items()}


def check_places(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Checks that `exchange` can put tensors into a model.

    Raises:
        InjectionError: There is no such place, or one of another shape, or one of the two tensors has no values.
    """
    gone, halves = [], {}
    for path, tensor in tensors.items():
        place, key = _place(model, path)
        if (live := place.get(key)) is None or live.shape != tensor.shape:
            gone.append(path)
        elif live.is_meta is not tensor.is_meta:  # values cannot follow where there are none
            halves[path] = live if live.is_meta else tensor
    check_values(halves)
    if gone:
        raise InjectionError(
            f"The head has lost {listing(gone)}: it was replaced after the injection. Put the injected module back."
        )


@torch.inference_mode(False)  # what is converted here may be trained later
def exchange(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Puts tensors in the places that their names tell and returns those that were there.

    The objects are exchanged, not their values: an optimizer keeps the set it was built for, and a graph that is waiting for its
    backward pass keeps what it was computed with.
    """
    places = {path: _place(model, path) for path in tensors}
    for path, tensor in tensors.items():
        place, key = places[path]
        live = place[key]
        if (tensor.device, tensor.dtype) != (live.device, live.dtype):  # the model moved while this one was parked
            tensor.data = tensor.data.to(live.device, live.dtype)
    # Nothing has changed places so far, and nothing can fail from here on.
    before = {path: place[key] for path, (place, key) in places.items()}
    for path, (place, key) in places.items():
        place[key] = tensors[path]
    return before


def mark_heads(model: nn.Module, heads: Collection[str]) -> None:
    """Marks the modules that lie in one of these heads, and no others."""
    for name, module in backbone_modules(model):
        if within(name, heads):
            module.__dict__[_MARK] = True
        else:
            module.__dict__.pop(_MARK, None)


def replaced_heads(model: nn.Module, head: Collection[str]) -> list[str]:
    """Names the outermost modules of a head that are not the ones that were injected into."""
    replaced: list[str] = []
    for name in head:
        try:
            inside = list(backbone_modules(find_module(model, name), name))
        except InjectionError:
            replaced.append(name)
            continue
        for path, module in inside:
            if _MARK not in module.__dict__ and not within(path, replaced):
                replaced.append(path)
    return replaced


def _place(model: nn.Module, path: str) -> tuple[dict[str, Any], str]:
    """Returns the dictionary of a module that holds a tensor, and its key there."""
    parent, _, key = path.rpartition(".")
    module = find_module(model, parent)
    return (module._parameters if key in module._parameters else module._buffers), key
