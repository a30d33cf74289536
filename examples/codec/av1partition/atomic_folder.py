"""Folders that are there whole, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_free(path: Path) -> None:
    """Refuse a path at which something is already, but for an empty folder.

    Raises:
        FileExistsError: It is taken. Long work asks before it starts.
    """
    if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
        raise FileExistsError(
            f"{path}: is there already; delete it, or choose another --output-dir"
        )


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill a folder beside ``path``, which becomes ``path`` in one step at the end.

    Args:
        path: The new folder; may exist if it is empty.

    Yields:
        The folder to write into. If the body fails, it is removed; if the process is killed, it
        remains as ``<path>.partial`` and the next attempt clears it away.

    Raises:
        FileExistsError: ``path`` is taken.
    """
    check_free(path)
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if (
            path.exists()
        ):  # Empty, else the next line fails. Not every system renames a folder onto another.
            path.rmdir()
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
