"""Answers averaged over the eight symmetries of the square."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from av1partition.data.symmetries import SYMMETRIES, turn, turned_classes
from av1partition.data.tasks import Task


def average_over_symmetries(answer: Callable[[Tensor], Tensor], task: Task, inputs: Tensor) -> Tensor:
    """Ask for each block turned in all eight ways, and take the mean of the answers, turned back.

    Args:
        answer: From inputs to probabilities [N, K].
        task: Its question.
        inputs: [N, 2, 16, 16].

    Returns:
        [N, K].
    """
    answers = [answer(turn(inputs, symmetry))[:, turned_classes(task, symmetry)] for symmetry in SYMMETRIES]
    return torch.stack(answers).mean(dim=0)
