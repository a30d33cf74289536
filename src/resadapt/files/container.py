"""Bytes of an adapter file: manifest and tensors in .safetensors or .pt, sealed by a digest.

The seal is 64 hexadecimal digits inside the file: SHA-256 of all bytes, with zeros in place of the
digits. In a .safetensors file the seal precedes the manifest in the metadata entry ``resadapt``; in
a .pt file it is in the comment at the end of the zip archive.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickletools
import re
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resadapt.base.errors import AdapterFileError

__all__ = ["decode", "encode", "format_for"]

_ENTRY = "resadapt"
_OPENING = f'"{_ENTRY}":"'.encode()
_COMMENT = b"resadapt:"
_DIGITS = 64
_GLOBALS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_tensor_v[23]|torch(\.storage)? \w+Storage"
    r"|torch u?int\d+|torch float\w+"
)
_OPCODES = frozenset(
    {
        *(
            "PROTO",
            "STOP",
            "MARK",
            "GLOBAL",
            "REDUCE",
            "BINPERSID",
            "EMPTY_DICT",
            "SETITEM",
            "SETITEMS",
            "BINUNICODE",
        ),
        *(
            "EMPTY_TUPLE",
            "TUPLE",
            "TUPLE1",
            "TUPLE2",
            "TUPLE3",
            "NEWFALSE",
            "NEWTRUE",
            "NONE",
            "BININT",
            "BININT1",
            "BININT2",
        ),
        *("LONG1", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
    }
)
_BLANK = b"0" * _DIGITS


def format_for(path: Path) -> str:
    """Returns the container for a path's suffix; for other suffixes safetensors if installed.

    Raises:
        AdapterFileError: The suffix is .safetensors and the package is not installed.
    """
    installed = find_spec("safetensors") is not None
    match path.suffix.lower():
        case ".pt" | ".pth":
            return "pt"
        case ".safetensors" if not installed:
            raise AdapterFileError(
                f"{path}: the package safetensors is not installed. Install resadapt[safetensors], "
                "or choose a name ending in .pt."
            )
    return "safetensors" if installed else "pt"


def encode(manifest: dict[str, Any], tensors: dict[str, Tensor], format: str) -> bytes:
    """Returns the bytes of a file; equal content results in equal bytes."""
    text = json.dumps(manifest, separators=(",", ":"))
    tensors = {
        name: tensor.detach().cpu().contiguous().clone() for name, tensor in sorted(tensors.items())
    }
    data = bytearray(
        _safetensors_bytes(text, tensors) if format == "safetensors" else _zip_bytes(text, tensors)
    )
    at = _seal_position(data)
    data[at : at + _DIGITS] = _seal(data, at)
    return bytes(data)


def _safetensors_bytes(text: str, tensors: dict[str, Tensor]) -> bytes:
    import safetensors.torch  # noqa: PLC0415 - an optional package

    try:
        return safetensors.torch.save(tensors, {_ENTRY: _BLANK.decode() + text})
    except (KeyError, ValueError, safetensors.SafetensorError) as error:
        raise AdapterFileError(
            f"A .safetensors file cannot hold these tensors: {error}. Choose a name ending in .pt."
        ) from error


def _zip_bytes(text: str, tensors: dict[str, Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save({"manifest": text, "tensors": tensors}, buffer)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = _COMMENT + _BLANK
    return buffer.getvalue()


def decode(data: bytes, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the manifest and tensors of a file; verifies every byte and executes no code.

    Args:
        data: The bytes of the file.
        path: The path of the file, for messages.

    Raises:
        AdapterFileError: The bytes are not an adapter file, or were changed after writing.
    """
    try:
        at = _seal_position(data)
    except ValueError as error:
        raise AdapterFileError(
            f"{path}: not an adapter file of resadapt, or a damaged one ({error}). Check the path; "
            "copy or save the file again."
        ) from error
    if data[at : at + _DIGITS] != _seal(data, at):
        raise AdapterFileError(
            f"{path}: the file was changed or damaged after it was written. Copy or save it again."
        )
    try:
        if data[:2] == b"PK":
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                    raise ValueError("compressed content, which resadapt never writes")
                for name in archive.namelist():
                    if name.endswith("data.pkl"):
                        _check_pickle(archive.read(name))
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            text, tensors = content["manifest"], content["tensors"]
        else:
            text = json.loads(data[8 : 8 + _header_size(data)])["__metadata__"][_ENTRY][_DIGITS:]
            tensors = _load_safetensors(data, path)
        manifest = json.loads(text)
        if not isinstance(manifest, dict) or not all(isinstance(name, str) for name in tensors):
            raise TypeError("no manifest, or unnamed tensors")
        if not all(_is_dense(tensor) for tensor in tensors.values()):
            raise TypeError("an entry that is not a dense tensor")
        if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) > len(data):
            raise ValueError("tensors that share memory, which resadapt never writes")
    except AdapterFileError:
        raise
    except Exception as error:  # readers raise anything for sealed but malformed bytes
        raise AdapterFileError(
            f"{path}: sealed, but its content cannot be read: {error}. Save it again."
        ) from error
    return manifest, tensors


def _check_pickle(data: bytes) -> None:
    """Checks that a pickle builds only dictionaries of strings and tensors.

    Even a harmless class can allocate much memory, such as a bytearray of zeros.

    Raises:
        ValueError: The pickle has an opcode or global that resadapt never writes.
    """
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name not in _OPCODES or (
            opcode.name == "GLOBAL" and not _GLOBALS.fullmatch(str(argument))
        ):
            raise ValueError(
                f"{opcode.name} {str(argument)[:100]!r} in its pickle, which resadapt never writes"
            )


def _is_dense(tensor: object) -> bool:
    """Returns whether an object is a dense tensor whose storage holds all elements."""
    return (
        type(tensor) is Tensor
        and not tensor.__dict__  # attributes could shadow methods
        and tensor.layout is torch.strided
        and not (tensor.is_meta or tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


def _seal(data: bytes | bytearray, at: int) -> bytes:
    digest = hashlib.sha256(memoryview(data)[:at])
    digest.update(_BLANK)
    digest.update(memoryview(data)[at + _DIGITS :])
    return digest.hexdigest().encode()


def _seal_position(data: bytes | bytearray) -> int:
    if data[:2] == b"PK":
        at = len(data) - _DIGITS
        # The end record of a zip archive has 22 bytes; the last two are the comment's length.
        end = at - len(_COMMENT) - 22
        length = (len(_COMMENT) + _DIGITS).to_bytes(2, "little")
        if end < 0 or data[end : end + 4] != b"PK\5\6" or data[end + 20 : at] != length + _COMMENT:
            raise ValueError("no seal at the end")
        return at
    return data.index(_OPENING, 8, 8 + _header_size(data)) + len(_OPENING)


def _header_size(data: bytes | bytearray) -> int:
    size = int.from_bytes(data[:8], "little")
    if not 2 <= size <= len(data) - 8:
        raise ValueError("neither a safetensors nor a zip file")
    return size


def _load_safetensors(data: bytes, path: Path) -> dict[str, Tensor]:
    if find_spec("safetensors") is None:
        raise AdapterFileError(f"{path}: to read it, install resadapt[safetensors].")
    import safetensors  # noqa: PLC0415 - an optional package
    import safetensors.torch  # noqa: PLC0415

    try:
        return dict(safetensors.torch.load(data))
    except safetensors.SafetensorError as error:
        raise ValueError(str(error)) from error
