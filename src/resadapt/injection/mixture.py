"""Batches whose samples use different sets: rows are split by set and joined again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from resadapt.base.errors import InjectionError
from resadapt.base.inputs import map_tensors

__all__ = ["Mixture", "OneOfMany"]


class Mixture:
    """The set of each sample in the current batch.

    Args:
        names: For each sample the name of a set, or None for the backbone without adapters.
    """

    def __init__(self, names: Iterable[str | None]) -> None:
        self.names = tuple(names)

    def __reduce__(self) -> Any:
        """Refuses: a copy of the model could never leave `adapters_for`."""
        raise InjectionError(
            "Inside adapters_for a model cannot be copied or pickled. Leave the with block first."
        )

    def run(
        self,
        place: str,
        changes: Callable[[str | None], bool],
        function: Callable[[str | None, Any], Any],
        values: Any,
    ) -> Any:
        """Calls a function once for each set that changes a module, with the rows of its samples.

        Args:
            place: Name of the module, for messages.
            changes: Tells whether a set has an adapter or private module there.
            function: Called with a set's name (None for all other sets) and that set's rows.
            values: Tensors with the whole batch in dimension 0, in tuples and dicts.

        Returns:
            The function's results, with rows in batch order; a list with one entry per sample
            where the results of different sets have different shapes.

        Raises:
            InjectionError: A tensor does not have a row for each sample.
        """
        rows: dict[str | None, list[int]] = {}
        for row, name in enumerate(self.names):
            rows.setdefault(name if changes(name) else None, []).append(row)
        map_tensors(values, lambda tensor: self._checked(place, tensor))
        if len(rows) == 1:
            return function(next(iter(rows)), values)
        batch_names, results = self.names, []
        for name, chosen in rows.items():
            self.names = tuple(batch_names[row] for row in chosen)  # for adapters inside
            try:
                results.append(function(name, map_tensors(values, partial(_rows, chosen))))
            finally:
                self.names = batch_names
        return _joined(place, results, list(rows.values()))

    def _checked(self, place: str, tensor: Tensor) -> Tensor:
        if tensor.ndim == 0 or tensor.shape[0] != len(self.names):
            raise InjectionError(
                f"Module {place!r} runs on shape {list(tensor.shape)}, but adapters_for was given "
                f"{len(self.names)} names. Give a name for each sample of the batch. Models that "
                "change the batch size inside cannot run mixed batches."
            )
        return tensor


class OneOfMany(Mixture):
    """Several sets that run one after another, each with the whole batch.

    Args:
        names: Names of sets, or None for the backbone without adapters.
    """

    def __init__(self, names: Iterable[str | None]) -> None:
        super().__init__(names)
        self.name: str | None = None
        """The set that runs now."""

    @override
    def run(
        self,
        place: str,
        changes: Callable[[str | None], bool],
        function: Callable[[str | None, Any], Any],
        values: Any,
    ) -> Any:
        """Calls a function once, with the current set, or None if it changes nothing there."""
        return function(self.name if changes(self.name) else None, values)


class _PerSample(list[Tensor]):
    """Results of different shapes, one for each sample."""


def _rows(rows: list[int], tensor: Tensor) -> Tensor:
    return tensor[rows]


def _joined(place: str, results: list[Any], rows: list[list[int]]) -> Any:
    if not all(
        isinstance(result, Tensor | _PerSample) and len(result) == len(chosen)
        for result, chosen in zip(results, rows, strict=True)
    ):
        raise InjectionError(
            f"Module {place!r} does not return one tensor with a row for each sample, so it cannot "
            "run in a mixed batch."
        )
    order = [row for chosen in rows for row in chosen]
    back = [order.index(row) for row in range(len(order))]
    if (
        all(isinstance(result, Tensor) for result in results)
        and len({result.shape[1:] for result in results}) == 1
    ):
        return torch.cat(results)[back]
    samples = [sample for result in results for sample in result]
    return _PerSample(samples[position] for position in back)
