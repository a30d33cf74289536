"""A model with sets of every kind, for batches that mix them and inputs that run through all."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

import resadapt
from resadapt.injection.ledger import adapter_tensors, ledger_of
from resadapt.injection.private import private_tensors

SETS: dict[str, dict[str, Any]] = {
    "pooled": {"layers": ("layer2", "layer4"), "head": "fc", "dropout": 0.0},
    "norms": {"layers": (), "head": {"fc": nn.Linear(512, 3)}, "norm": "affine+stats"},
    "wide": {
        "layers": "layer4",
        "head": {"fc": nn.Linear(512, 7)},
        "norm": "affine",
        "dropout": 0.0,
    },
    "stage": {"layers": "layer1", "head": ("layer4", "fc"), "dropout": 0.0},
}


def mixed_model() -> Any:
    return copy.deepcopy(_mixed_model())


@lru_cache(maxsize=1)
def _mixed_model() -> Any:
    """Sets of every kind on one backbone, in float64, so that the rounding of other batch sizes is
    small.
    """
    torch.manual_seed(0)
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3).double()
    for name, arguments in SETS.items():
        resadapt.inject_adapters(model, name=name, bottleneck=4, **arguments)
        generator = torch.Generator().manual_seed(len(name))
        state = resadapt.adapter_state_dict(model, name)
        moved = {
            k: t + 0.1 * torch.rand(t.shape, generator=generator) if t.is_floating_point() else t
            for k, t in state.items()
        }
        resadapt.load_adapter_state_dict(
            model, {k: t.to(state[k].dtype) for k, t in moved.items()}, name
        )
    return model


def gradients_of(model: nn.Module, name: str) -> dict[str, Tensor | None]:
    record = ledger_of(model).sets[name]
    tensors = dict(adapter_tensors(model, record.spec)) | private_tensors(model, record.spec)
    return {key: tensor.grad for key, tensor in tensors.items()}
