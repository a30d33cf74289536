"""Features and labels as arrays with a row for each sample, in memory or mapped from files that tell what they are of."""

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
    """The features, and what else a sample has: arrays with a row for each sample, in memory or
    mapped from files.

    A row counts when its digest is there and is that of its content, so what a killed process or a
    failing disk has left is computed again.
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
        told = json.dumps(backbone, sort_keys=True).encode()
        manifest = {
            "resadapt_prefix": _FORMAT,
            "backbone": hashlib.sha256(told).hexdigest(),
            "length": samples.length,
            "variants": samples.variants,
            "random": samples.is_random,
            "calls": [place for place, _ in plan.calls],
            "kept": [form.name for form in self._forms],
            "arrays": [
                [dtype_name(torch.empty(0, dtype=dtype)), list(shape)]
                for dtype, shape in self._shapes
            ],
        }
        if self._path is not None:
            _agree(self._path, manifest)
        self._open()
        self.filled = 0
        """How many rows, from the first on, have what was written into them."""
        if self._path is not None:
            self.filled = self._good_rows()
            self._compare(samples, progress)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what is in files: a worker of a DataLoader maps them itself."""
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
        """Writes rows, of which a batch may have more."""
        count = where.stop - where.start
        kept = len(self._forms)
        features = [
            form.kept(value) for form, value in zip(self._forms, values[:kept], strict=True)
        ]
        arrived = [*features, *values[kept:]]
        forms = [(value.dtype, tuple(value.shape[1:])) for value in arrived]
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
                f"{where.stop - 1}, where it was {known[0]} {list(known[1])}. Have every sample "
                "give tensors of one size, and numbers of one type."
            )
        for array, value in zip(self._arrays, arrived, strict=True):
            array[where] = value[:count].cpu()
        if self._path is not None:
            self._digests[where, _DIGEST:] = digests()[:count]
            self._digests[where, :_DIGEST] = self._told_of(where)

    def read(self, row: int) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the features of a row, and the rest."""
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
                    f"There is no memory for features of sizes {list(sizes)}: give a path for "
                    "files."
                ) from error
        size = torch.Size(sizes).numel()
        file = self._path / name
        try:
            with file.open("ab") as stream:
                missing = size * dtype.itemsize - stream.tell()
                if missing and hasattr(
                    os, "posix_fallocate"
                ):  # a full disk is an error here, and a crash once it is mapped
                    os.posix_fallocate(stream.fileno(), 0, size * dtype.itemsize)
        except OSError as error:
            raise AdapterFileError(f"{file}: cannot be written: {error.strerror}.") from error
        return torch.from_file(str(file), shared=True, size=size, dtype=dtype).reshape(sizes)

    def _good_rows(self) -> int:
        """Returns how many rows, from the first on, have the content that their digests are of."""
        for start in range(0, self.total, 1024):
            where = slice(start, start + 1024)
            good = (self._digests[where, :_DIGEST] == self._told_of(where)).all(1)
            if not good.all():
                return start + int(good.long().argmin())
        return self.total

    def _told_of(self, where: slice) -> Tensor:
        """Returns the digest of each row's content, and of what is known of its sample."""
        content = [*(array[where] for array in self._arrays), self._digests[where, _DIGEST:]]
        return row_digests(content, len(content[-1]))

    def _compare(self, samples: Samples, progress: Progress) -> None:
        """Refuses a directory with the features of other data.

        Every sample is looked at, of what is random only the rest.
        """
        end = min(self.filled, samples.length)
        for where, batch in samples.batches(0, progress, end):
            known = self._digests[where, _DIGEST:]
            same = (samples.digests(batch)[: len(known)] == known).all(1)
            if not same.all():
                raise AdapterFileError(
                    f"{self._path}: sample {where.start + int(same.long().argmin())} of the data "
                    "is not the one whose features are there. Give the same data in the same "
                    "order, or another directory."
                )


def _directory(path: object) -> Path:
    try:
        directory = Path(os.fsdecode(path))  # type: ignore[arg-type]
        directory.exists()
    except (OSError, TypeError, ValueError) as error:
        raise AdapterFileError(f"{path!r}: is no path of a directory: {error}.") from error
    return directory


def _agree(path: Path, manifest: dict[str, Any]) -> None:
    """Makes a directory for features, or looks whether it is for the same ones.

    Raises:
        AdapterFileError, BackboneMismatchError: It is not.
    """
    file = path / "features.json"
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            if any(
                each.name != "features.json.new" for each in path.iterdir()
            ):  # which a killed run may have left
                raise AdapterFileError(
                    f"{path}: is a directory with other things in it. Give an empty or a new one."
                )
            temporary = path / "features.json.new"
            temporary.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
            temporary.replace(file)
        known = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterFileError(f"{path}: cannot be written: {error.strerror}.") from error
    except ValueError as error:
        raise AdapterFileError(f"{file}: is no description of features: {error}.") from error
    if not isinstance(known, dict) or known.get("resadapt_prefix") != _FORMAT:
        raise AdapterFileError(
            f"{file}: is no description of features of this version. Give another directory."
        )
    if known.get("backbone") != manifest["backbone"]:
        raise BackboneMismatchError(
            f"{path}: the features there are of another backbone. Give another directory."
        )
    if other := [name for name in manifest if known.get(name) != manifest[name]]:
        raise AdapterFileError(
            f"{path}: other features are there: {other[0]} is {known.get(other[0])!r:.200} and "
            f"would be {manifest[other[0]]!r:.200}. Give another directory."
        )
