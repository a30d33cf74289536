"""Batches of a data set from any row on, after checks that its features can be cached."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset

from resadapt.base.errors import AdapterError
from resadapt.base.inputs import named_in
from resadapt.base.tensors import raw_bytes, row_digests
from resadapt.base.undisturbed import random_state, random_states_kept

__all__ = ["Progress", "Samples", "split"]

Progress = Callable[[Iterable[Any]], Iterable[Any]]
_MAX_OPTION = 1_000_000
_TEST_DRAWS = 16
"""Number of samples that are drawn twice, to detect random data."""


class Samples:
    """A data set in batches from any row on.

    Raises:
        AdapterError: The data have no length, are random, or cannot be cached.
    """

    def __init__(self, data: Any, batch_size: int, num_workers: int, variants: int) -> None:
        self._options: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers}
        if isinstance(data, DataLoader):
            self._options |= {"num_workers": data.num_workers, "collate_fn": data.collate_fn}
            if data.batch_size is not None:
                self._options["batch_size"] = data.batch_size
            data = data.dataset
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("variants", variants, 1),
        ):
            if type(value) is not int or not least <= value <= _MAX_OPTION:
                raise AdapterError(
                    f"{name}={value!r}: give a whole number from {least} to {_MAX_OPTION:,}."
                )
        if (
            isinstance(data, IterableDataset)
            or not hasattr(data, "__getitem__")
            or not hasattr(data, "__len__")
        ):
            raise AdapterError(
                f"{type(data).__name__} has no __getitem__ or no __len__: give a map-style data "
                "set."
            )
        try:
            self.data, self.variants, self.length = data, variants, len(data)
            self.numbers = few = (
                [n * self.length // _TEST_DRAWS for n in range(_TEST_DRAWS)] if self.length else []
            )
            with random_states_kept([]):
                before = random_state()
                batch, again = self._batch(few), split(self._batch(few))
                self.some = split(batch)
                self.is_random = before != random_state() or _bytes_of(self.some) != _bytes_of(
                    again
                )
                mixed = not self.is_random and not self.digests(self._batch(few[:1])).equal(
                    self.digests(batch)[:1]
                )
        except AdapterError:
            raise
        except Exception as error:  # a user's data set may raise anything
            raise AdapterError(
                f"{type(data).__name__} cannot be batched: {type(error).__name__}: {error}."
            ) from error
        if mixed:
            raise AdapterError(
                "A sample in a batch differs from the same sample alone: the collate function "
                "mixes samples, or pads them to the longest."
            )
        if self.is_random and variants == 1:
            raise AdapterError(
                "The data are random: samples draw random numbers or differ when drawn again "
                "(augmentation?). Remove the randomness, or give variants=, the number of draws of "
                "each sample to cache."
            )

    def batches(
        self, row: int, progress: Progress, end: int | None = None
    ) -> Iterator[tuple[slice, Any]]:
        """Yields the batches from a row on, with their rows.

        The last batch of each draw is padded to full size with its last sample, since kernels may
        round differently for another batch size.

        Raises:
            AdapterError: `progress` does not return the batches.
        """
        size = min(self._options["batch_size"], self.length)
        end = self.length * self.variants if end is None else end
        while row < end:
            first = row % self.length
            stop = min(first + end - row, self.length)
            numbers = [*range(first, stop)]
            numbers += [numbers[-1]] * (-len(numbers) % size)
            # Without a generator, a loader draws from torch's random state for its workers' seeds.
            generator = None if self.is_random else torch.Generator()
            loader = DataLoader(
                Subset(self.data, numbers), shuffle=False, generator=generator, **self._options
            )
            shown, start = progress(loader), row
            if not isinstance(shown, Iterable):
                raise AdapterError(
                    f"progress returned {type(shown).__name__}, not the batches that it was called "
                    "with."
                )
            for batch in shown:
                until = min(row + size, row - row % self.length + stop)
                yield slice(row, until), batch
                row = until
            if row - start != stop - first:
                raise AdapterError("progress did not return all batches that it was called with.")

    def digests(self, batch: Any) -> Tensor:
        """Returns the digest of each sample of a batch, without the input if data are random."""
        inputs, rest = split(batch)
        parts = [*(() if self.is_random else (tensor for _, tensor in named_in(inputs))), *rest]
        return row_digests(parts, _count(inputs))

    def _batch(self, numbers: list[int]) -> Any:
        options = self._options | {"batch_size": len(numbers), "num_workers": 0}
        return next(
            iter(DataLoader(Subset(self.data, numbers), generator=torch.Generator(), **options))
        )


def split(batch: Any) -> tuple[Any, list[Tensor]]:
    """Splits a batch into the model's inputs and the other values."""
    inputs, *rest = batch if isinstance(batch, list | tuple) else [batch]
    count = _count(inputs)
    for number, value in enumerate(rest, 1):
        if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != count:
            raise AdapterError(
                f"Part {number} of a sample is {type(value).__name__} in a batch, but only a "
                "tensor with a row for each sample can be cached. Return tensors and numbers."
            )
    return inputs, rest


def _count(inputs: Any) -> int:
    """Returns the number of samples in a batch."""
    tensors = [tensor for _, tensor in named_in(inputs)]
    if not tensors or any(tensor.ndim == 0 or len(tensor) != len(tensors[0]) for tensor in tensors):
        raise AdapterError(
            f"The input of a batch is {type(inputs).__name__}: tensors with a row for each sample "
            "are needed."
        )
    return len(tensors[0])


def _bytes_of(samples: tuple[Any, list[Tensor]]) -> list[bytes]:
    return [bytes(raw_bytes(tensor)) for _, tensor in named_in(samples)]
