"""Temperature and threshold of Stage 1, against plain loops and known answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from av1partition.evaluation.calibration import THRESHOLDS, choose_threshold, fit_temperature
from sklearn.metrics import f1_score


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_that_labels_were_drawn_with_is_found(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(200_000, 1, generator=generator)
    labels = (
        torch.rand(200_000, generator=generator) < torch.sigmoid(logits[:, 0] / temperature)
    ).long()
    assert fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.03)


def test_the_threshold_is_the_best_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(3000, generator=generator)
    labels = (torch.rand(3000, generator=generator) < probabilities**3).long()
    scores = [
        f1_score(labels, probabilities.double().numpy() >= t, average="macro", zero_division=0)
        for t in THRESHOLDS
    ]
    chosen = choose_threshold(probabilities, labels)
    assert chosen == THRESHOLDS[int(np.argmax(scores))]
    assert 0.5 < chosen < 1, "cubing moved it"


def test_certain_answers() -> None:
    assert choose_threshold(torch.tensor([0.2, 0.9]), torch.tensor([0, 1])) == pytest.approx(0.205)
    assert choose_threshold(torch.tensor([0.2, 0.875]), torch.tensor([0, 0])) == pytest.approx(0.88)
