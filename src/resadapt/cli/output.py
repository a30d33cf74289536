"""A file that a command writes: verified before it takes the place, and never over another one."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from resadapt.base.errors import AdapterError
from resadapt.cli.text import show
from resadapt.files.atomic import atomic_write
from resadapt.files.location import files_to_write

__all__ = ["add_force", "check_target", "write"]


def add_force(parser: argparse.ArgumentParser) -> None:
    """Adds the argument without which no file is overwritten."""
    parser.add_argument("--force", action="store_true", help="overwrite a file that exists")


def check_target(path: str, force: bool, suffixes: tuple[str, ...]) -> Path:
    """Returns the path to write to.

    Raises:
        AdapterError: The file exists, the suffix is another, or the directory does not exist.
    """
    if Path(path).suffix not in suffixes:
        raise AdapterError(f"{path}: give a name that ends in {' or '.join(suffixes)}.")
    target, card = files_to_write(path)
    if card is not None:
        raise AdapterError(f"{path}: is a directory. Give the name of a file.")
    if target.exists() and not force:
        raise AdapterError(f"{path}: exists. Give another name, or --force to overwrite it.")
    return target


def write(target: Path, data: bytes, verify: Callable[[Path], None]) -> None:
    """Writes a file beside the target, verifies it, and puts it in the target's place.

    Args:
        target: The path, from `check_target`.
        data: The bytes.
        verify: Called with the path of the written file; raises if the file is not right.
    """
    with atomic_write(target, data) as temporary:
        verify(temporary)
    show(f"{target}: {len(data):,} bytes")
