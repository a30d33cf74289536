"""Folded equals bypass: tensors that a linear family changed give what its adapter gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import assert_folds, images, scramble, small_resnet
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.video.resnet import Conv3DSimple
from torchvision.ops import FrozenBatchNorm2d

import resadapt
from resadapt.adapters import FAMILIES, Adapter, Site
from resadapt.adapters.family import takes

# Layers by name, and the shape of an input.
CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1-D": (lambda: nn.Conv1d(3, 4, 3), (2, 3, 7)),
    "2-D": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1), (2, 3, 7, 5)),
    "2-D, dilated, asymmetric": (
        lambda: nn.Conv2d(3, 4, (3, 2), dilation=2, padding=(2, 1)),
        (2, 3, 7, 5),
    ),
    "2-D, reflected": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 7, 5)),
    "3-D": (lambda: nn.Conv3d(3, 4, 3, padding=1), (2, 3, 3, 5, 4)),
    "transposed, 1-D": (lambda: nn.ConvTranspose1d(3, 4, 3, stride=2), (2, 3, 5)),
    "transposed, 2-D": (
        lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, output_padding=1, dilation=2),
        (2, 3, 5, 4),
    ),
    "transposed, 3-D": (lambda: nn.ConvTranspose3d(3, 4, 2, stride=2), (2, 3, 2, 3, 2)),
}
LINEARS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "vectors": (lambda: nn.Linear(3, 4), (5, 3)),
    "tokens": (lambda: nn.Linear(3, 4), (2, 6, 3)),
    "channels last": (lambda: nn.Linear(3, 4), (2, 5, 6, 3)),
}
GROUPED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 5, 5)),
    "transposed, groups": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2), (2, 4, 5, 5)),
}
WITHOUT_BIAS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "2-D, no bias": (lambda: nn.Conv2d(3, 4, 3, bias=False), (2, 3, 7, 5)),
    "3-D, no bias, Conv3DSimple": (lambda: Conv3DSimple(3, 4), (2, 3, 3, 5, 4)),
    "transposed, no bias": (lambda: nn.ConvTranspose2d(3, 4, 3, bias=False), (2, 3, 5, 4)),
    "Linear, no bias": (lambda: nn.Linear(3, 4, bias=False), (5, 3)),
}
NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), (3, 4)),
    "BatchNorm1d, sequences": (lambda: nn.BatchNorm1d(4), (3, 4, 5)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), (3, 4, 5, 3)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(4), (3, 4, 2, 3, 3)),
    "FrozenBatchNorm2d": (lambda: FrozenBatchNorm2d(4), (3, 4, 5, 3)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(4, affine=True), (3, 4, 5, 3)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (3, 4, 5, 3)),
    "LayerNorm": (lambda: nn.LayerNorm(4), (3, 5, 4)),
    "LayerNorm, vectors": (lambda: nn.LayerNorm(4), (3, 4)),
    "LayerNorm2d": (lambda: LayerNorm2d(4), (3, 4, 5, 3)),
}
LAYERS = {**CONVOLUTIONS, **LINEARS, **GROUPED, **WITHOUT_BIAS, **NORMS}

# A linear family joins by a line: its name, its options and the layers that take it up.
FOLDABLE: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("series", {}, {**CONVOLUTIONS, **LINEARS, **WITHOUT_BIAS}),
    ("series", {"batch_norm": True}, {**CONVOLUTIONS, **LINEARS}),
    ("ssf", {}, {**CONVOLUTIONS, **LINEARS, **GROUPED, **NORMS}),
]


def adapter_at(module: nn.Module, x: Tensor, family: str, **options: Any) -> Adapter:
    """An adapter with values that matter, as injection builds it for a module."""
    with torch.no_grad():
        shape = module(x).shape
    last = isinstance(module, nn.Linear | nn.LayerNorm | nn.RMSNorm) and not isinstance(
        module, LayerNorm2d
    )
    dim = -1 if last and len(shape) > 2 else 1
    sizes = {"bottleneck": 2} if takes(FAMILIES[family], "bottleneck") else {}
    site = Site(shape[dim], len(shape) - 2, dim, module)
    return scramble(FAMILIES[family](site, **sizes, **options).to(x.dtype), seed=1)


def layer(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    make, shape = LAYERS[name]
    return scramble(make().to(dtype)).eval(), torch.randn(
        shape, generator=torch.Generator().manual_seed(2), dtype=dtype
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("family", "options", "name"), [(f, o, name) for f, o, names in FOLDABLE for name in names]
)
def test_bypass_equals_folded(
    family: str, options: dict[str, Any], name: str, dtype: torch.dtype
) -> None:
    module, x = layer(name, dtype)
    assert_folds(adapter_at(module, x, family, **options), module, x)


@pytest.mark.parametrize("name", [*WITHOUT_BIAS, "RMSNorm"])
def test_ssf_without_a_bias_needs_no_shift(name: str) -> None:
    module, x = (
        layer(name)
        if name in LAYERS
        else (scramble(nn.RMSNorm(4).double()), torch.randn(3, 5, 4).double())
    )
    adapter = adapter_at(module, x, "ssf")
    kind = type(module).__name__
    with pytest.raises(
        ValueError,
        match=f"{kind} has no bias for beta: choose the norm after it as the site",
    ):
        adapter.folded(module)
    nn.init.zeros_(adapter.beta)
    assert adapter.folded(module)[1] is None
    assert_folds(adapter, module, x)


def test_a_fold_in_two_dtypes_keeps_the_layers_own() -> None:
    for family in ("series", "ssf"):
        module, x = layer("2-D", torch.float32)
        weight, bias = adapter_at(module, x, family).double().folded(module)
        assert weight.dtype == bias.dtype == torch.float32


class OwnForward(nn.BatchNorm2d):
    """As the norms with an activation of timm."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


@pytest.mark.parametrize(
    ("family", "make", "reason"),
    [
        (
            "series",
            lambda: nn.Conv2d(4, 4, 1, groups=2),
            "Conv2d with 2 groups computes an output channel from the inputs of its",
        ),
        ("series", lambda: nn.ConvTranspose2d(4, 4, 1, groups=4), "ConvTranspose2d with 4 groups"),
        (
            "series",
            lambda: nn.BatchNorm2d(4),
            "BatchNorm2d scales each channel by itself, and alpha mixes channels",
        ),
        (
            "series",
            lambda: nn.Sequential(nn.Conv2d(4, 4, 1)),
            "Sequential is not a convolution, Linear or norm of torch",
        ),
        ("ssf", lambda: nn.ReLU(), "ReLU is not a convolution"),
        ("ssf", lambda: nn.PReLU(4), "PReLU is not a convolution"),
        ("ssf", lambda: OwnForward(4), "OwnForward is not a convolution"),
        ("ssf", lambda: nn.BatchNorm2d(4, affine=False), "BatchNorm2d has no weight"),
        ("ssf", lambda: nn.InstanceNorm2d(4), "InstanceNorm2d has no weight"),
        (
            "ssf",
            lambda: weight_norm(nn.Conv2d(4, 4, 1)),
            "ParametrizedConv2d has no weight",
        ),
        (
            "ssf",
            lambda: nn.Conv2d(4, 6, 1),
            "the channels of Conv2d are not the channels that the adapter reads",
        ),
        (
            "ssf",
            lambda: nn.Linear(4, 4),
            "the channels of Linear are not the channels that the adapter reads",
        ),
        (
            "ssf",
            lambda: nn.LayerNorm([4, 3]),
            "the channels of LayerNorm are not the channels that the adapter reads",
        ),
    ],
)
def test_layers_that_cannot_take_it_up(
    family: str, make: Callable[[], nn.Module], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        FAMILIES[family](Site(4)).folded(make())


def test_a_norm_over_positions_too() -> None:
    with pytest.raises(ValueError, match="LayerNorm has a weight for every position"):
        FAMILIES["ssf"](Site(4, 1, -1)).folded(nn.LayerNorm([4, 3]))


def test_the_shift_of_a_series_adapters_norm_needs_a_bias() -> None:
    module, x = layer("2-D, no bias")
    adapter = adapter_at(module, x, "series", batch_norm=True)
    with pytest.raises(ValueError, match="Conv2d has no bias for the shift of the adapter's norm"):
        adapter.folded(module)
    nn.init.zeros_(adapter.norm.running_mean)
    nn.init.zeros_(adapter.norm.bias)
    assert_folds(adapter, module, x)


def test_families_that_are_not_linear_say_so() -> None:
    for family in ("pooled", "bottleneck", "mona"):
        with pytest.raises(ValueError, match="it is not linear"):
            FAMILIES[family](Site(4), 2).folded(nn.Conv2d(4, 4, 1))


@pytest.mark.parametrize(
    ("family", "site"), [("series", "layer2.0.conv2"), ("ssf", "layer2.0.bn2"), ("ssf", "fc")]
)
def test_in_a_resnet(family: str, site: str) -> None:
    plain = small_resnet().eval()
    model = resadapt.inject_adapters(copy.deepcopy(plain), site, family=family).eval()
    owner = model.get_submodule(site)
    scramble(owner.resadapt.default)
    weight, bias = owner.resadapt.default.folded(owner)
    untouched = plain(images())
    with torch.no_grad():
        layer = plain.get_submodule(site)
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    torch.testing.assert_close(plain(images()), model(images()), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain(images()), untouched, atol=1e-2)
