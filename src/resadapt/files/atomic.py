"""Atomic file writes: a temporary file is verified first, then replaces the target."""

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
except ImportError:  # Windows, where open files cannot be removed
    fcntl = None  # type: ignore[assignment]

__all__ = ["atomic_write", "created_directory"]


@contextmanager
def created_directory(directory: Path) -> Iterator[None]:
    """Creates a directory if it does not exist, and removes it if the body raises an error.

    Raises:
        AdapterFileError: The directory cannot be created.
    """
    try:
        directory.mkdir()
    except FileExistsError:
        yield
        return
    except OSError as error:
        raise AdapterFileError(f"{directory}: cannot be created: {error.strerror}.") from error
    try:
        yield
    except BaseException:
        with suppress(OSError):  # another process has written into it
            directory.rmdir()
        raise
    _flush_directory(directory.parent)


@contextmanager
def atomic_write(target: Path, data: bytes) -> Iterator[Path]:
    """Writes a temporary file, which replaces the target if the body raises nothing.

    The file is in the target's directory and is flushed to disk before the body runs. After an
    error the target is unchanged and the temporary file is removed. Temporary files that killed
    processes left for this target are removed too.

    Yields:
        The path of the temporary file.

    Raises:
        AdapterFileError: The file cannot be written, or cannot replace the target.
    """
    # A digest, so that the prefix is short for every target name.
    prefix = f".resadapt-{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]}-"
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
    """Returns a new temporary file, which is locked as long as this process has it open."""
    while True:
        path = directory / f"{prefix}{secrets.token_hex(8)}.tmp"
        file = open(path, "xb")  # noqa: SIM115 - the caller closes it
        # Before the lock, another process may take the file for a leftover, and lock or remove it.
        if _lock(file) is not False and path.exists():
            return file
        file.close()


def _remove_leftovers(directory: Path, prefix: str) -> None:
    """Removes temporary files without a lock: the processes that wrote them were killed."""
    for path in directory.glob(f"{prefix}*.tmp"):
        if path.is_file():
            with suppress(OSError), open(path, "rb") as file:
                if _lock(file):
                    path.unlink()


def _lock(file: BinaryIO) -> bool | None:
    """Locks an open file; returns whether that succeeded, None if locks are not supported."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # the file system has no locks
        return None
    return True


def _flush_directory(directory: Path) -> None:
    """Flushes a renaming to disk, where the system supports it."""
    if os.name == "posix":
        with suppress(OSError):  # the directory may be writable but not readable
            descriptor = os.open(directory, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
