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
    """Creates a set from weighted sums of other sets' tensors, head and norms included.

    All sets must have the same form. Sums are computed in float64, in the order of `weights`, and
    rounded once; integer tensors, such as counters, are copied from the first set. If an adapter's
    update is a product of two tensors (``"lora"``), the new update is not the sum of the updates.
    The new set becomes active; the other sets do not change.

    Args:
        model: An injected model.
        weights: The weight of each set, by name; weights need not sum to 1.
        name: The new set's name.

    Returns:
        The same model.

    Raises:
        InjectionError: Nothing was injected, or the model already has a set of the new name.
        AdapterKeyError: There is no such set, or the sets have different forms.
        AdapterError: A weight is not a finite number, or a variance would be negative.

    References:
        Model soups: Wortsman et al. 2022, arXiv:2203.05482.

    Example:
        >>> from torchvision.models import resnet18
        >>> from resadapt import inject_adapters
        >>> model = inject_adapters(inject_adapters(resnet18(), name="a"), name="b")
        >>> model = combine_adapters(model, {"a": 0.5, "b": 0.5}, "both")
        >>> sets = [adapter_state_dict(model, name) for name in ("a", "b", "both")]
        >>> a, b, both = (tensors["adapters.layer4.up.weight"] for tensors in sets)
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
            f"name={name!r} is {type(name).__name__}: give the new set's name, a string."
        )
    first, *others = weights
    adapter_set = ledger.sets[first]
    for other in others:
        if differing := ledger.sets[other].spec.differences(adapter_set.spec):
            raise AdapterKeyError(
                f"The sets {first!r} and {other!r} differ in {quote_names(differing)}, so they "
                "cannot be combined."
            )
    tensors = {each: adapter_state_dict(model, each) for each in weights}
    total = {
        key: _sum([(weight, tensors[each][key]) for each, weight in weights.items()])
        for key in tensors[first]
    }
    if negative := [
        key for key, tensor in total.items() if key.endswith(".running_var") and (tensor < 0).any()
    ]:
        raise AdapterError(
            f"weights: the variances {quote_names(negative)} would be negative. Choose weights of "
            "one sign."
        )
    spec = replace(adapter_set.spec, name=name)
    heads = {path: private_module(inner, adapter_set.spec, path) for path in spec.head}
    with torch.random.fork_rng(devices=[]):  # the adapters' initial values are overwritten
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
