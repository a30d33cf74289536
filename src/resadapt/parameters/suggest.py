"""Sites and widths of adapters for a budget of parameters and FLOPs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from resadapt.adapters.family import takes
from resadapt.base.errors import AdapterError
from resadapt.base.html_table import html_table
from resadapt.base.inputs import map_tensors
from resadapt.base.spec import SetSpec, SiteSpec
from resadapt.base.undisturbed import dry_run
from resadapt.injection.building import buildable, family_named, json_options, meta_adapter
from resadapt.injection.own_dtype import apply
from resadapt.injection.select import select_sites
from resadapt.injection.switching import on_backbone
from resadapt.injection.walk import find_module, unwrap
from resadapt.parameters.trainable import count_parameters

__all__ = ["SuggestedLayers", "suggest_layers"]

_ONE_FRACTION = "Widths are the same fraction of each site's channels, the largest that fits."
_LAST_SITES = "The sites are the last sites, as many as fit."


class SuggestedLayers(dict[str, int]):
    """Widths by site, usable as ``layers=``; ``print`` and notebooks show a table.

    Attributes:
        parameters: Number of the adapter's parameters, by site.
        flops: FLOPs of the adapter's forward on the example input, by site; empty without an
            example input.
        share: Parameters of all adapters, as a fraction of the model's parameters.
        rule: How sites and widths were chosen.
    """

    def __init__(
        self,
        widths: dict[str, int],
        parameters: dict[str, int],
        flops: dict[str, int],
        share: float,
        rule: str,
    ) -> None:
        super().__init__(widths)
        self.parameters, self.flops, self.share, self.rule = parameters, flops, share, rule

    def __str__(self) -> str:
        """Returns a table."""
        longest = max(map(len, ("site", *self)))
        heading = f"{'site'.ljust(longest)}  bottleneck  parameters"
        rows = [heading + ("          FLOPs" if self.flops else "")]
        for name, width in self.items():
            flops = f"  {self.flops[name]:>13,}" if self.flops else ""
            rows.append(
                f"{name.ljust(longest)}  {width or '':>10}  {self.parameters[name]:>10,}{flops}"
            )
        return "\n".join([*rows, self._note()])

    def _repr_html_(self) -> str:
        """Returns a table."""
        rows = []
        for name, width in self.items():
            flops = [f"{self.flops[name]:,}"] if self.flops else []
            rows.append([name, f"{width or ''}", f"{self.parameters[name]:,}", *flops])
        heading = ["site", "bottleneck", "parameters", *(["FLOPs"] if self.flops else [])]
        return html_table(heading, rows, note=self._note())

    def _note(self) -> str:
        size = sum(self.parameters.values())
        return f"{size:,} parameters, {self.share:.2%} of the model's. {self.rule}"


def suggest_layers(
    model: nn.Module,
    budget: int | float,
    *,
    family: str = "pooled",
    layers: str | Iterable[str] = ("layer1", "layer2", "layer3", "layer4"),
    flops: int | None = None,
    example_input: object = None,
    channel_dim: int | Mapping[str, int] | None = None,
    **family_options: Any,
) -> SuggestedLayers:
    """Chooses sites and widths of adapters for a budget.

    All sites in `layers` get an adapter. The widths are the same fraction of each site's channels,
    the largest that fits, and at least 1. If a family does not support a width, the next smaller
    divisor of the channels is used. If widths of 1 exceed the budget, or the family has no width,
    only the last sites are used, as many as fit: they are nearest to the output, so the backward
    pass is shortest.

    Args:
        model: A model; it is not changed.
        budget: Maximum number of parameters of all adapters: an int, or a fraction of the model's
            parameters in (0, 1).
        family: Adapter family.
        layers: Names or globs of the sites to choose from.
        flops: Maximum FLOPs of the forward of all adapters on the example input; requires
            `example_input`.
        example_input: As for `inject_adapters`.
        channel_dim: As for `inject_adapters`.
        **family_options: As for `inject_adapters`.

    Returns:
        Widths by site, usable as ``layers=``.

    Raises:
        AdapterError: A budget is invalid, or no adapter fits.
        InjectionError: A layer is not found or cannot be adapted.

    Example:
        >>> from torchvision.models import resnet18
        >>> print(suggest_layers(resnet18(), 0.01))  # doctest: +ELLIPSIS
        site    bottleneck  parameters
        layer1          10       1,354
        layer2          21       5,525
        layer3          42      21,802
        layer4          85      87,637
        116,318 parameters, 1.00% of the model's. Widths are the same fraction of ...
    """
    inner = unwrap(model)
    kind, total = family_named(family), count_parameters(model).total
    most = _limit("budget", budget, total)
    if isinstance(layers, Mapping):
        raise AdapterError(
            "layers is a mapping: pass only names, since suggest_layers chooses the widths."
        )
    start = {key: family_options.pop(key) for key in ("init",) if key in family_options}
    with on_backbone(inner):
        sites = select_sites(
            inner, kind, layers, 1 if takes(kind, "bottleneck") else 64, example_input, channel_dim
        )
        if not sites:
            raise AdapterError("layers is empty: name the sites to choose from.")
        spec = SetSpec(
            "suggested", family, json_options(kind, family_options), 0.0, "frozen", sites, ()
        )
        calls = _calls(inner, spec, example_input) if example_input is not None else {}
        if flops is not None and not calls:
            raise AdapterError("flops= requires example_input=, on which FLOPs are counted.")
        most_flops = math.inf if flops is None else _limit("flops", flops, 0)
        costs: dict[SiteSpec, tuple[int, int]] = {}

        def fits(chosen: Iterable[SiteSpec]) -> bool:
            for site in set(chosen) - costs.keys():
                costs[site] = _cost(inner, spec, site, calls.get(site.name), start)
            return (
                sum(costs[s][0] for s in chosen) <= most
                and sum(costs[s][1] for s in chosen) <= most_flops
            )

        chosen, rule = (
            _widest(sites, fits, cache(lambda site: buildable(inner, spec, site))),
            _ONE_FRACTION,
        )
        if not takes(kind, "bottleneck") or not fits(chosen):
            rule = _LAST_SITES
            while chosen and not fits(chosen):
                chosen = chosen[1:]
        if not chosen:
            smallest = costs[sites[-1]][0]
            raise AdapterError(
                f"No adapter fits the budget: the adapter at {sites[-1].name!r} has {smallest:,} "
                "parameters. Raise the budget."
            )
    parameters = {site.name: costs[site][0] for site in chosen}
    counted = {site.name: costs[site][1] for site in chosen} if calls else {}
    return SuggestedLayers(
        {s.name: s.bottleneck for s in chosen},
        parameters,
        counted,
        sum(parameters.values()) / max(total, 1),
        rule,
    )


def _widest(
    sites: tuple[SiteSpec, ...],
    fits: Callable[[list[SiteSpec]], bool],
    builds: Callable[[SiteSpec], bool],
) -> list[SiteSpec]:
    """Returns the sites with the largest widths that fit: the same fraction of each's channels."""
    if sites and sites[0].bottleneck == 0:
        return list(sites)

    def with_fraction(fraction: float) -> list[SiteSpec]:
        found = []
        for site in sites:
            width = max(1, int(fraction * site.channels))
            # A family may not support every width. Trying all smaller widths would take minutes for
            # wide layers.
            smaller = [w for w in range(min(width, site.channels), 0, -1) if site.channels % w == 0]
            tried = (replace(site, bottleneck=w) for w in (width, *smaller))
            found.append(next(filter(builds, tried), replace(site, bottleneck=1)))
        return found

    low, high = 0.0, 1.0
    while high < 64 and fits(with_fraction(high)) and with_fraction(high) != with_fraction(low):
        low, high = high, 2 * high
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(with_fraction(middle)) else (low, middle)
    return with_fraction(low)


def _cost(
    model: nn.Module,
    spec: SetSpec,
    site: SiteSpec,
    called: tuple[Any, Any] | None,
    start: dict[str, Any],
) -> tuple[int, int]:
    """Returns an adapter's number of parameters, and its FLOPs, 0 without a recorded call."""
    adapter = meta_adapter(model, spec, site, **start).eval()
    size = sum(parameter.numel() for parameter in adapter.parameters())
    if called is None:
        return size, 0
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        apply(adapter, _Layer(find_module(model, site.owner)), *called)
    return size, int(counter.get_total_flops())


def _calls(model: nn.Module, spec: SetSpec, example: object) -> dict[str, tuple[Any, Any]]:
    """Returns arguments and output of each site's module on an example input, as meta tensors."""
    calls: dict[str, tuple[Any, Any]] = {}
    with ExitStack() as stack:
        for site in spec.sites:

            def record(_module: nn.Module, args: Any, output: Any, name: str = site.name) -> None:
                calls[name] = (map_tensors(args, _to_meta), map_tensors(output, _to_meta))

            stack.callback(find_module(model, site.owner).register_forward_hook(record).remove)
        dry_run(model, example)
    return calls


class _Layer:
    """The weight and bias of a module, as meta tensors."""

    def __init__(self, module: nn.Module) -> None:
        self.weight, self.bias = (
            map_tensors(getattr(module, name, None), _to_meta) for name in ("weight", "bias")
        )


def _to_meta(tensor: Tensor) -> Tensor:
    return tensor.detach().to("meta")


def _limit(name: str, value: object, total: int) -> int:
    if isinstance(value, float) and 0.0 < value < 1.0 and total:
        return int(value * total)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    fraction = ", or a fraction of the model's parameters, a float in (0, 1)" if total else ""
    raise AdapterError(f"{name}={value!r}: pass an int >= 1{fraction}.")
