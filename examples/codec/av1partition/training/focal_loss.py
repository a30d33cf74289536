"""Class-balanced focal loss: rare classes and hard samples weigh more."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def class_balanced_weights(counts: Tensor, beta: float = 0.9999) -> Tensor:
    """Weights proportional to the inverse effective number of samples, (1 - beta) / (1 - beta^n).

    Args:
        counts: Samples of each class in the training set, integers of shape [K].
        beta: In [0, 1); 0 weighs all classes alike, towards 1 by inverse frequency.

    Returns:
        Float32 of shape [K] that sums to K.

    Raises:
        ValueError: A class has no samples, or beta is out of range.

    References:
        Cui et al. 2019, Class-Balanced Loss Based on Effective Number of Samples, arXiv:1901.05555.

    Example:
        >>> class_balanced_weights(torch.tensor([10, 10]))
        tensor([1., 1.])
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta is {beta}, expected 0 <= beta < 1")
    if empty := (counts <= 0).nonzero().flatten().tolist():
        raise ValueError(
            f"classes {empty} have no training samples (counts {counts.tolist()}); add some or "
            "drop them"
        )
    # Double precision: beta^n is so close to 1 for small n that float32 would lose most digits.
    raw = (1 - beta) / (1 - beta ** counts.double())
    return (raw * len(counts) / raw.sum()).float()


class ClassBalancedFocalLoss(nn.Module):
    """Mean over the batch of ``-w_y (1 - p_y)^gamma log p_y`` with p the softmax of the logits.

    Args:
        counts: Samples of each class in the training set, integers of shape [K].
        beta: Of the class weights.
        gamma: Of the focal term; 0 is weighted cross-entropy.

    References:
        Cui et al. 2019, arXiv:1901.05555; Lin et al. 2017, Focal Loss, arXiv:1708.02002.
    """

    weights: Tensor

    def __init__(self, counts: Tensor, beta: float = 0.9999, gamma: float = 2.0) -> None:
        """See the class."""
        super().__init__()
        self.gamma = gamma
        self.register_buffer("weights", class_balanced_weights(counts, beta))

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Loss of one batch.

        Args:
            logits: [N, K].
            target: Class numbers, int64 of shape [N].

        Returns:
            A scalar.
        """
        log_p = F.log_softmax(logits, dim=1).gather(1, target.unsqueeze(1)).squeeze(1)
        # expm1 keeps 1 - p exact for confident samples, where 1 - exp(log_p) would round to 0.
        return (self.weights[target] * (-torch.expm1(log_p)) ** self.gamma * -log_p).mean()
