"""What an adapter file says: its manifest made, and read back with nothing in it trusted."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor

from resadapt.base.errors import AdapterFileError, quote_names, quote_reasons
from resadapt.base.fingerprint import (
    Fingerprint,
    TensorRecord,
    record_tensors,
    tensor_differences,
    tensor_records,
)
from resadapt.base.spec import SetSpec
from resadapt.base.version import __version__
from resadapt.files.container import decode, encode, format_for

__all__ = [
    "FORMAT_VERSION",
    "AdapterInfo",
    "ProbeRecord",
    "as_json",
    "encode_adapter_file",
    "read_adapter_file",
    "read_adapter_info",
]

FORMAT_VERSION = 3


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
        backbone: Fingerprint of the backbone without the head.
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
    backbone: Fingerprint
    tensors: dict[str, TensorRecord]
    example: Any
    probe: ProbeRecord | None
    metadata: dict[str, Any]


def read_adapter_info(path: str | bytes | os.PathLike[str]) -> AdapterInfo:
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


def read_adapter_file(
    path: str | bytes | os.PathLike[str],
) -> tuple[AdapterInfo, dict[str, Tensor]]:
    """Reads a file and compares every tensor with its digest.

    Raises:
        AdapterFileError: As `read_adapter_info`.
    """
    try:
        path = Path(os.fsdecode(path))
        if path.exists() and not path.is_file():
            raise OSError("it is no ordinary file")
        data = path.read_bytes()
    except (OSError, TypeError, ValueError, MemoryError) as error:
        raise AdapterFileError(
            f"{path!r}: cannot be read: {error or 'it is too large'}. Check the path."
        ) from error
    manifest, tensors = decode(data, path)
    number = manifest.get("format_version")
    if type(number) is not int or not 1 <= number <= FORMAT_VERSION:
        raise AdapterFileError(
            f"{path}: written in format {number!r} by resadapt {manifest.get('versions', {})}; "
            f"this version reads formats up to {FORMAT_VERSION}. Install a newer resadapt."
        )
    try:
        if number == 1:
            manifest = _from_format_1(manifest)
        if number < 3:
            manifest = {**manifest, "set": {**manifest["set"], "norms": [], "blueprints": {}}}
        info = AdapterInfo(
            path=path,
            size=len(data),
            format_version=number,
            versions=dict(manifest["versions"]),
            set=SetSpec.from_json(manifest["set"]),
            backbone=Fingerprint.from_json(manifest["backbone"]),
            tensors=tensor_records(manifest["tensors"]),
            example=manifest["example"],
            probe=_probe(manifest["probe"]),
            metadata=dict(manifest["metadata"]),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise AdapterFileError(
            f"{path}: its manifest is not one of format {number}: {error!r}. Save it again."
        ) from error
    if strange := [
        name for name in tensors if not name.startswith(("adapters.", "head.", "norms.", "probe."))
    ]:
        raise AdapterFileError(
            f"{path}: it has tensors of no known kind: {quote_names(strange)}. Save it again."
        )
    if info.probe and (
        lost := [place for place in info.probe.outputs if f"probe.{place}" not in tensors]
    ):
        raise AdapterFileError(
            f"{path}: the recorded outputs {quote_names(lost)} are missing. Save it again."
        )
    if wrong := tensor_differences(tensors, info.tensors):
        raise AdapterFileError(
            f"{path}: its tensors are not those of its manifest: {quote_reasons(wrong)}. Save it "
            "again."
        )
    return info, tensors


def encode_adapter_file(
    target: Path,
    set_spec: SetSpec,
    backbone: Fingerprint,
    tensors: Mapping[str, Tensor],
    *,
    example: Any,
    probe: ProbeRecord | None,
    metadata: Mapping[str, Any],
) -> bytes:
    """Returns the bytes of an adapter file for a target, whose name chooses the container.

    Raises:
        AdapterFileError: The container's package is not installed, or the container cannot hold a
            tensor.
    """
    manifest = {
        "format_version": FORMAT_VERSION,
        "versions": {
            "resadapt": __version__,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        },
        "set": set_spec.to_json(),
        "backbone": backbone.to_json(),
        "tensors": {name: record.to_json() for name, record in record_tensors(tensors).items()},
        "example": example,
        "probe": asdict(probe) if probe is not None else None,
        "metadata": dict(metadata),
    }
    return encode(manifest, dict(tensors), format_for(target))


def as_json(metadata: object, target: Path) -> dict[str, Any]:
    """Returns a user's entries as a file will give them back.

    Raises:
        AdapterFileError: They are no JSON object.
    """
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping):
        raise AdapterFileError(
            f"{target}: metadata is {type(metadata).__name__}: give a dict with str keys."
        )
    try:
        text = json.dumps(dict(metadata), allow_nan=False)
        back: dict[str, Any] = json.loads(text)
        same = bool(back == metadata)
    except (TypeError, ValueError, RecursionError) as error:
        raise AdapterFileError(
            f"{target}: metadata is not JSON: {error}. Use dict, list, str, int, finite float, "
            "bool, None."
        ) from error
    if not same:
        raise AdapterFileError(
            f"{target}: metadata would come back as {back}. Use str keys, and lists in place of "
            "tuples."
        )
    return back


def _probe(data: Any) -> ProbeRecord | None:
    if data is None:
        return None
    record = ProbeRecord(**data)
    if not isinstance(record.outputs, dict) or not isinstance(record.sha256, str):
        raise ValueError("no record of a probe")
    for output in record.outputs.values():
        if (
            set(output) != {"shape", "step"}
            or type(output["step"]) is not int
            or output["step"] < 1
        ):
            raise ValueError(f"no record of an output: {output!r}")
    return record


def _from_format_1(manifest: dict[str, Any]) -> dict[str, Any]:
    """Returns the manifest of a file of format 1 as one of format 2."""
    spec = manifest["set"]
    sites = [{**site, "channel_dim": 1} for site in spec["sites"]]
    options = {key: value for key, value in spec["options"].items() if key != "init"}
    backbone = {"tensors": manifest["backbone"], "modules": None, "caches": []}
    return {**manifest, "set": {**spec, "sites": sites, "options": options}, "backbone": backbone}
