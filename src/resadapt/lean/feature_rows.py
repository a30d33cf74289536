"""Arrays of features and labels with a row for each sample, in memory or memory-mapped.

A manifest beside the mapped files describes the backbone, the data and the arrays.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resadapt.base.errors import AdapterError, AdapterFileError, BackboneMismatchError
from resadapt.base.tensors import dtype_name, row_digests
from resadapt.lean.prefix import Plan
from resadapt.lean.samples import Progress, Samples

__all__ = ["FeatureRows"]

_FORMAT = 1
_DIGEST = 32


class FeatureRows:
    """Features and labels as arrays with a row for each sample, in memory or memory-mapped.

    A row is valid if its stored digest matches its content, so rows that a killed process or a
    failing disk left incomplete are computed again.
    """

    def __init__(
        self, plan: Plan, samples: Samples, backbone: Any, path: object, progress: Progress
    ) -> None:
        self.total = samples.length * samples.variants
        self._path = None if path is None else _directory(path)
        self._needed = plan.needed
        self._forms = [plan.forms[number] for number in plan.needed]
        rest = samples.some[1]
        self._shapes = [(form.dtype, form.kept_shape) for form in self._forms]
        self._shapes += [(tensor.dtype, tuple(tensor.shape[1:])) for tensor in rest]
        description = json.dumps(backbone, sort_keys=True).encode()
        manifest = {
            "resadapt_prefix": _FORMAT,
            "backbone": hashlib.sha256(description).hexdigest(),
            "length": samples.length,
            "variants": samples.variants,
            "random": samples.is_random,
            "autocast": plan.autocast,
            "calls": [place for place, _ in plan.calls],
            "kept": [form.name for form in self._forms],
            "arrays": [
                [dtype_name(torch.empty(0, dtype=dtype)), list(shape)]
                for dtype, shape in self._shapes
            ],
        }
        if self._path is not None:
            _check_manifest(self._path, manifest)
        self._open()
        self.filled = 0
        """Number of valid rows before the first invalid row."""
        if self._path is not None:
            self.filled = self._count_valid_rows()
            self._check_data(samples, progress)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out mapped arrays, which a DataLoader worker maps again."""
        return self.__dict__ | ({} if self._path is None else {"_arrays": [], "_digests": None})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Maps the files again."""
        self.__dict__ = state
        if self._path is not None:
            self._open()

    def _open(self) -> None:
        self._arrays = [
            self._array(f"{number}.bin", *array) for number, array in enumerate(self._shapes)
        ]
        if self._path is not None:
            self._digests = self._array("digests.bin", torch.uint8, (2 * _DIGEST,))

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self._arrays)

    def write(self, where: slice, values: list[Tensor], digests: Callable[[], Tensor]) -> None:
        """Writes rows; the batch may have more rows than the slice."""
        count = where.stop - where.start
        kept = len(self._forms)
        features = [
            form.kept(value) for form, value in zip(self._forms, values[:kept], strict=True)
        ]
        new_values = [*features, *values[kept:]]
        forms = [(value.dtype, tuple(value.shape[1:])) for value in new_values]
        if forms != self._shapes:
            number, (found, known) = next(
                (n, pair)
                for n, pair in enumerate(zip(forms, self._shapes, strict=True))
                if len({*pair}) > 1
            )
            what = (
                self._forms[number].name
                if number < kept
                else f"part {number - kept + 1} of a sample"
            )
            raise AdapterError(
                f"The {what} is {found[0]} {list(found[1])} in samples {where.start} to "
                f"{where.stop - 1}, but {known[0]} {list(known[1])} before. All samples must "
                "have the same shapes and dtypes."
            )
        for array, value in zip(self._arrays, new_values, strict=True):
            array[where] = value[:count].cpu()
        if self._path is not None:
            self._digests[where, _DIGEST:] = digests()[:count]
            self._digests[where, :_DIGEST] = self._row_digests(where)

    def read(self, row: int) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the features of a row, and the sample's other values."""
        values = [array[row].clone() for array in self._arrays]
        kept = len(self._forms)
        return [
            form.row(value) for form, value in zip(self._forms, values[:kept], strict=True)
        ], values[kept:]

    def features(self, rows: list[int], device: torch.device) -> dict[int, Tensor]:
        """Returns the features of some rows as batches, by their numbers in the plan."""
        batches = zip(*(self.read(row)[0] for row in rows), strict=True)
        return {
            number: torch.stack(each).to(device)
            for number, each in zip(self._needed, batches, strict=True)
        }

    def _array(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        sizes = (self.total, *shape)
        if self._path is None:
            try:
                return torch.zeros(sizes, dtype=dtype)
            except (RuntimeError, MemoryError) as error:
                raise AdapterError(
                    f"Not enough memory for features of shape {list(sizes)}: give a path to keep "
                    "them in files."
                ) from error
        size = torch.Size(sizes).numel()
        file = self._path / name
        try:
            with file.open("ab") as stream:
                missing = size * dtype.itemsize - stream.tell()
                # Reserve the space now: writing to a mapped file on a full disk crashes.
                if missing and hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(stream.fileno(), 0, size * dtype.itemsize)
        except OSError as error:
            raise AdapterFileError(f"{file}: cannot be written: {error.strerror}.") from error
        return torch.from_file(str(file), shared=True, size=size, dtype=dtype).reshape(sizes)

    def _count_valid_rows(self) -> int:
        """Returns the number of valid rows before the first invalid row."""
        for start in range(0, self.total, 1024):
            where = slice(start, start + 1024)
            valid = (self._digests[where, :_DIGEST] == self._row_digests(where)).all(1)
            if not valid.all():
                return start + int(valid.long().argmin())
        return self.total

    def _row_digests(self, where: slice) -> Tensor:
        """Returns the digest of each row: of its arrays and of its sample's digest."""
        content = [*(array[where] for array in self._arrays), self._digests[where, _DIGEST:]]
        return row_digests(content, len(content[-1]))

    def _check_data(self, samples: Samples, progress: Progress) -> None:
        """Refuses a directory with the features of other data.

        Compares every sample; of random data only the values besides the input.
        """
        end = min(self.filled, samples.length)
        for where, batch in samples.batches(0, progress, end):
            known = self._digests[where, _DIGEST:]
            same = (samples.digests(batch)[: len(known)] == known).all(1)
            if not same.all():
                raise AdapterFileError(
                    f"{self._path}: sample {where.start + int(same.long().argmin())} of the data "
                    "differs from the sample that the features were computed from. Give the same "
                    "data in the same order, or another directory."
                )


def _directory(path: object) -> Path:
    try:
        directory = Path(os.fsdecode(path))  # type: ignore[arg-type]
        directory.exists()
    except (OSError, TypeError, ValueError) as error:
        raise AdapterFileError(f"{path!r}: is not a path of a directory: {error}.") from error
    return directory


def _check_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Creates a directory for features, or checks that its manifest is the same.

    Raises:
        AdapterFileError, BackboneMismatchError: The manifest differs or is missing.
    """
    file = path / "features.json"
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            temporary = path / "features.json.new"
            if any(each != temporary for each in path.iterdir()):  # a killed run may have left it
                raise AdapterFileError(
                    f"{path}: contains other files. Give an empty or a new directory."
                )
            temporary.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
            temporary.replace(file)
        known = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterFileError(f"{path}: cannot be written: {error.strerror}.") from error
    except ValueError as error:
        raise AdapterFileError(f"{file}: is not a manifest of features: {error}.") from error
    if not isinstance(known, dict) or known.get("resadapt_prefix") != _FORMAT:
        raise AdapterFileError(
            f"{file}: is not a manifest of this version. Give another directory."
        )
    if known.get("backbone") != manifest["backbone"]:
        raise BackboneMismatchError(
            f"{path}: the features were computed with another backbone. Give another directory."
        )
    if other := [name for name in manifest if known.get(name) != manifest[name]]:
        raise AdapterFileError(
            f"{path}: contains other features: {other[0]} is {known.get(other[0])!r:.200}, but "
            f"would be {manifest[other[0]]!r:.200}. Give another directory."
        )
