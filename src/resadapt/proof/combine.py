"""Weighted sums of sets."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from resadapt.base.errors import AdapterError, AdapterKeyError, quote_names
from resadapt.injection.installation import install
from resadapt.injection.ledger import ledger_of
from resadapt.injection.private import private_module
from resadapt.injection.walk import unwrap
from resadapt.proof.state import adapter_state_dict, load_adapter_state_dict

__all__ = ["combine_adapters"]

ModelT = TypeVar("ModelT", bound=nn.Module)


def combine_adapters(model: ModelT, weights: Mapping[str, float], name: str) -> ModelT:
    """Makes a new set of sets of one form: every tensor the weighted sum of theirs, head and norms
    included.

    Sums are taken in float64, in the order of `weights`, and rounded once; tensors of integers,
    such as counters, are the first set's. It is a sum of tensors: where an adapter's change is a
    product of two of them (``"lora"``), it is not the sum of the changes. The new set becomes the
    active one; the others stay as they are.

    Args:
        model: An injected model.
        weights: The weight of each set, by name; they need not add up to 1.
        name: The new set's name.

    Returns:
        The same model.

    Raises:
        InjectionError: Nothing was injected, or there is a set of the new name already.
        AdapterKeyError: There is no such set, or the sets have different forms.
        AdapterError: A weight is no finite number, or a variance would be negative.

    References:
        Model soups: Wortsman et al. 2022, arXiv:2203.05482.

    Example:
        >>> from torchvision.models import resnet18
        >>> from resadapt import inject_adapters
        >>> model = inject_adapters(inject_adapters(resnet18(), name="a"), name="b")
        >>> model = combine_adapters(model, {"a": 0.5, "b": 0.5}, "both")
        >>> a, b, both = (adapter_state_dict(model, name)["adapters.layer4.up.weight"] for name in ("a", "b", "both"))
        >>> bool((both == ((a.double() + b.double()) / 2).float()).all())
        True
    """
    ledger, inner = ledger_of(model), unwrap(model)
    if not isinstance(weights, Mapping) or not weights:
        raise AdapterError(f"weights={weights!r}: give a mapping from names of sets to numbers.")
    for each, weight in weights.items():
        ledger.set_named(each)
        if (
            isinstance(weight, bool)
            or not isinstance(weight, int | float)
            or not abs(weight) <= sys.float_info.max
        ):
            raise AdapterError(f"weights: {each!r} has {weight!r}, not a finite number.")
    if not isinstance(name, str):
        raise AdapterError(
            f"name={name!r} is {type(name).__name__}: give the new set's name as text."
        )
    first, *others = weights
    adapter_set = ledger.sets[first]
    for other in others:
        if differing := ledger.sets[other].spec.differences(adapter_set.spec):
            raise AdapterKeyError(
                f"The sets {first!r} and {other!r} differ in {quote_names(differing)}, so there is "
                "no sum of them."
            )
    tensors = {each: adapter_state_dict(model, each) for each in weights}
    total = {
        key: _sum([(weight, tensors[each][key]) for each, weight in weights.items()])
        for key in tensors[first]
    }
    if lost := [
        key for key, tensor in total.items() if key.endswith(".running_var") and (tensor < 0).any()
    ]:
        raise AdapterError(
            f"weights: with these {quote_names(lost)} would be negative, and no variance is. "
            "Choose weights of one sign."
        )
    spec = replace(adapter_set.spec, name=name)
    heads = {path: private_module(inner, adapter_set.spec, path) for path in spec.head}
    with torch.random.fork_rng(devices=[]):  # the adapters' start is overwritten at once
        install(
            inner,
            spec,
            adapter_set.example,
            heads,
            fill=partial(load_adapter_state_dict, model, total, name),
        )
    return model


def _sum(terms: list[tuple[float, Tensor]]) -> Tensor:
    first = terms[0][1]
    if not first.is_floating_point() and not first.is_complex():
        return first
    total = torch.zeros_like(first, dtype=torch.promote_types(first.dtype, torch.float64))
    for weight, tensor in terms:
        total += weight * tensor.to(total.dtype)
    return total.to(first.dtype)
