"""Features of a data set from before the first adapter, computed once and trained on for all epochs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset
from typing_extensions import override

from resadapt.base.errors import AdapterError, AdapterFileError, BackboneMismatchError, InjectionError
from resadapt.base.fingerprint import Fingerprint
from resadapt.base.names import listing, reasons_listing
from resadapt.base.nested import map_tensors, named_in
from resadapt.base.tensors import address, dtype_name, raw_bytes
from resadapt.base.undisturbed import random_state, random_states_kept
from resadapt.injection.ledger import backbone_differences, ledger_of, plain_tensors
from resadapt.injection.switching import check_switchable
from resadapt.injection.walk import unwrap
from resadapt.lean.prefix import NeededError, Plan, continued, plan_for, values_for

__all__ = ["PrefixCache", "cache_prefix"]

_FORMAT = 1
_DIGEST = 32
_MOST = 1_000_000
_LOOKED_AT = 16
"""So many samples of the data are compared with a file that is opened."""


def cache_prefix(
    model: nn.Module,
    data: Dataset[Any] | DataLoader[Any],
    path: str | os.PathLike[str] | None = None,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    variants: int = 1,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> PrefixCache:
    """Computes once what comes before the active set's first adapter, norm or head, for every sample of a data set.

    What is returned is a data set again, of features in place of inputs, and runs the model from them: the later the first
    adapter, the less is left to compute in each epoch. What the model needs besides the last features (a skip connection) is found
    by trying, and kept too. Outputs, losses and gradients are those of the whole model; to the last bit on the CPU if the batches
    that are trained on are full ones of the same `batch_size` (kernels may round differently for another).

    Args:
        model: An injected model, in the dtype, on the device and under the autocast that it is to be trained with.
        data: A data set with a length, whose samples are an input or a tuple of an input and what else there is (a label), in
            tensors and numbers; or a loader, whose data set, batch size, workers and collate function are taken, not its order.
        path: A directory for the features, mapped into memory. If it has some, they are used; those missing are computed. None
            keeps them in memory.
        batch_size: Samples that are computed at once.
        num_workers: Processes that load the data.
        variants: Draws of each sample, where the data are random (augmentation): the features of all are kept, as so many times
            more samples. 1 refuses random data.
        progress: Called with the batches, to show how far it is, such as ``tqdm.tqdm``.

    Returns:
        The features.

    Raises:
        InjectionError: Nothing was injected or is active; nothing comes before the set; or the model cannot be run from features.
        BackboneMismatchError: The features in `path` are of another backbone.
        AdapterFileError: What is in `path` is of other data, another set or not ours, or the disk is full.
        AdapterError: The data have no length, are random, or cannot be kept.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from resadapt import inject_adapters
        >>> images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 3
        >>> model = inject_adapters(resnet18(num_classes=3), "layer4", head="fc")
        >>> cache = cache_prefix(model, torch.utils.data.TensorDataset(images, labels))
        >>> for features, label in DataLoader(cache, batch_size=4, shuffle=True):
        ...     loss = nn.functional.cross_entropy(cache.forward(features), label)
        ...     loss.backward()
        >>> len(cache), tuple(features.shape)
        (8, (4, 512, 1, 1))
    """
    if not callable(progress):
        raise AdapterError(
            f"progress={progress!r}: give a function that is called with the batches and returns them, such as tqdm."
        )
    ledger = ledger_of(model)
    inner = unwrap(model)
    if isinstance(model, DataParallel | DistributedDataParallel):
        raise InjectionError("The model is wrapped in data parallelism, which features would pass by. Give the model inside.")
    if ledger.active_set is None:
        raise InjectionError("No adapter set is active. Call set_active_adapters(model, name) first.")
    spec = ledger.active_set.spec
    check_switchable(inner, ledger, [ledger.active_set])
    if drifted := backbone_differences(inner, ledger.fingerprint):
        raise InjectionError(f"The backbone is not what was injected into: {reasons_listing(drifted)}.")
    source = _Source(data, batch_size, num_workers, variants)
    device = next((parameter.device for parameter in nn.Module.parameters(inner)), torch.device("cpu"))
    plan = plan_for(inner, spec, _moved(source.some[0], device))
    rows = _Rows(plan, source, ledger.fingerprint.without(spec.head).to_json(), path)
    for where, batch in source.batches(rows.filled(), progress):
        inputs, rest = _split(batch)
        values = values_for(inner, plan, _moved(inputs, device))
        rows.write(where, [*(values[number] for number in plan.needed), *rest], partial(source.digests, batch))
    return PrefixCache(inner, plan, rows, ledger.fingerprint)


class PrefixCache(Dataset[Any]):
    """Features in place of a data set's inputs, and the model from there on; made by `cache_prefix`.

    As a data set, sample i is what sample i of the data was, with features in place of the input: a tensor, or a tuple if the model
    needs several. With `variants`, draw v of sample i is number ``v * length + i``.
    """

    def __init__(self, model: nn.Module, plan: Plan, rows: _Rows, backbone: Fingerprint) -> None:
        self._model: nn.Module | None = model
        self._plan, self._rows, self._backbone = plan, rows, backbone
        self._stamp = _stamp(model)

    def __len__(self) -> int:
        """Number of samples, times the number of variants."""
        return self._rows.total

    def __repr__(self) -> str:
        """Says what is kept."""
        kept = listing([self._plan.forms[number].name for number in self._plan.needed])
        return f"PrefixCache({len(self):,} samples, {self._rows.nbytes / 2**20:,.1f} MiB: {kept})"

    @override
    def __getitem__(self, index: int) -> Any:
        """Returns the features of a sample, with what else the sample has."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        features, rest = self._rows.read(index % len(self))
        whole = features[0] if len(features) == 1 else tuple(features)
        return (whole, *rest) if rest else whole

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the model out, so that workers of a DataLoader do not copy it."""
        return self.__dict__ | {"_model": None}

    def forward(self, features: Any) -> Any:
        """Returns the model's output for the features of a batch.

        Args:
            features: A batch of what the data set returns for an input, on the model's device.

        Returns:
            What the model returns for the inputs.

        Raises:
            InjectionError: The backbone has changed, or a set is active that begins before the features.
        """
        if self._model is None:
            raise InjectionError("This is a copy of the features without the model, as a worker of a DataLoader has it.")
        model, plan = self._model, self._plan
        ledger = ledger_of(model)
        if ledger.active_set is None:
            raise InjectionError("No adapter set is active. Call set_active_adapters(model, name) first.")
        self._check_backbone(model)
        tensors = list(features) if isinstance(features, list | tuple) else [features]
        forms = [plan.forms[number] for number in plan.needed]
        if [tuple(tensor.shape[1:]) for tensor in tensors] != [form.shape[1:] for form in forms]:
            wanted = listing([f"[N, {', '.join(map(str, form.shape[1:]))}]" for form in forms])
            raise InjectionError(f"The features have shape {[list(t.shape) for t in tensors]}, where {wanted} was kept.")
        values = {number: form.laid_out(tensor) for number, form, tensor in zip(plan.needed, forms, tensors, strict=True)}
        output = continued(model, plan, [plan.spec, ledger.active_set.spec], values, len(tensors[0]))
        if isinstance(output, NeededError):
            names = listing([plan.forms[number].name for number in output.numbers])
            raise InjectionError(
                f"With the set {ledger.active_set.spec.name!r} the model needs the {names}, which was not kept: the features were "
                f"computed for {plan.spec.name!r}, and the modules that ran then (optimize_backbone changes them). Make them anew."
            )
        return output

    def _check_backbone(self, model: nn.Module) -> None:
        if self._stamp == (stamp := _stamp(model)):
            return
        if drifted := backbone_differences(model, self._backbone):
            raise InjectionError(f"The backbone has changed since its features were kept: {reasons_listing(drifted)}.")
        self._stamp = stamp


class _Source:
    """The data, in batches that can be begun anywhere.

    Raises:
        AdapterError: They have no length, are random, or cannot be kept.
    """

    def __init__(self, data: Any, batch_size: int, num_workers: int, variants: int) -> None:
        self._options: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers}
        if isinstance(data, DataLoader):
            self._options |= {"num_workers": data.num_workers, "collate_fn": data.collate_fn}
            if data.batch_size is not None:
                self._options["batch_size"] = data.batch_size
            data = data.dataset
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0), ("variants", variants, 1)):
            if type(value) is not int or not least <= value <= _MOST:
                raise AdapterError(f"{name}={value!r}: give a whole number from {least} to {_MOST:,}.")
        if isinstance(data, IterableDataset) or not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
            raise AdapterError(f"{type(data).__name__} has no samples by number, or no length: give a data set with both.")
        try:
            self.data, self.variants, self.length = data, variants, len(data)
            few = [number * self.length // 3 for number in range(3)] if self.length else []
            with random_states_kept([]):
                before = random_state()
                self.some, again = (_split(self._batch(few)) for _ in range(2))
                self.is_random = before != random_state() or _bytes_of(self.some) != _bytes_of(again)
        except AdapterError:
            raise
        except Exception as error:  # a data set of anyone's may raise anything
            raise AdapterError(f"{type(data).__name__} gives no batch of samples: {type(error).__name__}: {error}.") from error
        if self.is_random and variants == 1:
            raise AdapterError(
                "The data are random: a sample draws random numbers, or is not twice the same (augmentation?). Take that out, or "
                "give variants=, how many draws of each sample to keep."
            )

    def batches(self, row: int, progress: Callable[[Iterable[Any]], Iterable[Any]]) -> Iterator[tuple[slice, Any]]:
        """Walks the batches from a row on, with the rows that they are; the last of each draw has more samples, to be full."""
        size = min(self._options["batch_size"], self.length)
        while row < self.length * self.variants:
            first = row % self.length
            numbers = [*range(first, self.length)]
            numbers += [numbers[-1]] * (-len(numbers) % size)  # kernels may round differently for another number of samples
            own = None if self.is_random else torch.Generator()  # else a loader draws from torch's, even where nothing is random
            for batch in progress(DataLoader(Subset(self.data, numbers), shuffle=False, generator=own, **self._options)):
                end = min(row + size, row - row % self.length + self.length)
                yield slice(row, end), batch
                row = end

    def digests(self, batch: Any) -> Tensor:
        """Returns the digest of each sample of a batch; of what is not random of it."""
        inputs, rest = _split(batch)
        parts = [*(() if self.is_random else (tensor for _, tensor in named_in(inputs))), *rest]
        return _digests(parts, _count(inputs))

    def digests_of(self, numbers: list[int]) -> Tensor:
        """Returns the digests of some samples."""
        with random_states_kept([]):
            return torch.cat([self.digests(self._batch([number])) for number in numbers])

    def _batch(self, numbers: list[int]) -> Any:
        options = self._options | {"batch_size": len(numbers), "num_workers": 0}
        return next(iter(DataLoader(Subset(self.data, numbers), generator=torch.Generator(), **options)))


class _Rows:
    """The features, and what else a sample has: arrays with a row for each sample, in memory or mapped from files.

    A row counts when its digest is there and is that of its content, so what a killed process or a failing disk has left is
    computed again.
    """

    def __init__(self, plan: Plan, source: _Source, backbone: Any, path: str | os.PathLike[str] | None) -> None:
        self.total = source.length * source.variants
        self._path = None if path is None else _directory(path)
        self._forms = [plan.forms[number] for number in plan.needed]
        rest = source.some[1]
        shapes = [(form.dtype, _physical(form.shape[1:], form.channels_last)) for form in self._forms]
        shapes += [(tensor.dtype, tuple(tensor.shape[1:])) for tensor in rest]
        told = json.dumps(backbone, sort_keys=True).encode()
        manifest = {
            "resadapt_prefix": _FORMAT,
            "backbone": hashlib.sha256(told).hexdigest(),
            "length": source.length,
            "variants": source.variants,
            "random": source.is_random,
            "calls": [place for place, _ in plan.calls],
            "kept": [form.name for form in self._forms],
            "arrays": [[dtype_name(torch.empty(0, dtype=dtype)), list(shape)] for dtype, shape in shapes],
        }
        if self._path is not None:
            _agree(self._path, manifest)
        self._shapes = shapes
        self._open()
        if self._path is not None:
            self._compare(source)

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what is in files: a worker of a DataLoader maps them itself."""
        return self.__dict__ | ({} if self._path is None else {"_arrays": [], "_digests": None})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Maps the files again."""
        self.__dict__ = state
        if self._path is not None:
            self._open()

    def _open(self) -> None:
        self._arrays = [self._array(f"{number}.bin", *array) for number, array in enumerate(self._shapes)]
        if self._path is not None:
            self._digests = self._array("digests.bin", torch.uint8, (2 * _DIGEST,))

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self._arrays)

    def filled(self) -> int:
        """Returns how many rows, from the first on, have what was written into them."""
        if self._path is None:
            return 0
        for start in range(0, self.total, 1024):
            rows = slice(start, start + 1024)
            known = self._digests[rows, :_DIGEST]
            good = (known == _digests([array[rows] for array in self._arrays], len(known))).all(1)
            if not good.all():
                return start + int(good.long().argmin())
        return self.total

    def write(self, where: slice, values: list[Tensor], digests: Callable[[], Tensor]) -> None:
        """Writes rows, of which a batch may have more."""
        count = where.stop - where.start
        for number, (array, value) in enumerate(zip(self._arrays, values, strict=True)):
            channels_last = number < len(self._forms) and self._forms[number].channels_last
            array[where] = (value.movedim(1, -1) if channels_last else value)[:count].cpu()
        if self._path is not None:
            self._digests[where, _DIGEST:] = digests()[:count]
            self._digests[where, :_DIGEST] = _digests([array[where] for array in self._arrays], count)

    def read(self, row: int) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the features of a row, and the rest."""
        values = [array[row].clone() for array in self._arrays]
        kept = len(self._forms)
        features = [
            value.movedim(-1, 0) if form.channels_last else value for value, form in zip(values[:kept], self._forms, strict=True)
        ]
        return features, values[kept:]

    def _array(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        sizes = (self.total, *shape)
        if self._path is None:
            try:
                return torch.zeros(sizes, dtype=dtype)
            except (RuntimeError, MemoryError) as error:
                raise AdapterError(f"There is no memory for features of sizes {list(sizes)}: give a path for files.") from error
        size = torch.Size(sizes).numel()
        file = self._path / name
        try:
            with file.open("ab") as stream:
                missing = size * dtype.itemsize - stream.tell()
                if missing and hasattr(os, "posix_fallocate"):  # a full disk is an error here, and a crash once it is mapped
                    os.posix_fallocate(stream.fileno(), 0, size * dtype.itemsize)
        except OSError as error:
            raise AdapterFileError(f"{file}: cannot be written: {error.strerror}.") from error
        return torch.from_file(str(file), shared=True, size=size, dtype=dtype).reshape(sizes)

    def _compare(self, source: _Source) -> None:
        """Refuses a directory with the features of other data."""
        filled = self.filled()
        numbers = sorted({number * filled // _LOOKED_AT for number in range(_LOOKED_AT)} if filled else ())
        today = source.digests_of([number % source.length for number in numbers]) if numbers else torch.empty(0, _DIGEST)
        other = [number for number, digest in zip(numbers, today, strict=True) if not digest.equal(self._digests[number, _DIGEST:])]
        if other:
            raise AdapterFileError(
                f"{self._path}: sample {other[0]} of the data is not the one whose features are there. Give the same data in "
                "the same order, or another directory."
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
            if any(path.iterdir()):
                raise AdapterFileError(f"{path}: is a directory with other things in it. Give an empty or a new one.")
            temporary = path / "features.json.new"
            temporary.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
            temporary.replace(file)
        known = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterFileError(f"{path}: cannot be written: {error.strerror}.") from error
    except ValueError as error:
        raise AdapterFileError(f"{file}: is no description of features: {error}.") from error
    if not isinstance(known, dict) or known.get("resadapt_prefix") != _FORMAT:
        raise AdapterFileError(f"{file}: is no description of features of this version. Give another directory.")
    if known.get("backbone") != manifest["backbone"]:
        raise BackboneMismatchError(f"{path}: the features there are of another backbone. Give another directory.")
    if other := [name for name in manifest if known.get(name) != manifest[name]]:
        raise AdapterFileError(
            f"{path}: other features are there: {other[0]} is {known.get(other[0])!r:.200} and would be "
            f"{manifest[other[0]]!r:.200}. Give another directory."
        )


def _split(batch: Any) -> tuple[Any, list[Tensor]]:
    """Divides a batch into the model's inputs and the rest."""
    inputs, *rest = batch if isinstance(batch, list | tuple) else [batch]
    count = _count(inputs)
    for number, value in enumerate(rest, 1):
        if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != count:
            raise AdapterError(
                f"Part {number} of a sample is {type(value).__name__} in a batch, where a tensor with a row for each sample can be "
                "kept. Return tensors and numbers."
            )
    return inputs, rest


def _count(inputs: Any) -> int:
    """Returns the number of samples in a batch."""
    tensors = [tensor for _, tensor in named_in(inputs)]
    if not tensors or any(tensor.ndim == 0 or len(tensor) != len(tensors[0]) for tensor in tensors):
        raise AdapterError(f"The input of a batch is {type(inputs).__name__}: tensors with a row for each sample are needed.")
    return len(tensors[0])


def _moved(inputs: Any, device: torch.device) -> Any:
    return map_tensors(inputs, lambda tensor: tensor.to(device))


def _physical(shape: tuple[int, ...], channels_last: bool) -> tuple[int, ...]:
    return (*shape[1:], shape[0]) if channels_last else shape


def _digests(tensors: list[Tensor], rows: int) -> Tensor:
    """Returns a digest for each row of some tensors, uint8 [rows, 32]."""
    columns = [memoryview(raw_bytes(tensor)) for tensor in tensors if tensor.numel()]
    digests = bytearray()
    for row in range(rows):
        digest = hashlib.sha256()
        for column in columns:
            size = len(column) // rows
            digest.update(column[row * size : (row + 1) * size])
        digests += digest.digest()
    return torch.frombuffer(digests, dtype=torch.uint8).reshape(rows, _DIGEST)


def _bytes_of(samples: tuple[Any, list[Tensor]]) -> list[bytes]:
    return [bytes(raw_bytes(tensor)) for _, tensor in named_in(samples)]


def _stamp(model: nn.Module) -> list[tuple[int, int]]:
    """Returns what changes when a tensor of the backbone is written or moved."""
    return [(address(t), 0 if t.is_inference() else t._version) for t in plain_tensors(model).values()]
