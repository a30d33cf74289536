"""The parallel adapter against plain loops, and in the centre of kernels of every geometry."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from geometries import (
    adapters_of,
    assert_folded,
    assert_model_folds,
    assert_same_gradients,
    assert_starts_as_nothing,
    assert_survives,
    injected,
    layers,
    site_of,
    slow,
    strengthened,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from support import images, small_net, small_resnet
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchvision.models import resnet18, resnet50, resnext50_32x4d
from torchvision.models.segmentation import deeplabv3_resnet50
from torchvision.models.video import r3d_18

import resadapt
from resadapt.adapters import ParallelAdapter, Site
from resadapt.injection.own_dtype import apply


def centre(layer: Any) -> tuple[int, ...]:
    return tuple((k - 1) // 2 for k in layer.kernel_size)


@settings(max_examples=40, deadline=None)
@given(case=layers(most_dims=2))
def test_against_loops(case: tuple[Any, Tensor]) -> None:
    layer, x = case
    adapter = strengthened(ParallelAdapter(site_of(layer)).double())
    output = layer(x).detach()
    x.requires_grad_()
    weight = torch.zeros_like(layer.weight)
    weight[(slice(None), slice(None), *centre(layer))] = adapter.alpha.weight.flatten(1)
    assert weight.requires_grad
    theirs = output + slow(x, weight, layer, output.shape[2:], taps=[centre(layer)])
    assert_same_gradients(adapter(output, x), theirs, [x, *adapter.parameters()])


@settings(max_examples=100, deadline=None)
@given(case=layers(), single=st.booleans())
def test_bypass_equals_folded(case: tuple[Any, Tensor], single: bool) -> None:
    layer, x = case
    adapter = strengthened(ParallelAdapter(site_of(layer)).double())
    assert_folded(adapter, layer, x, 1e-12)
    if single:
        assert_folded(adapter.float(), layer.float(), x.float(), 1e-5)


@pytest.mark.parametrize("size", [[9, 11], [10, 12], [9, 12]])
@pytest.mark.parametrize("kernel", [2, 3, 5])
def test_a_transposed_convolution_that_is_told_its_output_size(
    size: list[int], kernel: int
) -> None:
    layer = nn.ConvTranspose2d(4, 6, kernel, stride=2, padding=(kernel - 1) // 2, groups=2)
    x = torch.randn(2, 4, 5, 6)
    least = layer(x).shape[2:]
    size = [each + more - first for each, more, first in zip(least, size, (9, 11), strict=True)]
    assert_folded(strengthened(ParallelAdapter(site_of(layer))), layer, x, 1e-5, size)


def test_only_the_centre_changes() -> None:
    layer = nn.Conv2d(2, 3, (3, 4))
    adapter = strengthened(ParallelAdapter(site_of(layer)))
    change = adapter.folded(layer)[0] - layer.weight
    assert torch.allclose(change[:, :, 1, 1], adapter.alpha.weight[:, :, 0, 0], atol=1e-6)
    change[:, :, 1, 1] = 0
    assert not change.any()


def test_channels_last_is_kept() -> None:
    layer = nn.Conv2d(8, 8, 3, padding=2, padding_mode="reflect").to(
        memory_format=torch.channels_last
    )
    x = torch.randn(2, 8, 5, 5).contiguous(memory_format=torch.channels_last)
    adapter = strengthened(ParallelAdapter(site_of(layer))).to(memory_format=torch.channels_last)
    assert_folded(adapter, layer, x, 1e-5)
    assert adapter(layer(x), x).is_contiguous(memory_format=torch.channels_last)


def test_parameters_by_hand() -> None:
    def count(model: nn.Module, layers: Any) -> int:
        resadapt.inject_adapters(model, layers, family="parallel")
        return resadapt.count_parameters(model).adapters

    # resnet18: both convolutions of two blocks; the first of a stage comes from half as many
    # channels.
    by_hand = 4 * 64 * 64 + sum(w // 2 * w + 3 * w * w for w in (128, 256, 512))
    assert count(resnet18(), "layer*.*.conv[12]") == by_hand == 1_220_608
    # resnet50: conv2 of 3, 4, 6, 3 bottlenecks.
    by_hand = 3 * 64**2 + 4 * 128**2 + 6 * 256**2 + 3 * 512**2
    assert count(resnet50(), "layer*.*.conv2") == by_hand == 1_257_472
    grouped = ParallelAdapter(site_of(nn.Conv2d(8, 12, 3, groups=4)))
    assert sum(p.numel() for p in grouped.parameters()) == 8 * 12 // 4


def test_it_starts_as_nothing() -> None:
    assert_starts_as_nothing(small_resnet(), images(), ["conv1", "layer*.*.conv*"], "parallel")


def test_the_authors_start() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 128, 3)
    adapter = ParallelAdapter(site_of(layer), init="he")
    assert adapter.alpha.weight.std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.03)
    model = resadapt.inject_adapters(small_net(), "c2", family="parallel", init="he")
    with resadapt.adapters_disabled(model):
        plain = model(images())
    assert not torch.equal(model(images()), plain)
    with pytest.raises(ValueError, match="init='normal' is not known: use 'identity' or 'he'"):
        ParallelAdapter(site_of(layer), init="normal")


@pytest.mark.parametrize(
    ("build", "sites", "x", "pick"),
    [
        (resnext50_32x4d, "layer*.*.conv2", images(1, 32), lambda output: output),
        (r3d_18, "layer[12].*.conv*.0", torch.randn(1, 3, 4, 16, 16), lambda output: output),
        (
            lambda: deeplabv3_resnet50(weights=None, weights_backbone=None),
            ["backbone.layer[34].*.conv2", "classifier.0.convs.[123].0"],
            images(1, 64),
            lambda output: output["out"],
        ),
    ],
    ids=["grouped", "3-D", "dilated"],
)
def test_whole_models_fold(
    build: Callable[[], nn.Module], sites: Any, x: Tensor, pick: Callable[[Any], Tensor]
) -> None:
    torch.manual_seed(0)
    model = injected(build(), sites, "parallel")
    assert len(adapters_of(model)) >= 8
    assert_model_folds(model, x, pick)


@pytest.mark.parametrize(
    "module", [nn.Linear(3, 4), nn.BatchNorm2d(4), nn.Sequential(nn.Conv2d(3, 4, 3)), None]
)
def test_it_needs_a_convolution(module: Any) -> None:
    with pytest.raises(ValueError, match="it needs a convolution"):
        ParallelAdapter(Site(4, module=module))


def test_the_injector_names_the_sites_that_would_do() -> None:
    with pytest.raises(
        resadapt.InjectionError,
        match=r"cannot adapt site 'fc' \(Linear\): it needs a convolution. It can adapt 'conv1'",
    ):
        resadapt.inject_adapters(resnet18(), "fc", family="parallel")
    with pytest.raises(
        resadapt.InjectionError, match="ParallelAdapter has no hidden layer: remove bottleneck="
    ):
        resadapt.inject_adapters(resnet18(), "conv1", 8, family="parallel")


def test_a_bias_that_is_computed_is_not_folded() -> None:
    layer = parametrizations.weight_norm(nn.Conv2d(3, 4, 3), "bias", dim=None)
    adapter = strengthened(ParallelAdapter(site_of(layer)))
    with pytest.raises(
        ValueError, match="this ParametrizedConv2d computes its weight or bias from other tensors"
    ):
        adapter.folded(layer)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "reflect": lambda: nn.Conv2d(
        8, 8, (3, 2), stride=(2, 1), padding=(2, 0), padding_mode="reflect", groups=2
    ),
    "transposed": lambda: nn.ConvTranspose2d(
        8, 8, 3, stride=2, padding=2, output_padding=1, groups=2
    ),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_it_survives(layer: str, tmp_path: Path) -> None:
    assert_survives(LAYERS[layer], tmp_path / "adapters.pt", family="parallel")


@pytest.mark.parametrize("layer", LAYERS)
def test_the_adapter_can_be_scripted(layer: str) -> None:
    module = LAYERS[layer]()
    adapter = strengthened(ParallelAdapter(site_of(module)))
    x = torch.randn(1, 8, 5, 5)
    torch.testing.assert_close(
        torch.jit.script(adapter)(module(x), x), apply(adapter, module, (x,), module(x))
    )


def test_a_stem_of_few_channels_in_channels_last_leaves_memory_alone() -> None:
    """The gradient of such a convolution with a stride writes outside tensors in torch 2.14."""
    script = """
import torch
torch.set_num_threads(1)
from torchvision.models import resnet18
from resadapt import inject_adapters
model = inject_adapters(resnet18(), "conv1", family="parallel")
model = model.to(memory_format=torch.channels_last).conv1
x = torch.randn(70, 3, 16, 16).to(memory_format=torch.channels_last)
for _ in range(200):
    y = model(x)
    y.backward(torch.randn_like(y))
    others = [torch.randn(1000) for _ in range(20)]
print("alive")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stdout == "alive\n", (done.returncode, done.stderr)
