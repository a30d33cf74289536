"""Where an adapter file is: at a path, in a directory, or in a repository on the Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote

from resadapt.base.errors import AdapterFileError
from resadapt.files.container import format_for

__all__ = ["file_to_read", "files_to_write"]

_NAMES = ("adapters.safetensors", "adapters.pt")
"""The adapter file of a directory or repository: the first of these that exists."""
_CARD = "README.md"
_SEPARATORS = (os.sep, os.altsep or os.sep)
# One slash is enough: pathlib turns two slashes into one.
_HUB = "hf:/"
_ADDRESS = re.compile(r"hf://?([\w.-]+/[\w.-]+)(?:@([^/]+))?(?:/(.*))?", re.ASCII)


def files_to_write(path: object) -> tuple[Path, Path | None]:
    """Returns the adapter file to write, with links resolved, and the model card to write.

    A path that ends in a slash, or is an existing directory, is a directory with a model card. It
    may be missing, but not its parent.

    Raises:
        AdapterFileError: The path is not a valid file path, the directory does not exist, or the
            suffix asks for a package that is not installed.
    """
    try:
        text = _text(path)
        if text.startswith(_HUB):
            raise AdapterFileError(
                f"{text}: a save writes to local files only. Save to a directory, "
                'save_adapters(model, "my-adapter/"), and upload it with '
                "huggingface_hub.upload_folder."
            )
        whole = Path(os.path.realpath(text))
        target, card = whole, None
        if text.endswith(_SEPARATORS) or whole.is_dir():
            target = Path(os.path.realpath(_adapter_file(whole)))
            card = Path(os.path.realpath(whole / _CARD))
        for each in (target, card or target):
            if each.exists() and not each.is_file():
                kind = "a directory" if each.is_dir() else "not a regular file"
                raise AdapterFileError(f"{each}: is {kind}. Pass another path.")
        if card is not None and whole.exists() and not whole.is_dir():
            raise AdapterFileError(f"{text}: is not a directory. Remove the slash.")
    except (OSError, TypeError, ValueError) as error:
        raise AdapterFileError(f"{path!r:.200}: is not a file path: {error}.") from error
    if not whole.parent.is_dir():
        raise AdapterFileError(
            f"{whole}: the directory {whole.parent} does not exist. Create it first."
        )
    format_for(target)
    return target, card


def file_to_read(path: object) -> Path:
    """Returns the path of an adapter file; a file in a repository is downloaded unless cached.

    Raises:
        AdapterFileError: A directory or repository has no adapter file, or a download failed.
        OSError, TypeError, ValueError: The path is not a path.
    """
    text = _text(path)
    if text.startswith(_HUB):
        return _from_hub(text)
    found = Path(text)
    if found.is_dir():
        found = _adapter_file(found)
        if not found.exists():
            raise AdapterFileError(
                f"{text}: the directory has neither {' nor '.join(_NAMES)}. Pass the path of the "
                "adapter file."
            )
    return found


def _text(path: object) -> str:
    text = os.fsdecode(path)  # type: ignore[arg-type]
    if not text:  # pathlib takes it for the current directory
        raise ValueError("it is empty")
    return text


def _adapter_file(directory: Path) -> Path:
    """Returns the adapter file that a directory has, or would get."""
    # A save replaces the file that a load would read, so that a directory has only one.
    for name in _NAMES:
        if (directory / name).exists():
            return directory / name
    return directory / f"adapters.{format_for(directory / 'adapters')}"


def _from_hub(address: str) -> Path:
    """Returns the local path of a file in a repository: from the cache, else downloaded."""
    match = _ADDRESS.fullmatch(address)
    repository, revision, file = match.groups() if match else ("", None, None)
    revision = revision and unquote(revision)
    if not match or ".." in re.split(r"[/\\]", f"{revision}/{file}"):
        raise AdapterFileError(
            f"{address}: is not an address on the Hub. Write hf://user/name, "
            "hf://user/name@revision or hf://user/name@revision/file."
        )
    try:
        from huggingface_hub import hf_hub_download  # noqa: PLC0415 - an optional package
        from huggingface_hub.errors import (  # noqa: PLC0415
            EntryNotFoundError,
            LocalEntryNotFoundError,
        )
    except ImportError as error:
        raise AdapterFileError(
            f"{address}: to read it, install resadapt[hub], or download the file and pass its path."
        ) from error
    names = [file] if file else _NAMES
    try:
        for cached in (True, False):
            for name in names:
                try:
                    return Path(
                        hf_hub_download(
                            repository, name, revision=revision, local_files_only=cached
                        )
                    )
                except EntryNotFoundError as error:
                    if not cached and isinstance(error, LocalEntryNotFoundError):  # no network
                        raise
    except Exception as error:  # the package's errors and its HTTP client's have no common base
        raise AdapterFileError(
            f"{address}: is not in the cache, and cannot be downloaded "
            f"({type(error).__name__}: {' '.join(str(error).split()):.400}). Check the address and "
            "the network, and that HF_HUB_OFFLINE is not set; private repositories need a login."
        ) from error
    raise AdapterFileError(
        f"{address}: the repository has no file {' or '.join(names)}. Check the address."
    )
