"""The floor that a network must beat: gradient-boosted trees on a few numbers of each block."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from torch import Tensor
from torch.utils.data import TensorDataset

from av1partition.data.blocks import BLOCK
from av1partition.data.inputs import HIGHEST_Q, luma


def block_numbers(inputs: Tensor, *, quantizer: bool) -> npt.NDArray[np.float32]:
    """Describe blocks by hand.

    Args:
        inputs: [N, 2, 16, 16].
        quantizer: Give the quantizer too.

    Returns:
        [N, 22] or [N, 23]: of the block and its four quarters the mean, the standard deviation and
        the mean absolute differences down and across; of the block the mean absolute step over its
        two middle lines; ``base_q_idx``.
    """
    block, half = luma(inputs)[:, 0], BLOCK // 2
    quarters = [block[:, i : i + half, j : j + half] for i in (0, half) for j in (0, half)]
    numbers = []
    for part in (block, *quarters):
        down, across = part.diff(dim=1).abs(), part.diff(dim=2).abs()
        numbers += [
            part.mean((1, 2)),
            part.std((1, 2), correction=0),
            down.mean((1, 2)),
            across.mean((1, 2)),
        ]
    numbers += [
        (block[:, half] - block[:, half - 1]).abs().mean(1),
        (block[:, :, half] - block[:, :, half - 1]).abs().mean(1),
    ]
    if quantizer:
        numbers.append((inputs[:, 1, 0, 0] * HIGHEST_Q).round())
    return torch.stack(numbers, dim=1).numpy()


def fit_trees(
    train: TensorDataset, *, quantizer: bool, seed: int
) -> HistGradientBoostingClassifier:
    """Train on inputs and class numbers, each class of the same weight.

    The seed parts off the blocks that decide when to stop.
    """
    inputs, labels = train.tensors
    return new_trees(seed).fit(block_numbers(inputs, quantizer=quantizer), labels.numpy())


def new_trees(seed: int) -> HistGradientBoostingClassifier:
    """Trees that have not grown yet; all classes weigh the same."""
    # Without being told, scikit-learn stops early with more than 10,000 blocks only; with fewer,
    # seeds would change nothing.
    return HistGradientBoostingClassifier(
        class_weight="balanced",
        learning_rate=0.06,
        max_iter=300,
        early_stopping=True,
        random_state=seed,
    )


def tree_probabilities(
    trees: HistGradientBoostingClassifier, inputs: Tensor, *, quantizer: bool
) -> Tensor:
    """What the trees say of each class, [N, K]."""
    return torch.from_numpy(trees.predict_proba(block_numbers(inputs, quantizer=quantizer))).float()
