"""Weighted sums of sets: of what they change, or of their tensors."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from typing import TypeVar

import torch
from torch import Tensor, nn

from resadapt.adapters.family import sums_changes
from resadapt.adapters.summing import Terms, weighted_sum
from resadapt.base.errors import AdapterError, AdapterKeyError, quote_names
from resadapt.base.spec import SetSpec, SiteSpec
from resadapt.base.tensors import full_tensor
from resadapt.injection.building import family_named, saved_shapes
from resadapt.injection.installation import install
from resadapt.injection.ledger import adapter_of, ledger_of
from resadapt.injection.private import private_module
from resadapt.injection.walk import backbone_tensors, unwrap
from resadapt.proof.state import adapter_state_dict, convert_set, load_adapter_state_dict

__all__ = ["combine_adapters"]

ModelT = TypeVar("ModelT", bound=nn.Module)


def combine_adapters(
    model: ModelT, weights: Mapping[str, float], name: str, *, sum_of: str | None = None
) -> ModelT:
    """Creates a set from a weighted sum of other sets.

    ``sum_of="changes"`` sums what the sets change: the new adapter at a site adds the weighted sum
    of the changes that the sets' adapters add, for the same input. So ``{"a": 1, "b": -1}`` is a
    minus b, and folded weights are summed exactly. ``"lora"``, ``"pooled"`` and ``"bottleneck"``
    adapters are concatenated: the new bottleneck is the sum of the sets' bottlenecks. Private norms
    are summed as differences from the backbone's norms.

    ``sum_of="tensors"`` sums each tensor, as for an average of sets trained from one start (model
    soup). For adapters that multiply their tensors, the new change is not the sum of the changes.

    A head replaces the backbone's head and is no change of it: its tensors are summed in both
    cases. All sets must have the same form, but with ``sum_of="changes"`` bottlenecks may differ.
    Sums are computed in float64, in the order of `weights`, and rounded once; integer tensors, such
    as counters, are copied from the first set. The new set becomes active; the other sets do not
    change.

    Args:
        model: An injected model.
        weights: The weight of each set, by name; weights need not sum to 1.
        name: The new set's name.
        sum_of: ``"changes"`` or ``"tensors"``. None is ``"changes"`` for linear families
            (``"lora"``, ``"parallel"``, ``"series"``, ``"ssf"``), else ``"tensors"``.

    Returns:
        The same model.

    Raises:
        InjectionError: Nothing was injected, or the model already has a set of the new name.
        AdapterKeyError: There is no such set, or the sets have different forms.
        AdapterError: A weight is not a finite number, a variance would be negative, or the family
            cannot sum changes (DoRA, ``"mona"``, ``"conv"``, ``"series"`` with a norm).

    References:
        Model soups: Wortsman et al. 2022, arXiv:2203.05482. Task arithmetic: Ilharco et al. 2022,
        arXiv:2212.04089.

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
    if sum_of is not None and not (isinstance(sum_of, str) and sum_of in ("changes", "tensors")):
        raise AdapterError(f"sum_of={sum_of!r}: give 'changes', 'tensors' or None.")
    specs = [ledger.sets[each].spec for each in weights]
    changes = sums_changes(family_named(specs[0].family)) if sum_of is None else sum_of == "changes"
    for other in specs[1:]:
        forms = [_without_sizes(spec) if changes else spec for spec in (specs[0], other)]
        if differing := forms[0].differences(forms[1]):
            raise AdapterKeyError(
                f"The sets {specs[0].name!r} and {other.name!r} differ in "
                f"{quote_names(differing)}, so they cannot be combined."
            )
    saved = [adapter_state_dict(model, each) for each in weights]
    terms = [
        (weight, {key: _wide(tensor) for key, tensor in tensors.items()})
        for weight, tensors in zip(weights.values(), saved, strict=True)
    ]
    total = weighted_sum(_without_adapters(inner, terms) if changes else terms)
    if negative := [
        key for key, tensor in total.items() if key.endswith(".running_var") and (tensor < 0).any()
    ]:
        raise AdapterError(
            f"weights: the variances {quote_names(negative)} would be negative. Choose weights of "
            "one sign."
        )
    spec = replace(specs[0], name=name, sites=_sites(specs) if changes else specs[0].sites)
    heads = {path: private_module(inner, specs[0], path) for path in spec.head}

    def fill() -> None:
        if changes:
            total.update(_summed_changes(inner, spec, terms))
        dtypes = {
            key: reduce(torch.promote_types, (tensors[key].dtype for tensors in saved))
            for key in saved[0]
        }
        state = {key: tensor.to(dtypes[key]) for key, tensor in total.items()}
        convert_set(inner, ledger.sets[name], state)
        load_adapter_state_dict(model, state, name)

    with torch.random.fork_rng(devices=[]):  # the adapters' initial values are overwritten
        example = ledger.sets[specs[0].name].example
        install(inner, spec, example, heads, fill=fill, dtype=torch.float32)
    return model


def _wide(tensor: Tensor) -> Tensor:
    """Returns a floating-point or complex tensor in double precision."""
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.to(torch.promote_types(tensor.dtype, torch.float64))
    return tensor


def _without_adapters(model: nn.Module, terms: Terms) -> Terms:
    """Returns the terms' heads and norms, and the backbone's norms with the rest of the weight."""
    kept = [
        (weight, {key: t for key, t in tensors.items() if not key.startswith("adapters.")})
        for weight, tensors in terms
    ]
    rest = 1 - math.fsum(weight for weight, _ in terms)
    if rest == 0:
        return kept
    norms = {f"norms.{path}": tensor.detach() for path, tensor in backbone_tensors(model)}
    plain = {key: _wide(full_tensor(t)) for key, t in norms.items() if key in kept[0][1]}
    return [*kept, (rest, plain)]


def _without_sizes(spec: SetSpec) -> SetSpec:
    return replace(spec, sites=tuple(replace(site, bottleneck=0) for site in spec.sites))


def _sites(specs: list[SetSpec]) -> tuple[SiteSpec, ...]:
    """Returns the sets' sites with the sums of their bottlenecks."""
    return tuple(
        replace(sites[0], bottleneck=sum(site.bottleneck for site in sites))
        for sites in zip(*(spec.sites for spec in specs), strict=True)
    )


def _summed_changes(model: nn.Module, spec: SetSpec, terms: Terms) -> dict[str, Tensor]:
    """Returns the tensors of a new set's adapters that add the weighted sum of changes."""
    total: dict[str, Tensor] = {}
    for site in spec.sites:
        adapter, prefix = adapter_of(model, spec, site), f"adapters.{site.name}."
        keys = saved_shapes(adapter)
        try:
            summed = adapter.summed(
                [
                    (weight, {key: tensors[prefix + key] for key in keys})
                    for weight, tensors in terms
                ]
            )
        except ValueError as error:
            raise AdapterError(
                f"The changes of family {spec.family!r} at site {site.name!r} cannot be summed: "
                f"{error}. sum_of='tensors' sums the tensors instead, which is not the same: use "
                "it for an average of sets that were trained from one start."
            ) from error
        total |= {prefix + key: tensor for key, tensor in summed.items()}
    return total
