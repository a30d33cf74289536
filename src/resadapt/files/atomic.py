"""Writing a file all or nothing: beside the target first, over it when it has been found good."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from resadapt.base.errors import AdapterFileError

try:
    import fcntl
except ImportError:  # Windows, where nobody can remove a file that is open
    fcntl = None  # type: ignore[assignment]

__all__ = ["atomic_write", "target_of"]


def target_of(path: object) -> Path:
    """Returns where a file is to be written, links followed, after looking whether that can be
    done.

    Raises:
        AdapterFileError: It cannot.
    """
    try:
        target = Path(os.path.realpath(os.fsdecode(path)))  # type: ignore[arg-type]
        exists = target.exists()
    except (OSError, TypeError, ValueError) as error:
        raise AdapterFileError(f"{path!r}: is no path of a file: {error}.") from error
    if exists and not target.is_file():
        kind = "a directory" if target.is_dir() else "no ordinary file"
        raise AdapterFileError(f"{target}: is {kind}. Give the path of a file.")
    if not target.parent.is_dir():
        raise AdapterFileError(
            f"{target}: the directory {target.parent} does not exist. Create it first."
        )
    return target


@contextmanager
def atomic_write(target: Path, data: bytes) -> Iterator[Path]:
    """Writes a temporary file beside the target for the body to examine; it takes the target's
    place when the body ends well.

    The file reaches the disk before the body runs. Whatever fails, the target is what it was and
    nothing else is left. Temporary files that killed processes left for this target are removed.

    Yields:
        The path of the temporary file.

    Raises:
        AdapterFileError: The disk refuses.
    """
    prefix = f".resadapt-{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]}-"  # short, whatever the target's name
    _remove_leftovers(target.parent, prefix)
    try:
        file = _created(target.parent, prefix)
    except OSError as error:
        raise AdapterFileError(
            f"{target}: cannot be written: {error.strerror}. The previous file, if any, is intact."
        ) from error
    temporary = Path(file.name)
    try:
        with file:
            try:
                if target.exists():
                    os.chmod(temporary, target.stat().st_mode & 0o7777)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            except OSError as error:
                raise AdapterFileError(
                    f"{target}: cannot be written: {error.strerror}. The previous file, if any, is "
                    "intact."
                ) from error
            yield temporary
            if fcntl is None:
                file.close()
            try:
                os.replace(temporary, target)
            except OSError as error:
                raise AdapterFileError(
                    f"{target}: cannot be replaced: {error.strerror}. The previous file is intact."
                ) from error
    finally:
        temporary.unlink(missing_ok=True)
    _flush_directory(target.parent)


def _created(directory: Path, prefix: str) -> BinaryIO:
    """Returns a new temporary file, which stays locked for as long as this process has it open."""
    while True:
        path = directory / f"{prefix}{secrets.token_hex(8)}.tmp"
        file = open(path, "xb")  # noqa: SIM115 - the caller closes it
        # Not yet locked, another process may take it for one that was left behind: it has the lock
        # now, or has removed the file.
        if _lock(file) is not False and path.exists():
            return file
        file.close()


def _remove_leftovers(directory: Path, prefix: str) -> None:
    """Removes temporary files that no process has locked: those that wrote them were killed."""
    for path in directory.glob(f"{prefix}*.tmp"):
        if path.is_file():
            with suppress(OSError), open(path, "rb") as file:
                if _lock(file):
                    path.unlink()


def _lock(file: BinaryIO) -> bool | None:
    """Locks an open file.

    Tells whether this process has the lock now, None where there are no locks.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def _flush_directory(directory: Path) -> None:
    """Has a renaming reach the disk, where directories can be flushed."""
    if os.name == "posix":
        with suppress(OSError):  # a directory that may be written but not read
            descriptor = os.open(directory, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
