"""Fixtures of the tests of proofs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.utils.prune
from support import train
from torch import nn
from verifying import net

import resadapt


@pytest.fixture
def model() -> nn.Module:
    model = resadapt.inject_adapters(net(), "bn", 2, head="fc")
    train(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    return model
