"""``resadapt inspect``: the content of an adapter file."""

from __future__ import annotations

import argparse
import json
from typing import Any

from resadapt.base.spec import SiteSpec, is_buildable, within
from resadapt.cli.text import FILE, columns, shortened, show, show_json
from resadapt.files.adapter_file import AdapterInfo, read_adapter_info

__all__ = ["add_inspect"]


def add_inspect(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser("inspect", help="show what is in an adapter file")
    parser.add_argument("file", help=FILE)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    info = read_adapter_info(args.file)
    if args.json:
        show_json(_as_json(info))
        return 0
    lines = columns(_rows(info))
    show(str(info.path))
    for line in lines:
        show(f"  {line}")
    return 0


def _as_json(info: AdapterInfo) -> dict[str, Any]:
    backbone = info.backbone
    return {
        "path": str(info.path),
        "bytes": info.size,
        "format": info.format_version,
        "versions": info.versions,
        "set": info.set.to_json(),
        "values": {name: _values(info, name) for name in _parts(info)},
        "backbone": {
            "class": _backbone_class(info),
            "tensors": len(backbone.tensors),
            "modules": len(backbone.modules),
            "sha256": backbone.sha256,
        },
        "example": info.example,
        "probe": None if info.probe is None else info.probe.to_json(),
        "tensors": {name: record.to_json() for name, record in info.tensors.items()},
        "metadata": info.metadata,
    }


def _rows(info: AdapterInfo) -> list[tuple[str, str]]:
    spec, backbone = info.set, info.backbone
    versions = ", ".join(f"{package} {version}" for package, version in info.versions.items())
    options = "".join(f", {key}={value!r}" for key, value in spec.options.items())
    parts = {name: f"{_values(info, name):,} values" for name in _parts(info)}
    sites = columns(
        [site.name, site.shape_text, _width(site), parts[f"adapters.{site.name}"]]
        for site in spec.sites
    )
    heads = columns(
        [name, _form(spec.blueprints.get(name)), parts[f"head.{name}"]] for name in spec.head
    )
    norms = columns([name, parts[f"norms.{name}"]] for name in spec.norms)
    return [
        ("file", f"{info.size:,} bytes, format {info.format_version}, {versions}"),
        ("set", spec.name),
        ("family", f"{spec.family}{options}, dropout={spec.dropout}"),
        *_listed("sites", sites),
        *_listed("head", heads),
        *_listed(f"norms ({spec.norm})", norms),
        (
            "backbone",
            f"{_backbone_class(info) or 'unknown class'}, {len(backbone.tensors)} tensors, "
            f"{len(backbone.modules)} modules, sha256 {backbone.sha256[:12]}",
        ),
        ("probe", _probe(info)),
        *_listed("metadata", [f"{key}: {_text(value)}" for key, value in info.metadata.items()]),
    ]


def _listed(label: str, lines: list[str]) -> list[tuple[str, str]]:
    """Returns rows for a list, with the label in the first row."""
    return [("" if number else label, line) for number, line in enumerate(lines or ["none"])]


def _text(value: object) -> str:
    return shortened(json.dumps(value, ensure_ascii=False), 1_000)


def _parts(info: AdapterInfo) -> list[str]:
    spec = info.set
    sites = [f"adapters.{site.name}" for site in spec.sites]
    return [*sites, *(f"head.{n}" for n in spec.head), *(f"norms.{n}" for n in spec.norms)]


def _values(info: AdapterInfo, part: str) -> int:
    return sum(record.numel for name, record in info.tensors.items() if within(name, [part]))


def _width(site: SiteSpec) -> str:
    return f"bottleneck {site.bottleneck}" if site.bottleneck else ""


def _form(blueprint: Any) -> str:
    if not is_buildable(blueprint):
        return ", ".join(blueprint["classes"]) if blueprint else "as in the backbone"
    if "children" in blueprint:
        return f"Sequential of {len(blueprint['children'])}"
    return str(blueprint["type"])


def _backbone_class(info: AdapterInfo) -> str | None:
    root = info.backbone.modules.get("")
    return root.type if root else None


def _probe(info: AdapterInfo) -> str:
    if info.probe is None:
        return "none: outputs were not recorded"
    inputs = "a given input" if info.probe.form is None else f"generated input {info.probe.form}"
    precision = f", under autocast to {info.probe.autocast}" if info.probe.autocast else ""
    shapes = ", ".join(f"{place} {out['shape']}" for place, out in info.probe.outputs.items())
    return f"{inputs}{precision}; {shapes}"
