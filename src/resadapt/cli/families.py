"""``resadapt families``: the families of adapters."""

from __future__ import annotations

import argparse
from typing import Any

from resadapt.adapters import FamilyInfo, list_families
from resadapt.adapters.family import FAMILIES, options_of, takes
from resadapt.base.errors import AdapterError, quote_names
from resadapt.cli.text import columns, show

__all__ = ["add_families"]


def add_families(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser("families", help="list the families of adapters")
    parser.add_argument("name", nargs="?", help="one family, in detail")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    families = {info.name: info for info in list_families()}
    if args.name is not None and args.name not in families:
        raise AdapterError(
            f"There is no family {args.name!r}. Choose one of {quote_names(families)}."
        )
    for line in columns(_details(families[args.name]) if args.name else _table(families)):
        show(line)
    return 0


def _table(families: dict[str, FamilyInfo]) -> list[tuple[str, ...]]:
    head = ("family", "reads", "foldable", "adapted output")
    return [head, *((i.name, i.reads, _yes(i.foldable), i.formula) for i in families.values())]


def _details(info: FamilyInfo) -> list[tuple[str, str]]:
    family = FAMILIES[info.name]
    options = options_of(family, {}).items()
    sizes = [name for name in ("bottleneck", "dropout") if takes(family, name)]
    return [
        ("family", info.name),
        ("about", (family.__doc__ or "").strip().partition("\n")[0]),
        ("adapted output", info.formula),
        ("reads", info.reads),
        ("parameters", info.size),
        ("starts", info.starts),
        ("foldable", _yes(info.foldable)),
        ("arguments", ", ".join(sizes) or "none"),
        ("options", ", ".join(f"{name}={value!r}" for name, value in options) or "none"),
        ("source", info.source),
    ]


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"
