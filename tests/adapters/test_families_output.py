"""The families that read a site's output: against plain operations, and in whole models."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import images, scramble, small_resnet, train
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50

import resadapt
from resadapt.adapters import (
    FAMILIES,
    Adapter,
    BottleneckAdapter,
    MonaAdapter,
    SeriesAdapter,
    Site,
    SsfAdapter,
)
from resadapt.adapters.family import takes
from resadapt.adapters.pointwise import pointwise

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "series": ("series", {}),
    "series, norm": ("series", {"batch_norm": True}),
    "bottleneck": ("bottleneck", {}),
    "bottleneck, gelu": ("bottleneck", {"activation": "gelu"}),
    "bottleneck, silu": ("bottleneck", {"activation": "silu"}),
    "ssf": ("ssf", {}),
    "mona": ("mona", {}),
}
ONE_EACH = ["series, norm", "bottleneck", "ssf", "mona"]
# Shapes of feature maps, and where their channels are.
SHAPES = [
    ((3, 4), 1),
    ((2, 4, 5), 1),
    ((2, 4, 5, 3), 1),
    ((2, 4, 2, 3, 5), 1),
    ((2, 5, 4), -1),
    ((2, 5, 3, 4), -1),
    ((1, 2, 3, 5, 4), -1),
]


def sizes(family: str, bottleneck: int = 3) -> dict[str, int]:
    return {"bottleneck": bottleneck} if takes(FAMILIES[family], "bottleneck") else {}


def build(case: str, shape: tuple[int, ...], channel_dim: int = 1, **more: Any) -> Any:
    """An adapter with values that matter, in float64."""
    family, options = CASES[case]
    site = Site(shape[channel_dim], len(shape) - 2, channel_dim)
    return scramble(FAMILIES[family](site, **sizes(family), **options, **more).double())


def places(case: str) -> list[tuple[tuple[int, ...], int]]:
    return [(shape, dim) for shape, dim in SHAPES if case != "mona" or len(shape) > 2]


# References: channels first, one channel at a time, with autograd's own operations. A weight is
# [rows, columns].


def mixed(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    rows, columns = weight.shape[:2]
    weight = weight.reshape(rows, columns)
    outputs = []
    for i in range(rows):
        value = torch.zeros_like(x[:, 0]) if bias is None else torch.zeros_like(x[:, 0]) + bias[i]
        for j in range(columns):
            value = value + weight[i, j] * x[:, j]
        outputs.append(value)
    return torch.stack(outputs, 1)


def batch_normed(norm: Any, x: Tensor) -> Tensor:
    outputs = []
    for j in range(x.shape[1]):
        if norm.training:
            mean = x[:, j].sum() / x[:, j].numel()
            variance = ((x[:, j] - mean) ** 2).sum() / x[:, j].numel()
        else:
            mean, variance = norm.running_mean[j], norm.running_var[j]
        outputs.append(
            (x[:, j] - mean) / torch.sqrt(variance + 1e-5) * norm.weight[j] + norm.bias[j]
        )
    return torch.stack(outputs, 1)


def series(adapter: SeriesAdapter, x: Tensor, _mask: float | Tensor) -> Tensor:
    read = (
        batch_normed(adapter.norm, x)
        if isinstance(adapter.norm, nn.modules.batchnorm._BatchNorm)
        else x
    )
    return x + mixed(adapter.alpha.weight, None, read)


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


ACTIVATIONS: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {
    nn.ReLU: lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    nn.GELU: gelu,
    nn.SiLU: lambda x: x / (1 + torch.exp(-x)),
}


def bottleneck(adapter: BottleneckAdapter, x: Tensor, mask: float | Tensor) -> Tensor:
    hidden = ACTIVATIONS[type(adapter.act)](mixed(adapter.down.weight, adapter.down.bias, x))
    return x + mixed(adapter.up.weight, adapter.up.bias, hidden * mask)


def ssf(adapter: SsfAdapter, x: Tensor, _mask: float | Tensor) -> Tensor:
    return torch.stack([adapter.gamma[j] * x[:, j] + adapter.beta[j] for j in range(x.shape[1])], 1)


def depthwise(convolution: Any, z: Tensor) -> Tensor:
    """Each filter as a sum of shifted maps, zeros around them."""
    size, dims = convolution.weight.shape[-1], z.ndim - 2
    padded = F.pad(z, [size // 2] * 2 * dims)
    outputs = []
    for j in range(z.shape[1]):
        value = torch.zeros_like(z[:, j]) + convolution.bias[j]
        for offset in itertools.product(range(size), repeat=dims):
            window = tuple(
                slice(start, start + length)
                for start, length in zip(offset, z.shape[2:], strict=True)
            )
            value = value + convolution.weight[(j, 0, *offset)] * padded[(slice(None), j, *window)]
        outputs.append(value)
    return torch.stack(outputs, 1)


def mona(adapter: MonaAdapter, x: Tensor, mask: float | Tensor) -> Tensor:
    channels = x.shape[1]
    mean = sum(x[:, j] for j in range(channels)) / channels
    variance = sum((x[:, j] - mean) ** 2 for j in range(channels)) / channels
    scaled = []
    for j in range(channels):
        normed = (x[:, j] - mean) / torch.sqrt(variance + 1e-5) * adapter.norm.weight[
            j
        ] + adapter.norm.bias[j]
        scaled.append(adapter.norm_scale[j] * normed + adapter.skip_scale[j] * x[:, j])
    z = mixed(adapter.down.weight, adapter.down.bias, torch.stack(scaled, 1))
    h = (
        z
        + (
            depthwise(adapter.filter3, z)
            + depthwise(adapter.filter5, z)
            + depthwise(adapter.filter7, z)
        )
        / 3
    )
    hidden = gelu(h + mixed(adapter.mix.weight, adapter.mix.bias, h))
    return x + mixed(adapter.up.weight, adapter.up.bias, hidden * mask)


REFERENCES: dict[str, Callable[[Any, Tensor, float | Tensor], Tensor]] = {
    "series": series,
    "bottleneck": bottleneck,
    "ssf": ssf,
    "mona": mona,
}


def assert_as_the_reference(
    case: str, shape: tuple[int, ...], channel_dim: int, training: bool
) -> None:
    """Compares outputs, and gradients for the input and every parameter."""
    adapter = build(case, shape, channel_dim).train(training)
    x = torch.randn(
        shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    ).requires_grad_()
    reference = REFERENCES[CASES[case][0]]
    expected = reference(adapter, x.movedim(channel_dim, 1), 1.0).movedim(1, channel_dim)
    given_back = adapter(x)
    torch.testing.assert_close(given_back, expected)
    tensors = [x, *adapter.parameters()]
    weights = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for ours, theirs in zip(
        torch.autograd.grad((given_back * weights).sum(), tensors),
        torch.autograd.grad((expected * weights).sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("case", "shape", "channel_dim"), [(case, *place) for case in CASES for place in places(case)]
)
def test_against_the_reference(
    case: str, shape: tuple[int, ...], channel_dim: int, training: bool
) -> None:
    assert_as_the_reference(case, shape, channel_dim, training)


@settings(max_examples=10, deadline=None)
@given(
    case=st.sampled_from(ONE_EACH),
    n=st.integers(1, 3),
    channels=st.integers(1, 5),
    spatial=st.lists(st.integers(1, 9), min_size=1, max_size=2),
    channel_dim=st.sampled_from([1, -1]),
)
def test_any_shape(case: str, n: int, channels: int, spatial: list[int], channel_dim: int) -> None:
    shape = (n, channels, *spatial) if channel_dim == 1 else (n, *spatial, channels)
    assert_as_the_reference(case, shape, channel_dim, training=False)


@pytest.mark.parametrize("case", ["bottleneck, silu", "mona"])  # a ReLU would hide the order
def test_dropout_between_activation_and_up(case: str) -> None:
    shape = (2, 4, 5, 3)
    adapter = build(case, shape, dropout=0.4).train()
    x = torch.randn(shape, dtype=torch.float64)
    masks: list[Tensor] = []

    def draw(_module: nn.Module, inputs: tuple[Tensor]) -> None:
        torch.manual_seed(3)
        masks.append(F.dropout(torch.ones_like(inputs[0]), 0.4))
        torch.manual_seed(3)

    adapter.dropout.register_forward_pre_hook(draw)
    adapted = adapter(x)
    assert 0 < masks[0].count_nonzero() < masks[0].numel()
    torch.testing.assert_close(adapted, REFERENCES[CASES[case][0]](adapter, x, masks[0]))
    adapter.eval()
    torch.testing.assert_close(adapter(x), REFERENCES[CASES[case][0]](adapter, x, 1.0))
    assert build(case, shape).dropout.p == 0.0


def test_statistics_of_the_series_norm_move_in_training_only() -> None:
    for shape, dim in SHAPES:
        adapter = build("series, norm", shape, dim)
        mean, variance = adapter.norm.running_mean.clone(), adapter.norm.running_var.clone()
        x = torch.randn(shape, dtype=torch.float64)
        adapter.eval()(x)
        assert torch.equal(adapter.norm.running_mean, mean)
        adapter.train()(x)
        channels = x.movedim(dim, 0).flatten(1)
        torch.testing.assert_close(adapter.norm.running_mean, 0.9 * mean + 0.1 * channels.mean(1))
        torch.testing.assert_close(adapter.norm.running_var, 0.9 * variance + 0.1 * channels.var(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("case", "shape", "channel_dim"), [(case, *place) for case in CASES for place in places(case)]
)
def test_dtype_and_memory_are_kept(
    case: str, shape: tuple[int, ...], channel_dim: int, dtype: torch.dtype
) -> None:
    adapter = build(case, shape, channel_dim).to(dtype)
    x = torch.randn(shape, dtype=dtype)
    layouts = [x]
    if channel_dim == 1 and len(shape) > 3:
        layouts.append(
            x.contiguous(
                memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d
            )
        )
    for each in layouts:
        adapted = adapter(each)
        assert adapted.dtype == dtype
        assert adapted.stride() == each.stride()
        torch.testing.assert_close(
            adapted, adapter(x), rtol=0.05, atol=0.05 if dtype == torch.bfloat16 else 1e-5
        )


@pytest.mark.parametrize("case", CASES)
def test_autocast_keeps_the_dtype_of_the_features(case: str) -> None:
    adapter = build(case, (2, 4, 5, 3)).float()
    x = torch.randn(2, 4, 5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        adapted = adapter(x.bfloat16())
    assert adapted.dtype == torch.bfloat16
    torch.testing.assert_close(adapted.float(), adapter(x), rtol=0.1, atol=0.1)


# What is counted, on the channels of a ResNet.

LAYERS_18 = (64, 128, 256, 512)
LAYERS_50 = (256, 512, 1024, 2048)
BLOCKS_50 = {64: 3, 128: 4, 256: 6, 512: 3}
NORMS = ["bn1", "layer*.*.bn*", "layer*.*.downsample.1"]


def bottleneck_count(c: int, b: int = 64) -> int:
    return (c * b + b) + (b * c + c)  # down, up


def mona_count(c: int, b: int = 64) -> int:
    norm, scales = 2 * c, 2 * c
    filters = (9 * b + b) + (25 * b + b) + (49 * b + b)
    return norm + scales + (c * b + b) + filters + (b * b + b) + (b * c + c)


COUNTS = [
    (
        "series",
        {},
        ["layer?"],
        sum(c * c for c in LAYERS_18),
        348_160,
        sum(c * c for c in LAYERS_50),
        5_570_560,
    ),
    (
        "series",
        {"batch_norm": True},
        ["layer?"],
        sum(c * c + 2 * c for c in LAYERS_18),
        350_080,
        sum(c * c + 2 * c for c in LAYERS_50),
        5_578_240,
    ),
    # Every 3x3 convolution of the stages: four in each of ResNet-18, conv2 of each block in
    # ResNet-50.
    (
        "series",
        {},
        "3x3",
        sum(4 * c * c for c in LAYERS_18),
        1_392_640,
        sum(n * c * c for c, n in BLOCKS_50.items()),
        1_257_472,
    ),
    (
        "bottleneck",
        {},
        ["layer?"],
        sum(map(bottleneck_count, LAYERS_18)),
        124_096,
        sum(map(bottleneck_count, LAYERS_50)),
        495_616,
    ),
    (
        "ssf",
        {},
        ["layer?"],
        sum(2 * c for c in LAYERS_18),
        1_920,
        sum(2 * c for c in LAYERS_50),
        7_680,
    ),
    # Every norm: bn1, two a block (or three), and one a shortcut with a convolution.
    (
        "ssf",
        {},
        NORMS,
        2 * (64 + sum(4 * c for c in LAYERS_18) + sum(LAYERS_18[1:])),
        9_600,
        2 * (64 + sum(n * (c + c + 4 * c) for c, n in BLOCKS_50.items()) + sum(LAYERS_50)),
        53_120,
    ),
    (
        "mona",
        {},
        ["layer?"],
        sum(map(mona_count, LAYERS_18)),
        166_592,
        sum(map(mona_count, LAYERS_50)),
        549_632,
    ),
]


@pytest.fixture(scope="module")
def resnets() -> tuple[nn.Module, nn.Module]:
    return resnet18(), resnet50()


@pytest.mark.parametrize(
    ("family", "options", "layers", "formula_18", "literal_18", "formula_50", "literal_50"), COUNTS
)
def test_parameter_counts(
    resnets: tuple[nn.Module, nn.Module],
    family: str,
    options: dict[str, Any],
    layers: Any,
    formula_18: int,
    literal_18: int,
    formula_50: int,
    literal_50: int,
) -> None:
    assert (formula_18, formula_50) == (literal_18, literal_50)
    for model, expected in zip(resnets, (literal_18, literal_50), strict=True):
        sites = layers
        if layers == "3x3":
            sites = [
                n
                for n, m in model.named_modules()
                if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)
            ]
        resadapt.inject_adapters(model, sites, family=family, **options)
        assert resadapt.count_parameters(model).adapters == expected
        resadapt.remove_adapters(model)


# How they start.


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layers", ["layer*.*", ["layer1.0.conv1", "layer2.0.bn2"]])
def test_the_start_is_the_identity_and_learns(case: str, layers: Any) -> None:
    family, options = CASES[case]
    model = resadapt.inject_adapters(
        small_resnet(), layers, **sizes(family), family=family, **options
    )
    for training in (True, False):
        model.train(training)
        with resadapt.adapters_disabled(model):
            plain = model(images())
        assert torch.equal(model(images()), plain)
    train(model, torch.optim.SGD(resadapt.trainable_parameters(model), lr=1e-2), steps=2)
    assert [
        name for name, p in resadapt.named_trainable_parameters(model) if not p.grad.any()
    ] == []
    assert not torch.equal(model.eval()(images()), plain)


def test_starts_draw_what_they_say() -> None:
    torch.manual_seed(0)
    site = Site(256)
    assert SeriesAdapter(site, init="he").alpha.weight.std().item() == pytest.approx(
        (2 / 256) ** 0.5, rel=0.02
    )
    assert abs(SeriesAdapter(site, init="he").alpha.weight.mean().item()) < 1e-3
    scaled = SsfAdapter(Site(20_000), init="normal")
    for vector, mean in ((scaled.gamma, 1.0), (scaled.beta, 0.0)):
        assert vector.mean().item() == pytest.approx(mean, abs=5e-4)
        assert vector.std().item() == pytest.approx(0.02, rel=0.03)
    small = BottleneckAdapter(site, 64, init="normal")
    for layer in (small.down, small.up):
        assert layer.weight.std().item() == pytest.approx(1e-3, rel=0.03)
        assert not layer.bias.any()
    identity = BottleneckAdapter(site, 64)
    assert identity.down.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.03)
    assert not torch.cat([identity.down.bias, identity.up.bias, identity.up.weight.flatten()]).any()
    for init in ("identity", "uniform"):
        adapter = MonaAdapter(site, 64, init=init)
        assert torch.equal(adapter.norm_scale, torch.full((256,), 1e-6))
        assert torch.equal(adapter.skip_scale, torch.ones(256))
        drawn = {
            name
            for name, layer in adapter.named_children()
            if getattr(layer, "weight", torch.zeros(1)).unique().numel() > 1
        }
        assert drawn == {"down", "filter3", "filter5", "filter7", "mix"} | (
            {"up"} if init == "uniform" else set()
        )
    uniform = adapter.up.weight
    assert uniform.std().item() == pytest.approx(
        1 / (3 * 64) ** 0.5, rel=0.03
    )  # uniform in +-1 / sqrt(64)
    assert uniform.abs().max() <= 1 / 8


# What they refuse.


@pytest.mark.parametrize(
    ("family", "layers", "options", "reason"),
    [
        (
            "mona",
            "fc",
            {},
            r"cannot adapt site 'fc' \(Linear\): it needs 1 to 3 spatial dimensions, "
            r"not 0\. It can adapt",
        ),
        (
            "series",
            "layer4",
            {"init": "zeros"},
            r"init='zeros' is not known: use 'identity' or 'he'",
        ),
        (
            "series",
            "layer4",
            {"batch_norm": "yes"},
            r"batch_norm='yes' is not known: use True or False",
        ),
        ("series", "layer4", {"dropout": 0.1}, r"family 'series' has no dropout"),
        (
            "ssf",
            "layer4",
            {"init": "zeros"},
            r"init='zeros' is not known: use 'identity' or 'normal'",
        ),
        ("ssf", "layer4", {"dropout": 0.1}, r"family 'ssf' has no dropout"),
        (
            "bottleneck",
            "layer4",
            {"init": "zeros"},
            r"init='zeros' is not known: use 'identity' or 'normal'",
        ),
        (
            "bottleneck",
            "layer4",
            {"activation": "tanh"},
            r"activation='tanh' is not known: use 'relu' or 'gelu' or 'silu'",
        ),
        (
            "mona",
            "layer4",
            {"init": "zeros"},
            r"init='zeros' is not known: use 'identity' or 'uniform'",
        ),
    ],
)
def test_refusals(family: str, layers: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(resadapt.InjectionError, match=reason):
        resadapt.inject_adapters(small_resnet(), layers, family=family, **options)


@pytest.mark.parametrize("family", ["series", "bottleneck"])
def test_four_spatial_dimensions(family: str) -> None:
    with pytest.raises(
        ValueError,
        match=r"^it needs at most 3 spatial dimensions, or the channels in the last one, not 4$",
    ):
        FAMILIES[family](Site(4, 4), **sizes(family))
    x = torch.randn(2, 3, 2, 1, 2, 4)
    assert torch.equal(FAMILIES[family](Site(4, 4, -1), **sizes(family))(x), x)
    with pytest.raises(ValueError, match="it needs 1 to 3 spatial dimensions, not 4"):
        MonaAdapter(Site(4, 4, -1), 2)


def test_the_pointwise_layer() -> None:
    assert isinstance(pointwise(Site(4, 0), 4, 2), nn.Linear)
    assert isinstance(pointwise(Site(4, 2, -1), 4, 2), nn.Linear)
    for dims, kind in ((1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d)):
        layer = pointwise(Site(4, dims), 4, 2, bias=False)
        assert type(layer) is kind
        assert layer.bias is None
        assert layer.weight.shape == (2, 4, *[1] * dims)


@pytest.mark.parametrize("family", ["series", "bottleneck", "ssf", "mona"])
def test_a_family_says_what_it_is(family: str) -> None:
    kind = FAMILIES[family]
    assert all((kind.formula, kind.size, kind.starts))
    assert re.fullmatch(r"arXiv:\d{4}\.\d{5}", kind.source)
    assert kind.reads == "output"


# What models go through.


def injected(case: str) -> Any:
    family, options = CASES[case]
    layers = ["layer1", "layer2.0.conv1", "layer4.1.bn2"]
    model = resadapt.inject_adapters(
        small_resnet(), layers, **sizes(family), family=family, head="fc", **options
    )
    return perturb(model).eval()


def perturb(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, Adapter):
            with torch.no_grad():
                for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                    if tensor.is_floating_point():
                        tensor.add_(torch.rand(tensor.shape) * (1.0 if "running" in name else 0.05))
    return model


@pytest.mark.parametrize("case", ONE_EACH)
def test_survival(case: str) -> None:
    model, x = injected(case), images()
    expected = model(x)
    with resadapt.adapters_disabled(model):
        assert not torch.allclose(model(x), expected, atol=1e-3)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.fx.symbolic_trace(model),
    ):
        assert torch.equal(twin(x), expected)
    plain = resadapt.inference_copy(model)
    assert torch.equal(plain(x), expected)
    torch.testing.assert_close(torch.jit.script(plain)(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)


@pytest.mark.parametrize("case", ONE_EACH)
def test_compile_fullgraph(case: str) -> None:
    torch._dynamo.reset()
    family, options = CASES[case]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model = perturb(
        resadapt.inject_adapters(model, ["0", "1"], **sizes(family), family=family, **options)
    )
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = images()
    for training in (False, True):
        model.train(training)
        torch.testing.assert_close(compiled(x), model(x))
    compiled(x).square().sum().backward()
    gradients = [p.grad.clone() for p in resadapt.trainable_parameters(model)]
    model.zero_grad()
    model(x).square().sum().backward()
    for ours, eager in zip(gradients, resadapt.trainable_parameters(model), strict=True):
        torch.testing.assert_close(ours, eager.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_save_and_load(case: str, path: Path) -> None:
    model = injected(case)
    train(model, torch.optim.SGD(model.parameters(), lr=1e-2))
    report = resadapt.save_adapters(model.eval(), path, probe=images())
    assert report.ok
    fresh = resadapt.load_adapters(small_resnet(), path).eval()
    assert torch.equal(fresh(images()), model(images()))
    family, options = CASES[case]
    info = resadapt.read_adapter_info(path).set
    assert info.family == family
    assert info.options.items() >= options.items()
    assert "init" not in info.options
