"""What an adapter file says, and its writing and reading: all of it or nothing."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor

from resadapt.base.errors import AdapterFileError, listing
from resadapt.base.fingerprint import TensorRecord, differences, explained, fingerprint
from resadapt.base.spec import SetSpec
from resadapt.base.version import __version__
from resadapt.files.container import decode, encode, format_for

__all__ = [
    "FORMAT_VERSION",
    "AdapterInfo",
    "ProbeRecord",
    "read_adapter_file",
    "read_adapter_info",
    "staged",
    "target_of",
]

FORMAT_VERSION = 1


@dataclass(frozen=True)
class ProbeRecord:
    """The input on which outputs were recorded, and how.

    Args:
        source: ``"generated"`` from the form, or ``"given"`` by the user.
        form: Shapes and dtypes of a generated input, None for a given one.
        sha256: Digest of the input.
        outputs: For each output tensor its shape, and the step between the recorded elements.
    """

    source: str
    form: Any
    sha256: str
    outputs: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter file says about itself.

    Args:
        path: The file.
        size: Its size in bytes.
        format_version: Version of the file format.
        versions: Versions of resadapt, torch and torchvision that wrote it.
        set: Description of the adapter set.
        backbone: Fingerprint of the backbone without the head, tensor by tensor.
        tensors: The file's own tensors.
        example: Form of the example input at injection, None if there was none.
        probe: What is known of the probe, None if there was none.
        metadata: The user's own entries.
    """

    path: Path
    size: int
    format_version: int
    versions: dict[str, str]
    set: SetSpec
    backbone: dict[str, TensorRecord]
    tensors: dict[str, TensorRecord]
    example: Any
    probe: ProbeRecord | None
    metadata: dict[str, Any]


def read_adapter_info(path: str | os.PathLike[str]) -> AdapterInfo:
    """Reads what an adapter file says, without a model and without executing anything in it.

    Args:
        path: The file.

    Returns:
        Its description.

    Raises:
        AdapterFileError: The file is missing, damaged, of another kind, or of a newer format.

    Example:
        >>> import os, tempfile
        >>> from torchvision.models import resnet18
        >>> from resadapt import inject_adapters, save_adapters
        >>> path = os.path.join(tempfile.mkdtemp(), "adapters.pt")
        >>> report = save_adapters(inject_adapters(resnet18(), "layer4", 8), path, metadata={"f1": 0.5})
        >>> info = read_adapter_info(path)
        >>> info.set.sites[0].name, info.metadata
        ('layer4', {'f1': 0.5})
    """
    return read_adapter_file(path)[0]


def read_adapter_file(path: str | os.PathLike[str]) -> tuple[AdapterInfo, dict[str, Tensor]]:
    """Reads a file and holds every tensor against its digest.

    Raises:
        AdapterFileError: As `read_adapter_info`.
    """
    try:
        path = Path(path)
        data = path.read_bytes()
    except (OSError, TypeError, ValueError) as error:
        raise AdapterFileError(f"{path!r}: cannot be read: {error}. Check the path.") from error
    manifest, tensors = decode(data, path)
    number = manifest.get("format_version")
    if type(number) is not int or not 1 <= number <= FORMAT_VERSION:
        raise AdapterFileError(
            f"{path}: written in format {number!r} by resadapt {manifest.get('versions', {})}; this version reads format "
            f"{FORMAT_VERSION}. Install a newer resadapt."
        )
    try:
        info = AdapterInfo(
            path=path,
            size=len(data),
            format_version=number,
            versions=dict(manifest["versions"]),
            set=SetSpec.from_json(manifest["set"]),
            backbone=_records(manifest["backbone"]),
            tensors=_records(manifest["tensors"]),
            example=manifest["example"],
            probe=_probe(manifest["probe"]),
            metadata=dict(manifest["metadata"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterFileError(f"{path}: its manifest is not one of format {number}: {error!r}. Save it again.") from error
    if strange := [name for name in tensors if not name.startswith(("adapters.", "head.", "probe."))]:
        raise AdapterFileError(f"{path}: it has tensors of no known kind: {listing(strange)}. Save it again.")
    if info.probe and (lost := [place for place in info.probe.outputs if f"probe.{place}" not in tensors]):
        raise AdapterFileError(f"{path}: the recorded outputs {listing(lost)} are missing. Save it again.")
    if wrong := differences(tensors, info.tensors):
        raise AdapterFileError(f"{path}: its tensors are not those of its manifest: {explained(wrong)}. Save it again.")
    return info, tensors


def target_of(path: str | os.PathLike[str]) -> Path:
    """Returns where a file is to be written, links followed, after looking whether that can be done.

    Raises:
        AdapterFileError: It cannot.
    """
    try:
        target = Path(os.path.realpath(os.fsdecode(path)))
        exists = target.exists()
    except (OSError, TypeError, ValueError) as error:
        raise AdapterFileError(f"{path!r}: is no path of a file: {error}.") from error
    format_for(target)
    if exists and not target.is_file():
        kind = "a directory" if target.is_dir() else "no ordinary file"
        raise AdapterFileError(f"{target}: is {kind}. Give the path of a file.")
    if not target.parent.is_dir():
        raise AdapterFileError(f"{target}: the directory {target.parent} does not exist. Create it first.")
    return target


@contextmanager
def staged(
    target: Path,
    set_spec: SetSpec,
    backbone: Mapping[str, TensorRecord],
    tensors: Mapping[str, Tensor],
    *,
    example: Any,
    probe: ProbeRecord | None,
    metadata: Mapping[str, Any] | None,
) -> Iterator[Path]:
    """Writes a file beside the target for the body to examine; it takes the target's place when the body ends without error.

    The file reaches the disk before the body runs. Whatever fails, the target is what it was and nothing else is left.

    Yields:
        The path of the file beside the target.

    Raises:
        AdapterFileError: The metadata is not JSON, or the disk refuses.
    """
    manifest = {
        "format_version": FORMAT_VERSION,
        "versions": {"resadapt": __version__, "torch": torch.__version__, "torchvision": torchvision.__version__},
        "set": set_spec.to_json(),
        "backbone": {name: _plain(record) for name, record in backbone.items()},
        "tensors": {name: _plain(record) for name, record in fingerprint(tensors.items()).items()},
        "example": example,
        "probe": asdict(probe) if probe is not None else None,
        "metadata": _as_json(metadata or {}, target),
    }
    data = encode(manifest, dict(tensors), format_for(target))
    beside = target.with_name(f".resadapt-{secrets.token_hex(8)}.tmp")  # short, whatever the target's name
    try:
        try:
            with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
                if target.exists():
                    os.chmod(beside, target.stat().st_mode & 0o7777)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise AdapterFileError(
                f"{target}: cannot be written: {error.strerror}. The previous file, if any, is intact."
            ) from error
        yield beside
        try:
            os.replace(beside, target)
        except OSError as error:
            raise AdapterFileError(f"{target}: cannot be replaced: {error.strerror}. The previous file is intact.") from error
    finally:
        beside.unlink(missing_ok=True)
    if os.name == "posix":  # the renaming itself reaches the disk with the directory
        with suppress(OSError):  # a directory that may be written but not read
            directory = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)


def _as_json(metadata: Mapping[str, Any], target: Path) -> dict[str, Any]:
    try:
        text = json.dumps(dict(metadata), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise AdapterFileError(
            f"{target}: metadata is not JSON: {error}. Use dict, list, str, int, finite float, bool, None."
        ) from error
    back: dict[str, Any] = json.loads(text)
    if back != metadata:
        raise AdapterFileError(f"{target}: metadata would come back as {back}. Use str keys, and lists in place of tuples.")
    return back


def _plain(record: TensorRecord) -> list[Any]:
    return [record.dtype, list(record.shape), record.sha256]


def _probe(data: Any) -> ProbeRecord | None:
    if data is None:
        return None
    record = ProbeRecord(**data)
    if not isinstance(record.outputs, dict):
        raise ValueError("no records of outputs")
    for output in record.outputs.values():
        if set(output) != {"shape", "step"} or type(output["step"]) is not int or output["step"] < 1:
            raise ValueError(f"no record of an output: {output!r}")
    return record


def _records(data: Any) -> dict[str, TensorRecord]:
    records = {}
    for name, (dtype, shape, sha256) in dict(data).items():
        if not isinstance(getattr(torch, dtype, None), torch.dtype) or not all(type(size) is int for size in shape):
            raise ValueError(f"no record of a tensor: {name!r}")
        records[name] = TensorRecord(dtype, tuple(shape), str(sha256))
    return records
