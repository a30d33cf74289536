"""AV1's partitions of a 16x16 block, and the questions that the stages ask about them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PARTITIONS = (
    "NONE",
    "HORZ",
    "VERT",
    "SPLIT",
    "HORZ_A",
    "HORZ_B",
    "VERT_A",
    "VERT_B",
    "HORZ_4",
    "VERT_4",
)


@dataclass(frozen=True)
class Task:
    """One stage's question.

    Attributes:
        key: Short name: of its adapter set, its head and its files.
        title: For people.
        classes: Names of the answers.
        answers: For each AV1 id the class number, -1 where the question does not arise.
    """

    key: str
    title: str
    classes: tuple[str, ...]
    answers: tuple[int, ...]

    def of(self, partitions: Tensor) -> Tensor:
        """Class numbers of AV1 ids, -1 where the question does not arise."""
        return torch.tensor(self.answers)[partitions]


# AV1's 1:4 partitions cut in one direction only, with no 8x8 part, so they are rectangular: RECT in
# Stage 2, and HORZ or VERT by their direction in Stage 3. AB are the four kinds that have both 8x8
# and longer parts.
KINDS = Task("kinds", "All kinds", PARTITIONS, tuple(range(len(PARTITIONS))))
STAGE1 = Task("stage1", "Stage 1", ("NONE", "PARTITION"), (0, 1, 1, 1, 1, 1, 1, 1, 1, 1))
STAGE2 = Task("stage2", "Stage 2", ("SPLIT", "RECT", "AB"), (-1, 1, 1, 0, 2, 2, 2, 2, 1, 1))
RECT = Task("rect", "Stage 3 RECT", ("HORZ", "VERT"), (-1, 0, 1, -1, -1, -1, -1, -1, 0, 1))
AB = Task(
    "ab",
    "Stage 3 AB",
    ("HORZ_A", "HORZ_B", "VERT_A", "VERT_B"),
    (-1, -1, -1, -1, 0, 1, 2, 3, -1, -1),
)
SPECIALISTS = (STAGE2, RECT, AB)
