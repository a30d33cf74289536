"""Conv-Adapter's four schemes against plain loops, at convolutions and blocks of every kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from geometries import (
    adapters_of,
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
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import images, small_resnet
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50
from torchvision.models.segmentation import deeplabv3_resnet50
from torchvision.models.video import mc3_18, r3d_18

import resadapt
from resadapt.adapters import ConvAdapter, Site
from resadapt.injection.own_dtype import apply

ACTIVATIONS = {"relu": torch.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu}


def slow_adapter(
    adapter: Any, h: Tensor, output: Tensor, geometry: Any, width: int, activation: str
) -> Tensor:
    hidden = ACTIVATIONS[activation](
        slow(h, adapter.down.weight, geometry, output.shape[2:], groups=width)
    )
    return output + adapter.scale * pointwise(hidden, adapter.up.weight)


@settings(max_examples=40, deadline=None)
@given(
    case=layers(most_dims=2),
    data=st.data(),
    sequential=st.booleans(),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
)
def test_at_convolutions_against_loops(
    case: tuple[Any, Tensor], data: Any, sequential: bool, activation: str
) -> None:
    layer, x = case
    output = layer(x).detach()
    channels = layer.out_channels if sequential else layer.in_channels
    width = data.draw(st.sampled_from([b for b in range(1, channels + 1) if channels % b == 0]))
    scheme = "conv-sequential" if sequential else "conv-parallel"
    site = site_of(layer)
    if sequential and layer.padding_mode in (
        "reflect",
        "circular",
    ):  # what a kernel pads must be there
        assume(
            all(
                d * (k - 1) < size
                for d, k, size in zip(
                    layer.dilation, layer.kernel_size, output.shape[2:], strict=True
                )
            )
        )
    adapter = strengthened(ConvAdapter(site, width, scheme=scheme, activation=activation).double())
    geometry = layer
    if sequential:
        kind = getattr(nn, f"Conv{site.spatial_dims}d")
        geometry = kind(
            1,
            1,
            layer.kernel_size,
            padding="same",
            dilation=layer.dilation,
            padding_mode=layer.padding_mode,
        )
    h = output if sequential else x
    h.requires_grad_()
    ours = apply(adapter, layer, (x,), output)
    theirs = slow_adapter(adapter, h, output, geometry, width, activation)
    assert_same_gradients(ours, theirs, [h, *adapter.parameters()])


@pytest.mark.parametrize("size", [[9, 11], [10, 12]])
def test_a_transposed_convolution_that_is_told_its_output_size(size: list[int]) -> None:
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2).double()
    adapter = strengthened(ConvAdapter(site_of(layer), 2).double())
    x = torch.randn(2, 4, 5, 6).double()
    output = layer(x, size)
    torch.testing.assert_close(
        adapter(output, x), slow_adapter(adapter, x, output, layer, 2, "relu")
    )


def residual(block: Any, stride: int, width: int) -> nn.Conv2d:
    """The geometry beside a block."""
    return nn.Conv2d(width, width, 3, stride, padding=1, groups=width)


@pytest.mark.parametrize(
    ("stage", "place", "stride"), [("layer1", 0, 1), ("layer2", 0, 2), ("layer2", 1, 1)]
)
@pytest.mark.parametrize("model", [resnet18, resnet50])
def test_at_blocks_against_loops(
    model: Callable[[], Any], stage: str, place: int, stride: int
) -> None:
    torch.manual_seed(0)
    block = model().get_submodule(stage)[place].double().eval()
    channels = block.conv3.out_channels if hasattr(block, "conv3") else block.conv2.out_channels
    x = torch.relu(torch.randn(1, block.conv1.in_channels, 5, 4, dtype=torch.float64))
    output = block(x).detach()
    parallel = strengthened(
        ConvAdapter(Site(channels, module=block), 16, scheme="residual-parallel").double(), 0.1
    )
    assert parallel.reads == "input"
    torch.testing.assert_close(
        parallel(output, x),
        slow_adapter(parallel, x, output, residual(block, stride, 16), 16, "relu"),
    )
    sequential = strengthened(
        ConvAdapter(Site(channels, module=block), 16, scheme="residual-sequential").double(), 0.1
    )
    assert sequential.reads == "output"
    torch.testing.assert_close(
        sequential(output),
        slow_adapter(sequential, output, output, residual(block, 1, 16), 16, "relu"),
    )


class Shortcut(nn.Module):
    """A block as those of ResNet-D are, whose shortcut pools first."""

    def __init__(self, downsample: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.downsample(x)


@pytest.mark.parametrize("size", [7, 8])
def test_a_shortcut_that_pools(size: int) -> None:
    pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)
    block = Shortcut(nn.Sequential(pool, nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)))
    adapter = strengthened(ConvAdapter(Site(6, module=block), 2, scheme="residual-parallel"))
    assert (adapter.down.in_channels, adapter.down.stride) == (4, (2, 2))
    x = torch.randn(1, 4, size, size)
    assert adapter(block(x), x).shape == block(x).shape


@pytest.mark.parametrize("scheme", ["residual-parallel", "residual-sequential"])
@pytest.mark.parametrize(
    ("build", "sites", "x"),
    [
        (lambda: resnet18(num_classes=3), "layer*.*", images(2, 32)),
        (
            lambda: deeplabv3_resnet50(weights=None, weights_backbone=None),
            "backbone.layer[34].*",
            images(1, 32),
        ),
        (lambda: r3d_18(num_classes=3), "layer[12].*", torch.randn(1, 3, 4, 16, 16)),
        (lambda: mc3_18(num_classes=3), "layer[12].*", torch.randn(1, 3, 4, 16, 16)),
    ],
    ids=["resnet18", "deeplabv3", "r3d_18", "mc3_18"],
)
def test_blocks_of_whole_models(
    build: Callable[[], nn.Module], sites: str, x: Tensor, scheme: str
) -> None:
    model = injected(build(), sites, "conv", bottleneck=8, scheme=scheme)
    with resadapt.adapters_disabled(model):
        plain = model(x)
    adapted = model(x)
    pairs = (
        zip(plain.values(), adapted.values(), strict=True)
        if isinstance(plain, dict)
        else [(plain, adapted)]
    )
    for one, other in pairs:
        assert one.shape == other.shape
        assert not torch.equal(one, other)


def test_a_stage_is_a_site_of_the_scheme_that_reads_its_output_only() -> None:
    model = injected(
        small_resnet(), ("layer1", "layer4"), "conv", bottleneck=8, scheme="residual-sequential"
    )
    seen: list[Tensor] = []
    model.layer1[-1].register_forward_hook(lambda _module, _args, output: seen.append(output))
    model(images())
    with resadapt.adapters_disabled(model):
        model(images())
    adapter = adapters_of(model)["layer1"]
    torch.testing.assert_close(adapter(seen[1]), seen[0])
    with pytest.raises(
        resadapt.InjectionError,
        match=r"'layer1' is a Sequential: its adapter is attached .* block 'layer1\.1' and.*"
        "It can adapt",
    ):
        resadapt.inject_adapters(
            small_resnet(), "layer1", 8, family="conv", scheme="residual-parallel"
        )
    with pytest.raises(
        resadapt.InjectionError,
        match=r"cannot adapt site 'layer1' \(Sequential\): it needs a convolution",
    ):
        resadapt.inject_adapters(small_resnet(), "layer1", 8, family="conv")


def test_a_stage_is_read_from_a_file(tmp_path: Path) -> None:
    model = injected(
        small_resnet(),
        "layer[12]",
        "conv",
        bottleneck=8,
        scheme="residual-sequential",
        activation="gelu",
    )
    assert resadapt.save_adapters(model, tmp_path / "adapters.pt", rebuild=small_resnet).ok
    reloaded = resadapt.load_adapters(small_resnet(), tmp_path / "adapters.pt")
    assert torch.equal(reloaded.eval()(images()), model(images()))


def test_parameters_by_hand() -> None:
    def count(model: nn.Module, layers: Any, width: int, **options: Any) -> int:
        resadapt.inject_adapters(model, layers, width, family="conv", **options)
        return resadapt.count_parameters(model).adapters

    # Each hidden channel has k^2 taps on its C_in / b channels; then b C_out and C_out.
    by_hand = sum(
        blocks * (9 * w + 16 * w + w) for blocks, w in ((3, 64), (4, 128), (6, 256), (3, 512))
    )
    assert count(resnet50(), "layer*.*.conv2", 16) == by_hand == 98_176
    by_hand = 4 * (64 * 9 + 16 * 64 + 64) + sum(
        9 * w // 2 + 17 * w + 3 * (9 * w + 17 * w) for w in (128, 256, 512)
    )
    assert count(resnet18(), "layer*.*.conv[12]", 16) == by_hand == 95_808
    by_hand = 2 * sum(9 * w + 16 * w + w for w in (64, 128, 256, 512))
    assert count(resnet18(), "layer*.*", 16, scheme="residual-sequential") == by_hand == 49_920


@pytest.mark.parametrize(
    ("scheme", "sites"),
    [
        ("conv-parallel", "layer*.*.conv*"),
        ("conv-sequential", "layer*.*.conv*"),
        ("residual-parallel", "layer*.*"),
        ("residual-sequential", "layer*.*"),
    ],
)
def test_it_starts_as_nothing(scheme: str, sites: str) -> None:
    assert_starts_as_nothing(small_resnet(), images(), sites, "conv", bottleneck=8, scheme=scheme)


def test_the_authors_start() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 128, 3)
    adapter = ConvAdapter(site_of(layer), 32, init="paper")
    assert adapter.down.weight.std().item() == pytest.approx((2 / (32 * 9)) ** 0.5, rel=0.05)
    assert adapter.up.weight.std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.05)
    assert torch.equal(adapter.scale, torch.ones(128, 1, 1))
    assert torch.equal(ConvAdapter(site_of(layer), 32).scale, torch.ones(128, 1, 1))


@pytest.mark.parametrize(
    ("module", "width", "options", "message"),
    [
        (
            nn.Conv2d(48, 4, 3),
            10,
            {},
            "must divide the 48 channels that the adapter reads, and 10 does not: use 8 or 12",
        ),
        (
            nn.Conv2d(3, 4, 3),
            64,
            {},
            "must divide the 3 channels that the adapter reads, and 64 does not: use 3",
        ),
        (
            nn.Conv2d(3, 4, 3),
            3,
            {"scheme": "conv-sequential"},
            "must divide the 4 channels that the adapter reads, and 3 does not: use 2 or 4",
        ),
        (nn.Linear(4, 4), 2, {}, "it needs a convolution"),
        (nn.BatchNorm2d(4), 2, {}, "it needs a convolution"),
        (
            nn.Conv2d(3, 4, 3),
            1,
            {"scheme": "residual-parallel"},
            "the residual schemes need a residual block",
        ),
        (
            nn.Sequential(),
            1,
            {"scheme": "residual-sequential"},
            "the residual schemes need a residual block",
        ),
        (
            nn.Conv2d(3, 4, 3),
            1,
            {"scheme": "parallel"},
            "scheme='parallel' is not known: use 'conv-parallel' or",
        ),
        (
            nn.Conv2d(3, 4, 3),
            1,
            {"activation": "tanh"},
            "activation='tanh' is not known: use 'relu' or 'gelu' or 'silu'",
        ),
        (nn.Conv2d(3, 4, 3), 1, {"init": "he"}, "init='he' is not known"),
    ],
)
def test_refusals(module: nn.Module, width: int, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvAdapter(Site(4, module=module), width, **options)


def test_it_is_not_linear() -> None:
    layer = nn.Conv2d(4, 4, 3)
    with pytest.raises(ValueError, match="it is not linear"):
        ConvAdapter(site_of(layer), 2).folded(layer)


def _site_for(scheme: str) -> str:
    return "layer1.0.conv1" if scheme.startswith("conv") else "layer1.0"


@pytest.mark.parametrize("scheme", ["conv-parallel", "residual-parallel"])
def test_an_adapter_that_reads_the_input_needs_it(scheme: str) -> None:
    """opacus, for one, calls a module with its first argument only, and took a wrong gradient."""
    model = injected(small_resnet(), _site_for(scheme), "conv", bottleneck=8, scheme=scheme)
    (adapter,) = adapters_of(model).values()
    x = torch.randn(1, 64, 4, 4)
    adapter(x, x)
    with pytest.raises(TypeError, match=r"read the site's input: call adapter\(output, x\)"):
        adapter(x)


@pytest.mark.parametrize("scheme", ["conv-sequential", "residual-sequential"])
def test_an_adapter_that_does_not_read_the_input_takes_none(scheme: str) -> None:
    model = injected(small_resnet(), _site_for(scheme), "conv", bottleneck=8, scheme=scheme)
    (adapter,) = adapters_of(model).values()
    x = torch.randn(1, 64, 4, 4)
    adapter(x)
    with pytest.raises(TypeError, match=r"sequential schemes do not: call adapter\(output\)"):
        adapter(x, x)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "reflect": lambda: nn.Conv2d(
        8, 8, (3, 2), stride=(2, 1), padding=(1, 0), padding_mode="reflect", groups=2
    ),
    "transposed": lambda: nn.ConvTranspose2d(
        8, 8, 3, stride=2, padding=1, output_padding=1, groups=2
    ),
}


@pytest.mark.parametrize(
    ("layer", "scheme"),
    [("reflect", "conv-parallel"), ("transposed", "conv-parallel"), ("reflect", "conv-sequential")],
)
def test_it_survives(layer: str, scheme: str, tmp_path: Path) -> None:
    assert_survives(
        LAYERS[layer], tmp_path / "adapters.pt", family="conv", bottleneck=4, scheme=scheme
    )


@pytest.mark.parametrize(
    ("layer", "scheme"), [("reflect", "conv-sequential"), ("transposed", "conv-parallel")]
)
def test_the_adapter_can_be_scripted(layer: str, scheme: str) -> None:
    module = LAYERS[layer]()
    adapter = strengthened(ConvAdapter(site_of(module), 4, scheme=scheme, activation="silu"))
    x = torch.randn(1, 8, 5, 5)
    args = (module(x), x) if adapter.reads == "input" else (module(x),)
    torch.testing.assert_close(
        torch.jit.script(adapter)(*args), apply(adapter, module, (x,), module(x))
    )
