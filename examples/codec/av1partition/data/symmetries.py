"""The eight symmetries of the square, and what they make of a block's partition: augmentation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor

from av1partition.data.tasks import PARTITIONS, Task

Symmetry = tuple[bool, bool, bool]
"""Whether a block is flipped top to bottom, then left to right, then transposed."""

SYMMETRIES: tuple[Symmetry, ...] = tuple(product((False, True), (False, True), (False, True)))

_FLIPPED_DOWN = {"HORZ_A": "HORZ_B", "HORZ_B": "HORZ_A"}
_FLIPPED_ACROSS = {"VERT_A": "VERT_B", "VERT_B": "VERT_A"}
_TRANSPOSED = {"HORZ": "VERT", "HORZ_A": "VERT_A", "HORZ_B": "VERT_B", "HORZ_4": "VERT_4"}
_TRANSPOSED |= {after: before for before, after in _TRANSPOSED.items()}
_STEPS: tuple[tuple[Callable[[Tensor], Tensor], dict[str, str]], ...] = (
    (lambda x: x.flip(2), _FLIPPED_DOWN),
    (lambda x: x.flip(3), _FLIPPED_ACROSS),
    (lambda x: x.transpose(2, 3), _TRANSPOSED),
)


def turn(samples: Tensor, symmetry: Symmetry) -> Tensor:
    """Apply a symmetry to blocks [N, C, 16, 16]."""
    for (step, _), chosen in zip(_STEPS, symmetry, strict=True):
        samples = step(samples) if chosen else samples
    return samples


def turned_classes(task: Task, symmetry: Symmetry) -> Tensor:
    """For each class number of a task, the one that the turned block has, int64 of shape [K]."""
    classes = torch.arange(len(task.classes))
    for table, chosen in zip(_tables(task), symmetry, strict=True):
        classes = table[classes] if chosen else classes
    return classes


def turn_at_random(task: Task) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """An augmentation for a task.

    Each block of a batch is turned by a random symmetry, and its class number with it.
    """
    tables = _tables(task)

    def augment(samples: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        chosen = torch.rand(len(_STEPS), len(samples)) < 0.5
        for (step, _), table, mask in zip(_STEPS, tables, chosen.to(samples.device), strict=True):
            samples = torch.where(mask[:, None, None, None], step(samples), samples)
            labels = torch.where(mask, table.to(labels.device)[labels], labels)
        return samples, labels

    return augment


def _tables(task: Task) -> Sequence[Tensor]:
    """For each step the class numbers after it, by those before."""
    tables = []
    for _, kinds in _STEPS:
        table = torch.arange(len(task.classes))
        for before, answer in zip(PARTITIONS, task.answers, strict=True):
            if answer >= 0:
                table[answer] = task.answers[PARTITIONS.index(kinds.get(before, before))]
        tables.append(table)
    return tables
