"""Training blocks that the stage before sends to the wrong specialist, to teach it to doubt."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from av1partition.data.blocks import DatasetError


def with_misrouted(
    own: TensorDataset, strangers: Tensor, classes: int, share: float, seed: int
) -> TensorDataset:
    """Add misrouted blocks to a specialist's own.

    None of its answers is right for them. Each gets one at random, so that what is learned of such
    blocks is to be undecided.

    Args:
        own: Inputs [N, 2, 16, 16] and class numbers.
        strangers: Inputs of misrouted blocks, [M, 2, 16, 16].
        classes: Number of the specialist's answers.
        share: Of the strangers in the result, in [0, 1).
        seed: Of the choice of the strangers and of their labels.

    Returns:
        All own blocks, and behind them ``share / (1 - share) * N`` strangers, rounded.

    Raises:
        DatasetError: There are not enough of them.
    """
    count = round(share / (1 - share) * len(own))
    if count > len(strangers):
        raise DatasetError(
            f"{len(strangers)} blocks are misrouted, a share of {share:g} takes {count}; inject a "
            "smaller share"
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(strangers), generator=generator)[:count]
    guesses = torch.randint(classes, (count,), generator=generator)
    samples, labels = own.tensors
    return TensorDataset(torch.cat([samples, strangers[chosen]]), torch.cat([labels, guesses]))
