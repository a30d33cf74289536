"""LoRA and DoRA against plain loops, and folded into layers of every geometry."""

from __future__ import annotations

import copy
import itertools
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
    pointwise,
    site_of,
    slow,
    strengthened,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from support import images, small_net, small_resnet, train
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchvision.models import resnet18, resnet50, resnext50_32x4d
from torchvision.models.segmentation import deeplabv3_resnet50
from torchvision.models.video import r3d_18

import resadapt
from resadapt.adapters import LoraAdapter, Site
from resadapt.adapters.convolutions import rows, weight_from
from resadapt.injection.own_dtype import apply


def slow_change(adapter: Any, layer: Any) -> Tensor:
    """The change of a weight, number by number."""
    if isinstance(layer, nn.Linear):
        return torch.stack(
            [
                torch.stack(
                    [
                        sum((b * a for b, a in zip(row, column, strict=True)), torch.zeros(()))
                        for column in adapter.down.weight.T
                    ]
                )
                for row in adapter.up.weight
            ]
        )
    down, up, groups = adapter.down.weight, adapter.up.weight, layer.groups
    inner, outer = layer.in_channels // groups, layer.out_channels // groups
    rank = up.shape[1]
    values = torch.zeros(layer.weight.shape, dtype=down.dtype)
    entries = {}
    for group, c, o in itertools.product(range(groups), range(inner), range(outer)):
        first, second = group * inner + c, group * outer + o
        kernel: Any = 0.0
        for j in range(rank):
            tap_weights = down[first, j] if layer.transposed else down[group * rank + j, c]
            kernel = kernel + up[second, j].reshape(()) * tap_weights
        entries[(first, o) if layer.transposed else (second, c)] = kernel
    return torch.stack(
        [entries[index] for index in itertools.product(*map(range, values.shape[:2]))]
    ).reshape(values.shape)


def slow_norms(weight: Tensor, layer: Any) -> Tensor:
    """The norm of what each output channel is computed with."""
    norms = []
    for channel in range(layer.out_channels):
        if layer.transposed:
            outer, inner = layer.out_channels // layer.groups, layer.in_channels // layer.groups
            group = channel // outer
            part = weight[group * inner : (group + 1) * inner, channel % outer]
        else:
            part = weight[channel]
        norms.append(sum(number * number for number in part.detach().flatten().tolist()) ** 0.5)
    return torch.tensor(norms, dtype=weight.dtype)


@settings(max_examples=25, deadline=None)
@given(case=layers(most_dims=2, most_channels=2), rank=st.integers(1, 3), dora=st.booleans())
def test_against_loops(case: tuple[Any, Tensor], rank: int, dora: bool) -> None:
    layer, x = case
    adapter = strengthened(LoraAdapter(site_of(layer), rank, alpha=1.5, dora=dora).double())
    output = layer(x).detach()
    x.requires_grad_()
    ours = apply(adapter, layer, (x,), output)
    sizes, ones = output.shape[2:], [1] * (output.dim() - 2)
    if dora:
        bias = 0.0 if layer.bias is None else layer.bias.detach().reshape(-1, *ones)
        change = 1.5 / rank * slow_change(adapter, layer)
        factor = (slow_norms(layer.weight, layer) + adapter.magnitude) / slow_norms(
            layer.weight + change, layer
        )
        adapted = (output - bias) + slow(x, change, layer, sizes)
        theirs = bias + factor.reshape(-1, *ones) * adapted
    else:
        theirs = output + 1.5 / rank * pointwise(
            slow(x, adapter.down.weight, layer, sizes), adapter.up.weight, layer.groups
        )
    assert_same_gradients(ours, theirs, [x, *adapter.parameters()])


@pytest.mark.parametrize("shape", [(3, 5), (2, 4, 5)])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_against_loops(shape: tuple[int, ...], dora: bool, bias: bool) -> None:
    layer = nn.Linear(5, 4, bias=bias).double()
    adapter = strengthened(LoraAdapter(site_of(layer), 2, alpha=3.0, dora=dora).double())
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    output = layer(x).detach()
    change = 1.5 * slow_change(adapter, layer)
    factor: Any = 1.0
    if dora:
        norms = [
            [sum(v * v for v in row) ** 0.5 for row in weight.tolist()]
            for weight in (layer.weight, layer.weight + change)
        ]
        before, after = torch.tensor(norms, dtype=torch.float64)
        factor = (before + adapter.magnitude) / after
    start = layer.bias.detach() if bias else 0.0
    assert_same_gradients(
        apply(adapter, layer, (x,), output),
        start + factor * ((output - start) + x @ change.T),
        [x, *adapter.parameters()],
    )
    assert_folded(adapter, layer, x, 1e-12)


@settings(max_examples=60, deadline=None)
@given(case=layers(), rank=st.integers(1, 5), dora=st.booleans(), single=st.booleans())
def test_bypass_equals_folded(
    case: tuple[Any, Tensor], rank: int, dora: bool, single: bool
) -> None:
    layer, x = case
    adapter = strengthened(LoraAdapter(site_of(layer), rank, alpha=2.0, dora=dora).double())
    assert_folded(adapter, layer, x, 1e-11)
    if single:
        assert_folded(adapter.float(), layer.float(), x.float(), 1e-4)


@pytest.mark.parametrize("dora", [False, True])
def test_a_transposed_convolution_that_is_told_its_output_size(dora: bool) -> None:
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2)
    adapter = strengthened(LoraAdapter(site_of(layer), 3, dora=dora))
    x = torch.randn(2, 4, 5, 6)
    for size in ([9, 11], [10, 12], [9, 12]):
        assert layer(x, size).shape[2:] == torch.Size(size)
        assert_folded(adapter, layer, x, 1e-5, size)


@settings(max_examples=25, deadline=None)
@given(case=layers())
def test_rows_are_put_back_where_they_were(case: tuple[Any, Tensor]) -> None:
    layer, _ = case
    each = rows(layer.weight, layer.groups, layer.transposed)
    assert each.shape[0] == layer.out_channels
    assert torch.equal(
        weight_from(each, layer.weight, layer.groups, layer.transposed), layer.weight
    )
    torch.testing.assert_close(each.norm(dim=1), slow_norms(layer.weight, layer))


def test_channels_last_is_kept() -> None:
    layer = nn.Conv2d(8, 8, 3, padding=1)
    x = torch.randn(2, 8, 5, 5).contiguous(memory_format=torch.channels_last)
    adapter = strengthened(LoraAdapter(site_of(layer), 2, dora=True))
    assert_folded(
        adapter.to(memory_format=torch.channels_last),
        layer.to(memory_format=torch.channels_last),
        x,
        1e-5,
    )
    assert apply(adapter, layer, (x,), layer(x)).is_contiguous(memory_format=torch.channels_last)


def test_parameters_by_hand() -> None:
    def count(model: nn.Module, layers: Any, **options: Any) -> int:
        resadapt.inject_adapters(model, layers, 8, family="lora", **options)
        return resadapt.count_parameters(model).adapters

    # conv2 of a bottleneck: 3x3 from w to w channels, in 3, 4, 6, 3 blocks of widths 64, 128, 256,
    # 512.
    by_hand = sum(blocks * 8 * (9 * w + w) for blocks, w in ((3, 64), (4, 128), (6, 256), (3, 512)))
    assert count(resnet50(), "layer*.*.conv2") == by_hand == 302_080
    # resnet18: both 3x3 of 2 blocks; the first of a stage may come from half as many channels.
    by_hand = 8 * (4 * (576 + 64) + sum(9 * w // 2 + w + 3 * (9 * w + w) for w in (128, 256, 512)))
    assert count(resnet18(), "layer*.*.conv[12]") == by_hand == 274_944
    assert count(resnet18(), "layer*.*.conv[12]", dora=True) == by_hand + 4 * (64 + 128 + 256 + 512)
    # Depthwise: C (k^2 + 1) for each rank.
    assert sum(
        p.numel() for p in LoraAdapter(site_of(nn.Conv2d(6, 6, 3, groups=6)), 2).parameters()
    ) == 2 * (6 * 9 + 6)


@pytest.mark.parametrize(
    "options", [{}, {"dora": True}, {"init": "normal"}, {"dora": True, "init": "normal"}]
)
def test_it_starts_as_nothing(options: Any) -> None:
    assert_starts_as_nothing(
        small_resnet(), images(), ["conv1", "layer*.*.conv*", "fc"], "lora", bottleneck=4, **options
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dora_starts_as_nothing_in_every_dtype(dtype: torch.dtype) -> None:
    layer = nn.Conv2d(8, 6, 3, bias=True).to(dtype)
    x = torch.randn(2, 8, 5, 5, dtype=dtype)
    adapter = LoraAdapter(site_of(layer), 2, dora=True).to(dtype)
    assert torch.equal(apply(adapter, layer, (x,), layer(x)), layer(x))


def test_a_channel_of_zeros_does_not_harm_dora() -> None:
    layer = nn.Conv2d(4, 3, 3)
    with torch.no_grad():
        layer.weight[1] = 0
    x = torch.randn(1, 4, 5, 5)
    adapter = LoraAdapter(site_of(layer), 2, dora=True)
    output = apply(adapter, layer, (x,), layer(x))
    assert torch.equal(output, layer(x))
    output.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in adapter.parameters())


def test_starts() -> None:
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(32, 64, 3, groups=2)
    uniform = LoraAdapter(site_of(layer), 16)
    bound = (16 * 9) ** -0.5
    assert bound * 0.99 < uniform.down.weight.abs().max() <= bound
    normal = LoraAdapter(site_of(layer), 16, init="normal")
    assert normal.down.weight.std().item() == pytest.approx(1 / 16, rel=0.05)
    assert not uniform.up.weight.any()
    assert not normal.up.weight.any()
    with pytest.raises(ValueError, match="init='he' is not known"):
        LoraAdapter(site_of(layer), 16, init="he")


def test_alpha_and_dropout() -> None:
    layer, x = nn.Conv2d(4, 4, 1), torch.randn(1, 4, 3, 3)
    torch.manual_seed(0)
    plain = strengthened(LoraAdapter(site_of(layer), 2))
    scaled = LoraAdapter(site_of(layer), 2, alpha=6.0, dropout=0.5)
    scaled.load_state_dict(plain.state_dict())
    zeros = torch.zeros(1, 4, 3, 3)
    torch.testing.assert_close(scaled.eval()(zeros, x), 3 * plain(zeros, x))
    scaled.train()
    torch.manual_seed(1)
    got = scaled(zeros, x)
    torch.manual_seed(1)
    torch.testing.assert_close(got, 3 * plain(zeros, nn.functional.dropout(x, 0.5)))
    model = resadapt.inject_adapters(small_net(), "c2", 2, family="lora")
    assert model.c2.resadapt.default.dropout.p == 0.0


# Geometries that other implementations get wrong (tests/clients/test_peft.py shows it of PEFT).


@pytest.mark.parametrize("dora", [False, True])
def test_dilation_is_kept_in_deeplabv3(dora: bool) -> None:
    torch.manual_seed(0)
    model = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=3).eval()
    sites = ["backbone.layer4.*.conv2", "classifier.0.convs.[123].0"]
    injected(model, sites, "lora", bottleneck=2, dora=dora)
    assert {adapter.down.dilation for adapter in adapters_of(model).values()} == {
        (2, 2),
        (4, 4),
        (12, 12),
        (24, 24),
        (36, 36),
    }
    assert_model_folds(model, images(1, 64), lambda output: output["out"])


@pytest.mark.parametrize("dora", [False, True])
def test_convolutions_of_a_class_of_their_own_in_r3d_18(dora: bool) -> None:
    torch.manual_seed(0)
    model = injected(r3d_18(num_classes=3), "layer[12].*.conv*.0", "lora", bottleneck=2, dora=dora)
    assert type(model.layer1[0].conv1[0]).__name__ == "Conv3DSimple"
    assert {type(adapter.down) for adapter in adapters_of(model).values()} == {nn.Conv3d}
    assert_model_folds(model, torch.randn(1, 3, 4, 16, 16))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_the_padding_mode_is_kept(mode: str) -> None:
    layer = nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode)
    adapter = strengthened(LoraAdapter(site_of(layer), 2))
    x = torch.randn(1, 4, 5, 5)
    assert adapter.down.padding_mode == mode
    assert_folded(adapter, layer, x, 1e-5)
    zeros = torch.zeros(1, 4, 5, 5)
    with_mode = adapter(zeros, x)
    adapter.down.padding_mode = "zeros"
    assert not torch.allclose(adapter(zeros, x)[..., 0, :], with_mode[..., 0, :], atol=1e-2)


def test_groups_are_folded_at_a_rank_that_they_do_not_divide() -> None:
    torch.manual_seed(0)
    model = injected(
        resnext50_32x4d(num_classes=3), "layer*.*.conv2", "lora", bottleneck=3, dora=False
    )
    assert model.layer1[0].conv2.groups == 32
    assert_model_folds(model, images(1, 32))


def test_transposed_convolutions_are_folded() -> None:
    for dims, kind in ((1, nn.ConvTranspose1d), (2, nn.ConvTranspose2d), (3, nn.ConvTranspose3d)):
        layer = kind(4, 6, 4, stride=3, padding=1, output_padding=2, groups=2, dilation=2)
        for dora in (False, True):
            assert_folded(
                strengthened(LoraAdapter(site_of(layer), 3, dora=dora)),
                layer,
                torch.randn(1, 4, *[3] * dims),
                1e-5,
            )


# Refusals.


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flip(1))


def patched() -> nn.Module:
    layer = nn.Conv2d(3, 4, 3)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.BatchNorm2d(4), "it needs a convolution or a Linear"),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), "it needs a convolution or a Linear"),
        (None, "it needs a convolution or a Linear"),
        (torch.ao.nn.quantized.Conv2d(3, 4, 3), "it needs a convolution or a Linear"),
        (
            OwnLinear(3, 4),
            "a Linear with the forward of torch.nn, and this layer overrides forward",
        ),
        (patched(), "its own forward reads other positions of its input"),
        (nn.LazyConv2d(4, 3), "its weight has no shape yet"),
    ],
)
def test_refusals(module: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraAdapter(Site(4, module=module), 2)


def test_the_injector_names_the_sites_that_would_do() -> None:
    for site in ("layer1", "bn1"):
        with pytest.raises(
            resadapt.InjectionError,
            match=rf"'lora' cannot adapt site '{site}'.*It can adapt 'conv1', 'layer1\.0",
        ):
            resadapt.inject_adapters(resnet18(), site, 4, family="lora")


def test_a_weight_that_is_computed_is_adapted_but_not_folded() -> None:
    for change in (parametrizations.weight_norm, nn.utils.spectral_norm):
        layer = change(nn.Conv2d(3, 4, 3)).eval()
        adapter = strengthened(LoraAdapter(site_of(layer), 2, dora=True))
        x = torch.randn(1, 3, 5, 5)
        layer(x)
        plain = nn.Conv2d(3, 4, 3)
        with torch.no_grad():
            plain.weight.copy_(layer.weight)
            plain.bias.copy_(layer.bias)
        torch.testing.assert_close(
            apply(adapter, layer, (x,), layer(x)), apply(adapter, plain, (x,), plain(x))
        )
        with pytest.raises(ValueError, match="computes its weight or bias from other tensors"):
            adapter.folded(layer)


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(input=x)


@pytest.mark.parametrize("dora", [False, True])
def test_an_input_by_keyword_is_refused_by_name(dora: bool) -> None:
    model = resadapt.inject_adapters(ByKeyword(), "conv", 2, family="lora", dora=dora)
    with pytest.raises(
        resadapt.InjectionError, match=r"Site 'conv' was called with keyword arguments only"
    ):
        model(images())


# Survival.

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "reflect": lambda: nn.Conv2d(
        8, 8, (3, 2), stride=(2, 1), padding=(0, 1), padding_mode="reflect", groups=2
    ),
    "transposed": lambda: nn.ConvTranspose2d(8, 8, 3, stride=2, output_padding=1, groups=2),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dora", [False, True])
def test_it_survives(layer: str, dora: bool, tmp_path: Path) -> None:
    assert_survives(
        LAYERS[layer], tmp_path / "adapters.pt", family="lora", bottleneck=3, dora=dora, alpha=4.0
    )


def test_the_adapter_of_a_transposed_convolution_can_be_scripted() -> None:
    layer = nn.ConvTranspose2d(4, 4, 3, stride=2)
    adapter = strengthened(LoraAdapter(site_of(layer), 2, dora=True))
    x = torch.randn(1, 4, 3, 3)
    args = (layer(x), x, layer.weight, layer.bias)
    torch.testing.assert_close(torch.jit.script(adapter)(*args), adapter(*args))


def test_dora_needs_the_weight() -> None:
    """Without the weight the result would be that of LoRA."""
    layer, x = nn.Conv2d(4, 4, 3), torch.randn(1, 4, 3, 3)
    adapter = LoraAdapter(site_of(layer), 2, dora=True)
    with pytest.raises(TypeError, match=r"call adapter\(output, x, weight, bias\)"):
        adapter(layer(x), x)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        adapter(layer(x))


def test_the_frozen_weight_stays_and_the_adapters_learn() -> None:
    model = resadapt.inject_adapters(small_resnet(), "layer*.*.conv2", 4, family="lora", dora=True)
    before = {
        name: copy.deepcopy(adapter.state_dict()) for name, adapter in adapters_of(model).items()
    }
    train(model, torch.optim.AdamW(model.parameters(), lr=0.01), steps=3)
    assert resadapt.check_backbone(model).ok
    for name, adapter in adapters_of(model).items():
        assert not any(
            torch.equal(tensor, before[name][key]) for key, tensor in adapter.state_dict().items()
        )
