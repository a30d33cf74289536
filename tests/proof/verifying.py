"""What the tests of proofs share: a model, and how a report is read."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.utils.prune
from support import images
from torch import Tensor, nn

import resadapt

X = images()


class Net(nn.Module):
    """Small, takes images of any size, with dropout and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.bn(self.conv(x))).mean((2, 3)))


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


LINES = (
    "file",
    "reconstruction",
    "backbone",
    "tensors",
    "sites",
    "outputs",
    "recorded outputs",
    "metric",
)


def outcomes(report: resadapt.types.VerificationReport) -> dict[str, str]:
    return {check.name: check.outcome for check in report.checks}


def two_sets() -> Any:
    model = resadapt.inject_adapters(net(), "conv", 2, name="b", head="fc", norm="stats")
    return resadapt.inject_adapters(model, "conv", 2, name="a", head="fc", norm="stats")
