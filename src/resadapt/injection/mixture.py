"""A batch whose samples run with different sets: rows taken apart and put together again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from resadapt.base.errors import InjectionError
from resadapt.base.inputs import map_tensors

__all__ = ["InTurns", "Mixture"]


class Mixture:
    """The set of each sample in the batch that is running now.

    Args:
        names: A set's name, or None for the plain backbone, for each sample.
    """

    def __init__(self, names: Iterable[str | None]) -> None:
        self.names = tuple(names)

    def __reduce__(self) -> Any:
        """Refuses: a copy of the model would go on mixing for ever."""
        raise InjectionError(
            "Inside adapters_for a model can be neither copied nor pickled. Leave it first."
        )

    @property
    def turn(self) -> object:
        """What runs now, to be compared: the same again gives the same numbers."""
        return self.names

    def run(
        self,
        place: str,
        sets: Collection[str],
        function: Callable[[str | None, Any], Any],
        values: Any,
    ) -> Any:
        """Calls a function once for each set that is different at a place, with the rows of its
        samples.

        Args:
            place: Name of the module, for messages.
            sets: The sets that are different there.
            function: Called with a set's name (None for all others) and the values with their rows.
            values: Tensors with the whole batch in dimension 0, in tuples and dicts.

        Returns:
            What the function returned, with the rows in the order of the batch; a list with an
            entry for each sample where the rows of different sets have different shapes.

        Raises:
            InjectionError: A tensor does not have a row for each sample.
        """
        rows: dict[str | None, list[int]] = {}
        for row, name in enumerate(self.names):
            rows.setdefault(name if name in sets else None, []).append(row)
        map_tensors(values, lambda tensor: self._checked(place, tensor))
        if len(rows) == 1:
            return function(next(iter(rows)), values)
        whole, results = self.names, []
        for name, own in rows.items():
            self.names = tuple(whole[row] for row in own)  # for what runs inside
            try:
                results.append(function(name, map_tensors(values, partial(_rows, own))))
            finally:
                self.names = whole
        return _joined(place, results, list(rows.values()))

    def _checked(self, place: str, tensor: Tensor) -> Tensor:
        if tensor.ndim == 0 or tensor.shape[0] != len(self.names):
            raise InjectionError(
                f"Module {place!r} runs on shape {list(tensor.shape)}, but adapters_for was given "
                f"{len(self.names)} names. Give a name for each sample of the batch; a model that "
                "changes the batch on the way cannot be mixed."
            )
        return tensor


class InTurns(Mixture):
    """Several sets, of which one runs with the whole batch, whatever its form.

    Args:
        names: Names of sets, or None for the plain backbone.
    """

    def __init__(self, names: Iterable[str | None]) -> None:
        super().__init__(names)
        self.name: str | None = None
        """The set that runs now."""

    @property
    @override
    def turn(self) -> object:
        """The set that runs now."""
        return self.name

    @override
    def run(
        self,
        place: str,
        sets: Collection[str],
        function: Callable[[str | None, Any], Any],
        values: Any,
    ) -> Any:
        """Calls a function once, with the set that runs now if it is different at a place."""
        return function(self.name if self.name in sets else None, values)


class _Apart(list[Tensor]):
    """Samples whose results have different shapes."""


def _rows(rows: list[int], tensor: Tensor) -> Tensor:
    return tensor[rows]


def _joined(place: str, results: list[Any], rows: list[list[int]]) -> Any:
    if not all(
        isinstance(result, Tensor | _Apart) and len(result) == len(own)
        for result, own in zip(results, rows, strict=True)
    ):
        raise InjectionError(
            f"Module {place!r} does not return one tensor with a row for each sample, and cannot "
            "be mixed."
        )
    order = [row for own in rows for row in own]
    back = [order.index(row) for row in range(len(order))]
    if (
        all(isinstance(result, Tensor) for result in results)
        and len({result.shape[1:] for result in results}) == 1
    ):
        return torch.cat(results)[back]
    apart = [sample for result in results for sample in result]
    return _Apart(apart[position] for position in back)
