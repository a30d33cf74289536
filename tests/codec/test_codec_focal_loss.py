"""The loss against the paper's formulas, written out slowly."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from av1partition.training.focal_loss import ClassBalancedFocalLoss, class_balanced_weights

COUNTS = [27_267, 41_171, 13_002]


def slow_weights(counts: list[int], beta: float) -> list[float]:
    raw = [(1 - beta) / (1 - beta**n) for n in counts]
    return [len(counts) * weight / sum(raw) for weight in raw]


def slow_loss(
    logits: torch.Tensor, target: torch.Tensor, counts: list[int], beta: float, gamma: float
) -> float:
    weights, total = slow_weights(counts, beta), 0.0
    for row, y in zip(logits.tolist(), target.tolist(), strict=True):
        p = math.exp(row[y]) / sum(math.exp(value) for value in row)
        total += -weights[y] * (1 - p) ** gamma * math.log(p)
    return total / len(target)


@pytest.mark.parametrize("counts", [COUNTS, [1, 10, 100_000], [5, 5]])
@pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999])
def test_weights(counts: list[int], beta: float) -> None:
    weights = class_balanced_weights(torch.tensor(counts), beta)
    assert weights.tolist() == pytest.approx(slow_weights(counts, beta), rel=1e-6)
    assert float(weights.sum()) == pytest.approx(len(counts), rel=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 2.5])
def test_loss(gamma: float) -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(20, 3) * 3, torch.randint(0, 3, (20,))
    loss = ClassBalancedFocalLoss(torch.tensor(COUNTS), 0.9999, gamma)(logits, target)
    assert float(loss) == pytest.approx(slow_loss(logits, target, COUNTS, 0.9999, gamma), rel=1e-5)


def test_gradient() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 3, dtype=torch.double, requires_grad=True)
    loss = ClassBalancedFocalLoss(torch.tensor(COUNTS)).double()
    assert torch.autograd.gradcheck(lambda x: loss(x, torch.tensor([0, 1, 2, 0, 1, 2])), logits)


def test_without_beta_and_gamma_it_is_cross_entropy() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(20, 3), torch.randint(0, 3, (20,))
    loss = ClassBalancedFocalLoss(torch.tensor(COUNTS), beta=0.0, gamma=0.0)(logits, target)
    torch.testing.assert_close(loss, F.cross_entropy(logits, target))


def test_certain_samples_have_finite_gradients() -> None:
    logits = torch.tensor([[100.0, -100.0, 0.0], [-100.0, 100.0, 0.0]], requires_grad=True)
    ClassBalancedFocalLoss(torch.tensor(COUNTS))(logits, torch.tensor([0, 0])).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_empty_class_is_named() -> None:
    with pytest.raises(ValueError, match=r"classes \[1\] have no training samples"):
        class_balanced_weights(torch.tensor([3, 0, 2]))


def test_beta_out_of_range() -> None:
    with pytest.raises(ValueError, match="beta is 1"):
        class_balanced_weights(torch.tensor([3, 2]), beta=1)
