"""``resadapt convert``: an adapter file in the other container."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from resadapt.base.errors import AdapterFileError
from resadapt.base.tensors import same_bits
from resadapt.cli.output import add_force, check_target, write
from resadapt.cli.text import FILE
from resadapt.files.adapter_file import read_adapter_file
from resadapt.files.container import decode, encode, format_for

__all__ = ["add_convert"]


def add_convert(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "convert",
        help="write an adapter file as .pt or .safetensors, tensors and manifest unchanged",
    )
    parser.add_argument("file", help=FILE)
    parser.add_argument("out", help="ends in .pt or .safetensors")
    add_force(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    target = check_target(args, (".pt", ".pth", ".safetensors"))
    path = read_adapter_file(args.file)[0].path  # is it valid?
    manifest, tensors = decode(path.read_bytes(), path)

    def verify(temporary: Path) -> None:
        again, others = decode(temporary.read_bytes(), target)
        same = tensors.keys() == others.keys() and all(
            same_bits(tensor, others[name]) for name, tensor in tensors.items()
        )
        if again != manifest or not same:
            raise AdapterFileError(f"{target}: the written file differs. Nothing was replaced.")

    write(args, target, encode(manifest, tensors, format_for(Path(args.out))), verify)
    return 0
