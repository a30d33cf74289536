"""Calibrating a finished binary classifier on validation blocks: its temperature and threshold."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor

THRESHOLDS = np.arange(1, 200) / 200


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The divisor of the logits under which the labels are likeliest.

    Args:
        logits: Of class 1, [N, 1].
        labels: 0 or 1, [N].

    References:
        Guo et al. 2017, On Calibration of Modern Neural Networks, arXiv:1706.04599.
    """
    z, y = logits[:, 0].double(), labels.double()
    best = minimize_scalar(
        lambda log_t: float(F.binary_cross_entropy_with_logits(z / np.exp(log_t), y)),
        bounds=(-4, 4),
        method="bounded",
    )
    return float(np.exp(best.x))


def choose_threshold(probabilities: Tensor, labels: Tensor) -> float:
    """The probability of class 1 from which on it is answered, so that macro-F1 is highest.

    Args:
        probabilities: Of class 1, [N].
        labels: 0 or 1, [N].

    Returns:
        One of 0.005, 0.01 ... 0.995; of several equally good ones the first.
    """
    guesses = probabilities.double()[:, None] >= torch.from_numpy(THRESHOLDS)
    truth = labels.bool()[:, None]
    scores = [_f1(guesses, truth), _f1(~guesses, ~truth)]
    return float(THRESHOLDS[int(torch.stack(scores).mean(0).argmax())])


def _f1(guesses: Tensor, truth: Tensor) -> Tensor:
    right = (guesses & truth).sum(0)
    return 2 * right / (guesses.sum(0) + truth.sum(0)).clamp(min=1)
