"""The manifest of an adapter file: written, and read back without trusting the content."""

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

from resadapt.base.autocast import AUTOCAST_DTYPES
from resadapt.base.errors import AdapterFileError, quote_names, quote_reasons
from resadapt.base.fingerprint import (
    Fingerprint,
    TensorRecord,
    record_tensors,
    tensor_differences,
    tensor_records,
)
from resadapt.base.html_table import html_table
from resadapt.base.spec import SetSpec
from resadapt.base.version import __version__
from resadapt.files.container import decode, encode, format_for
from resadapt.files.location import file_to_read

__all__ = [
    "FORMAT_VERSION",
    "VERSIONS",
    "AdapterInfo",
    "ProbeRecord",
    "as_json",
    "encode_adapter_file",
    "read_adapter_file",
    "read_adapter_info",
]

FORMAT_VERSION = 4
"""The newest version, and the only one that can say that outputs were recorded under autocast."""
OLDEST_VERSION = 3
"""The version of all other files, so that resadapt 0.2 reads them."""

VERSIONS = {
    "resadapt": __version__,
    "torch": str(torch.__version__),
    "torchvision": str(torchvision.__version__),
}
"""The versions that files written by this process record."""


@dataclass(frozen=True)
class ProbeRecord:
    """The probe: the input on which outputs were recorded, and the form of the outputs.

    Args:
        source: ``"generated"`` from the form, or ``"given"`` by the user.
        form: Shapes and dtypes of a generated input, None for a given input.
        sha256: Digest of the input.
        outputs: The shape of each output tensor, and the step between the recorded elements.
        autocast: Name of the dtype of the autocast that the outputs were recorded under, None
            without autocast.
    """

    source: str
    form: Any
    sha256: str
    outputs: dict[str, dict[str, Any]]
    autocast: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns the record as JSON values; only version 4 has the entry about autocast."""
        fields = asdict(self)
        if self.autocast is None:
            del fields["autocast"]
        return fields


@dataclass(frozen=True)
class AdapterInfo:
    """The content of an adapter file, without the values of the tensors; a notebook shows a table.

    Args:
        path: Path of the file.
        size: Size in bytes.
        format_version: Version of the file format.
        versions: Versions of resadapt, torch and torchvision that wrote the file.
        set: Description of the adapter set.
        backbone: Fingerprint of the backbone without the head.
        tensors: Records of the tensors in the file.
        example: Form of the example input at injection, None if there was none.
        probe: Record of the probe, None if there was none.
        metadata: The user's metadata.
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

    def _repr_html_(self) -> str:
        """Returns a table of what a reader asks for first, and the metadata."""
        private = f", {len(self.set.norms)} private" if self.set.norms else ""
        rows = {
            "size": f"{self.size:,} bytes, format {self.format_version}",
            "written by": ", ".join(f"{name} {value}" for name, value in self.versions.items()),
            "set": f"{self.set.name!r}, family {self.set.family!r}",
            "sites": ", ".join(site.name for site in self.set.sites),
            "head": ", ".join(self.set.head),
            "norms": self.set.norm + private,
            "tensors": f"{len(self.tensors)}",
            **{f"metadata[{key!r}]": str(value) for key, value in self.metadata.items()},
        }
        return html_table(("entry", "value"), rows.items(), title=str(self.path))


def read_adapter_info(path: str | bytes | os.PathLike[str]) -> AdapterInfo:
    """Reads the description of an adapter file, without a model and without executing code.

    Args:
        path: The file, as for `load_adapters`.

    Returns:
        The description.

    Raises:
        AdapterFileError: The file is missing, damaged, of another kind, or of another format.

    Example:
        >>> import os, tempfile
        >>> from torchvision.models import resnet18
        >>> from resadapt import inject_adapters, save_adapters
        >>> path = os.path.join(tempfile.mkdtemp(), "adapters.pt")
        >>> model = inject_adapters(resnet18(), "layer4", 8)
        >>> report = save_adapters(model, path, metadata={"f1": 0.5})
        >>> info = read_adapter_info(path)
        >>> info.set.sites[0].name, info.metadata
        ('layer4', {'f1': 0.5})
    """
    return read_adapter_file(path)[0]


def read_adapter_file(
    path: str | bytes | os.PathLike[str],
) -> tuple[AdapterInfo, dict[str, Tensor]]:
    """Reads a file and compares every tensor with the recorded digest.

    Raises:
        AdapterFileError: As `read_adapter_info`.
    """
    try:
        path = file_to_read(path)
        if path.exists() and not path.is_file():
            raise OSError("not a regular file")
        data = path.read_bytes()
    except (OSError, TypeError, ValueError, MemoryError) as error:
        raise AdapterFileError(
            f"{str(path)!r}: cannot be read: {error or 'too large'}. Check the path."
        ) from error
    manifest, tensors = decode(data, path)
    number = manifest.get("format_version")
    if type(number) is int and number < OLDEST_VERSION:
        raise AdapterFileError(
            f"{path}: written in format {number}. Formats before {OLDEST_VERSION} were never "
            "released and are not read: save the file again with this version."
        )
    if type(number) is not int or number > FORMAT_VERSION:
        raise AdapterFileError(
            f"{path}: written in format {number!r} by resadapt {manifest.get('versions', {})}; "
            f"this version reads formats {OLDEST_VERSION} to {FORMAT_VERSION}. Install a newer "
            "resadapt."
        )
    try:
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
            f"{path}: the manifest is not valid for format {number}: {error!r}. Save it again."
        ) from error
    if strange := [
        name for name in tensors if not name.startswith(("adapters.", "head.", "norms.", "probe."))
    ]:
        raise AdapterFileError(
            f"{path}: it has tensors of an unknown kind: {quote_names(strange)}. Save it again."
        )
    if info.probe and (
        lost := [place for place in info.probe.outputs if f"probe.{place}" not in tensors]
    ):
        raise AdapterFileError(
            f"{path}: the recorded outputs {quote_names(lost)} are missing. Save it again."
        )
    if wrong := tensor_differences(tensors, info.tensors):
        raise AdapterFileError(
            f"{path}: the tensors differ from the manifest: {quote_reasons(wrong)}. Save it again."
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
    """Returns the bytes of an adapter file; the target's suffix selects the container.

    Raises:
        AdapterFileError: The container's package is not installed, or the container cannot hold a
            tensor.
    """
    manifest = {
        "format_version": FORMAT_VERSION if probe and probe.autocast else OLDEST_VERSION,
        "versions": VERSIONS,
        "set": set_spec.to_json(),
        "backbone": backbone.to_json(),
        "tensors": {name: record.to_json() for name, record in record_tensors(tensors).items()},
        "example": example,
        "probe": None if probe is None else probe.to_json(),
        "metadata": dict(metadata),
    }
    return encode(manifest, dict(tensors), format_for(target))


def as_json(metadata: object, target: Path) -> dict[str, Any]:
    """Returns a user's metadata after a JSON round trip, which must not change them.

    Raises:
        AdapterFileError: The metadata are not a JSON object, or the round trip changes them.
    """
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping):
        raise AdapterFileError(
            f"{target}: metadata is {type(metadata).__name__}: pass a dict with str keys."
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
            f"{target}: JSON would change metadata to {back}. Use str keys, and lists instead of "
            "tuples."
        )
    return back


def _probe(data: Any) -> ProbeRecord | None:
    if data is None:
        return None
    record = ProbeRecord(**data)
    if (
        not isinstance(record.outputs, dict)
        or not isinstance(record.sha256, str)
        or record.autocast not in (None, *AUTOCAST_DTYPES)
    ):
        raise ValueError("not a probe record")
    for output in record.outputs.values():
        if (
            set(output) != {"shape", "step"}
            or type(output["step"]) is not int
            or output["step"] < 1
        ):
            raise ValueError(f"not an output record: {output!r}")
    return record
