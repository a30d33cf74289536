"""torchao's quantization, before and after the injection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import images, small_resnet
from torch import nn

import resadapt

quantization = pytest.importorskip("torchao.quantization")


def injected(**options: Any) -> nn.Module:
    return resadapt.inject_adapters(small_resnet(), "layer4", 8, **options).eval()


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize(
    ("only", "wrapped"),
    [
        ("", "'adapters.layer4.down.weight' is Int8Tensor"),
        ("fc.resadapt", "'head.fc.weight' is Int8Tensor"),
    ],
)
def test_a_quantized_set_is_told(only: str, wrapped: str, suffix: str, tmp_path: Path) -> None:
    model = injected(head="fc")
    quantization.quantize_(
        model,
        quantization.Int8WeightOnlyConfig(),
        filter_fn=lambda module, name: isinstance(module, nn.Linear) and name.startswith(only),
    )
    with pytest.raises(resadapt.AdapterKeyError, match="torchao's quantize_ takes every") as error:
        resadapt.save_adapters(model, tmp_path / f"adapters.{suffix}")
    assert wrapped in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_the_mends_that_the_message_names(tmp_path: Path) -> None:
    model, path = injected(head="fc"), tmp_path / "adapters.pt"
    assert resadapt.save_adapters(model, path).ok  # before quantizing
    before = resadapt.adapter_state_dict(model)
    quantization.quantize_(
        model,
        quantization.Int8WeightOnlyConfig(),
        filter_fn=lambda module, name: (
            isinstance(module, torch.nn.Linear) and "resadapt" not in name.split(".")
        ),
    )
    after = resadapt.adapter_state_dict(model)
    assert all(torch.equal(after[key], before[key]) for key in before)
    with pytest.raises(resadapt.BackboneDriftError, match=r"'fc\.weight' has other values"):
        resadapt.save_adapters(model, path)
    resadapt.accept_backbone(model)
    assert resadapt.save_adapters(model, path).ok


@pytest.mark.parametrize("head", [(), {"fc": nn.Linear(512, 4)}])
def test_adapters_on_a_quantized_backbone(head: Any, tmp_path: Path) -> None:
    def backbone() -> nn.Module:
        model = small_resnet()
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        return model

    model = resadapt.inject_adapters(backbone(), "layer4", 8, head=head)
    model.train()(images()).sum().backward()
    assert all(p.grad is not None for p in resadapt.trainable_parameters(model))
    report = resadapt.save_adapters(model.eval(), tmp_path / "a.pt", rebuild=backbone)
    assert report["outputs"].outcome == "passed"


def test_a_quantized_head_is_refused_before_the_training() -> None:
    model = small_resnet()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    with pytest.raises(resadapt.InjectionError, match=r"head: 'fc\.weight' is Int8Tensor"):
        resadapt.inject_adapters(model, "layer4", 8, head="fc")
