"""A file that a command writes: verified before it takes the place, and never over another one."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from resadapt.base.errors import AdapterError
from resadapt.cli.text import show
from resadapt.files.atomic import atomic_write
from resadapt.files.location import file_to_read, files_to_write

__all__ = ["add_force", "check_target", "write"]


def add_force(parser: argparse.ArgumentParser) -> None:
    """Adds the argument without which no file is overwritten."""
    parser.add_argument("--force", action="store_true", help="overwrite a file that exists")


def check_target(args: argparse.Namespace, suffixes: tuple[str, ...]) -> Path:
    """Returns the path to write to, with links resolved.

    Raises:
        AdapterError: The file exists, or is one that the command reads; the suffix is another, or
            the directory does not exist.
    """
    if Path(args.out).suffix not in suffixes:
        raise AdapterError(f"{args.out}: give a name that ends in {' or '.join(suffixes)}.")
    target, card = files_to_write(args.out)
    if card is not None:
        raise AdapterError(f"{args.out}: is a directory. Give the name of a file.")
    weights = getattr(args, "weights", None) or ""
    if target.exists() and any(
        os.path.exists(read) and target.samefile(read)
        for read in (file_to_read(args.file), weights)
    ):
        raise AdapterError(f"{args.out}: is the file to read. Give another name.")
    _refuse_existing(args, target)
    return target


def write(
    args: argparse.Namespace, target: Path, data: bytes, verify: Callable[[Path], None]
) -> None:
    """Writes a file beside the target, verifies it, and puts it in the target's place.

    Args:
        args: The arguments.
        target: The path, from `check_target`.
        data: The bytes.
        verify: Called with the path of the written file; raises if the file is not right.
    """
    with atomic_write(target, data) as temporary:
        verify(temporary)
        _refuse_existing(args, target)  # another process may have written it meanwhile
    show(f"{target}: {len(data):,} bytes")


def _refuse_existing(args: argparse.Namespace, target: Path) -> None:
    if target.exists() and not args.force:
        raise AdapterError(f"{args.out}: exists. Give another name, or --force to overwrite it.")
