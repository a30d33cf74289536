"""Tools that count operations: which see an injected model, and which need a copy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from roundtrip import small_backbone, with_strong_adapters
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import resadapt

X = torch.randn(1, 3, 64, 64)


def by_torch(model: nn.Module) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(X)
    return counter.get_total_flops() / 2


def by_torchinfo(model: nn.Module) -> float:
    torchinfo = pytest.importorskip("torchinfo")
    return float(torchinfo.summary(model, input_data=X, verbose=0).total_mult_adds)


def by_ptflops(model: nn.Module) -> float:
    ptflops = pytest.importorskip("ptflops")
    count, _ = ptflops.get_model_complexity_info(
        model, (3, 64, 64), as_strings=False, print_per_layer_stat=False, backend="pytorch"
    )
    return float(count)


def by_thop(model: nn.Module) -> float:
    thop = pytest.importorskip("thop")
    count, _ = thop.profile(model, (X,), verbose=False)
    return float(count)


BY_TYPE = [by_torchinfo, by_ptflops, by_thop]


def by_hand() -> int:
    """Multiply-adds of a ResNet-18 with LoRA of rank 8 at the 3x3 convolutions of its stages."""
    total, width, size = 32 * 32 * 3 * 64 * 49, 64, 16  # the stem; then the pooling
    for wider in (64, 128, 256, 512):
        if wider > width:
            size //= 2
            total += size**2 * width * wider  # the shortcut
        for before in (width, wider, wider, wider):
            total += size**2 * (9 * before * wider + 8 * (9 * before + wider))
        width = wider
    return total + 512 * 3


@pytest.fixture
def model() -> Any:
    model = resadapt.inject_adapters(small_backbone(), "layer*.*.conv*", 8, family="lora")
    return with_strong_adapters(model)


@pytest.mark.parametrize("count", [by_torch, *BY_TYPE])
def test_a_copy_is_counted_right(count: Callable[[nn.Module], float], model: Any) -> None:
    assert count(resadapt.inference_copy(model)) == pytest.approx(by_hand(), rel=0.01)


def test_torch_counts_the_injected_model_right(model: Any) -> None:
    assert by_torch(model) == pytest.approx(by_hand(), rel=0.001)
    assert by_torch(resadapt.optimize_backbone(model)) == pytest.approx(by_hand(), rel=0.001)


@pytest.mark.parametrize("count", BY_TYPE)
def test_counters_that_know_layers_by_type_do_not(
    count: Callable[[nn.Module], float], model: Any
) -> None:
    """If one is right now, docs/sets.md need not warn of it any more."""
    assert count(copy.deepcopy(model)) < 0.95 * by_hand()
    assert count(resadapt.optimize_backbone(copy.deepcopy(model))) < 0.2 * by_hand()


def test_buffers_that_a_counter_leaves_behind_are_told(model: Any, path: Path) -> None:
    by_thop(model)
    with pytest.raises(
        resadapt.AdapterKeyError,
        match=r"added to the adapters of set 'default' after .*'adapters\.layer1\.0\.conv1\."
        r"total_ops'.*Delete them from every module.*count on resadapt\.inference_copy\(model\)",
    ):
        resadapt.save_adapters(model, path)
    assert not path.exists()
    for module in model.modules():
        for name in ("total_ops", "total_params"):
            module._buffers.pop(name, None)
    assert resadapt.save_adapters(model, path, rebuild=small_backbone).ok


def test_a_counted_copy_leaves_the_model_alone(model: Any, path: Path) -> None:
    by_thop(resadapt.inference_copy(model))
    assert resadapt.save_adapters(model, path, rebuild=small_backbone).ok
