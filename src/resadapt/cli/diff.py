"""``resadapt diff``: the content of two adapter files, compared."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from resadapt.base.fingerprint import Fingerprint, TensorRecord
from resadapt.base.module_record import ModuleRecord
from resadapt.base.spec import SetSpec, SiteSpec
from resadapt.base.tensors import same_bits
from resadapt.cli.text import FILE, shortened, show
from resadapt.files.adapter_file import read_adapter_file

__all__ = ["add_diff"]

_MOST = 8
_ABSENT = object()


def add_diff(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "diff",
        help="compare two adapter files",
        description="Compares what two adapter files hold. The container, the format and the "
        "versions that wrote them are not compared. Exits with 0 if the files are equal, 1 if they "
        "differ, 2 on an error.",
    )
    for each in ("a", "b"):
        parser.add_argument(each, help=FILE)
    parser.add_argument(
        "--tensors", action="store_true", help=f"show all that differs, not {_MOST} lines a part"
    )
    parser.set_defaults(run=_run, trouble=2)


def _run(args: argparse.Namespace) -> int:
    (one, stored), (other, others) = read_adapter_file(args.a), read_adapter_file(args.b)
    parts = {
        "set": [*_set(one.set, other.set)],
        "backbone": [*_backbone(one.backbone, other.backbone)],
        "tensors": [*_tensors(_of_set(stored), _of_set(others))],
        "probe": [
            *_entries("", {"example": one.example}, {"example": other.example}),
            *_entries("", *(each.probe.to_json() if each.probe else {} for each in (one, other))),
            *_tensors(_of_probe(stored), _of_probe(others)),
        ],
        "metadata": [*_entries("", one.metadata, other.metadata)],
    }
    for part, lines in parts.items():
        shown = lines if args.tensors else lines[:_MOST]
        for line in shown:
            show(f"{part:<8}  {line if args.tensors else shortened(line)}")
        if len(lines) > len(shown):
            show(f"{part:<8}  and {len(lines) - len(shown)} more (--tensors lists them)")
    return 1 if any(parts.values()) else 0


def _entries(label: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[str]:
    """Yields the differences of two mappings, entry by entry."""
    for key in [*one, *(key for key in other if key not in one)]:
        pair = one.get(key, _ABSENT), other.get(key, _ABSENT)
        # As JSON, 1, 1.0 and True differ, also within lists.
        if len({json.dumps(each, sort_keys=True, default=repr) for each in pair}) > 1:
            before, after = ("nothing" if each is _ABSENT else repr(each) for each in pair)
            yield f"{label}{key}: {before} -> {after}"


def _set(one: SetSpec, other: SetSpec) -> Iterator[str]:
    compared = [each.name for each in fields(SetSpec) if each.name not in ("sites", "blueprints")]
    yield from _entries(
        "",
        {name: getattr(one, name) for name in compared},
        {name: getattr(other, name) for name in compared},
    )
    sites = [{site.name: site for site in spec.sites} for spec in (one, other)]
    for name in [*sites[0], *(name for name in sites[1] if name not in sites[0])]:
        before, after = (_fields(each.get(name)) for each in sites)
        if not (before and after):
            yield f"site {name!r}: only in {'A' if before else 'B'}"
        else:
            yield from _entries(f"site {name!r}, ", before, after)
    yield from _entries("form of the head ", one.blueprints, other.blueprints)


def _fields(site: SiteSpec | None) -> dict[str, Any]:
    return {} if site is None else vars(site)


def _backbone(one: Fingerprint, other: Fingerprint) -> Iterator[str]:
    for kind in ("tensors", "modules"):
        before, after = getattr(one, kind), getattr(other, kind)
        for name in [*before, *(name for name in after if name not in before)]:
            label = f"{kind[:-1]} {name!r}"
            if name not in before or name not in after:
                yield f"{label}: only in {'A' if name in before else 'B'}"
            else:
                yield from _entries(f"{label}, ", *map(_flat, (before[name], after[name])))


def _flat(record: TensorRecord | ModuleRecord) -> dict[str, Any]:
    """Returns a record's entries, with digests in short."""
    if isinstance(record, TensorRecord):
        return vars(record) | {"sha256": record.sha256[:12]}
    state = {f"state {key}": digest[:12] for key, digest in record.state.items()}
    return {"type": record.type} | record.config | state


def _of_set(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("probe.")}


def _of_probe(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith("probe.")}


def _tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Iterator[str]:
    """Yields the differences of the tensors, the largest difference of values first."""
    forms, values = [], {}
    for name in [*one, *(name for name in other if name not in one)]:
        if name not in one or name not in other:
            forms.append(f"{name}: only in {'A' if name in one else 'B'}")
            continue
        before, after = one[name], other[name]
        if (before.shape, before.dtype) != (after.shape, after.dtype):
            forms.append(
                f"{name}: {list(before.shape)} {before.dtype} -> {list(after.shape)} {after.dtype}"
            )
        elif not same_bits(before, after):
            values[name] = _largest_difference(before, after)
    yield from forms
    for name, (difference, largest) in sorted(values.items(), key=lambda item: -_rank(item[1][0])):
        yield f"{name}: differs by up to {difference:.3g} (largest value {largest:.3g})"


def _rank(difference: float) -> float:
    return math.inf if math.isnan(difference) else difference


def _largest_difference(one: Tensor, other: Tensor) -> tuple[float, float]:
    wide = torch.complex128 if one.is_complex() else torch.float64
    one, other = one.to(wide), other.to(wide)
    return float((one - other).abs().max()), float(one.abs().max())
