"""transformers: BiT, whose convolutions standardize their weight and pad as TensorFlow does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from roundtrip import save_and_reload, seeded, small_images, three_steps
from torch import nn

import resadapt

transformers = pytest.importorskip("transformers")

X = small_images()


class Logits(nn.Module):
    """A model as the trainer of another library calls it: one tensor in, one out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> Any:
        return self.model(x).logits


@seeded
def bit() -> nn.Module:
    config = transformers.BitConfig(
        hidden_sizes=[32, 64, 96, 128],
        depths=[1, 1, 1, 1],
        embedding_size=32,
        num_groups=8,
        global_padding="SAME",
        num_labels=3,
    )
    return Logits(transformers.BitForImageClassification(config))


@pytest.mark.parametrize("family", ["lora", "parallel", "conv"])
def test_every_convolution_of_bit(family: str, path: Path) -> None:
    sites = "model.bit.encoder.stages.*.layers.0.conv*"
    sizes = {} if family == "parallel" else {"bottleneck": 8}
    model = resadapt.inject_adapters(bit(), sites, family=family, **sizes)
    names = [site.name for site in resadapt.list_adapters(model)[0].sites]
    kinds = {type(model.get_submodule(name)).__name__ for name in names}
    assert kinds == {"WeightStandardizedConv2d"}
    with torch.no_grad():
        assert torch.equal(model.eval()(X), bit().eval()(X))
    three_steps(model, X)
    save_and_reload(model, bit, path, X)
    with torch.no_grad():
        assert torch.equal(resadapt.inference_copy(model)(X), model.eval()(X))
    with pytest.raises(resadapt.AdapterError, match=r"WeightStandardizedConv2d\): "):
        resadapt.fold_adapters(model)
