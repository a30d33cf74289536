"""Convolutions with a forward of their own: padding by size, in front, or another weight."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from geometries import assert_folded, assert_survives, injected, site_of, strengthened
from support import small_net
from torch import Tensor, nn
from torch.nn import functional as F

import resadapt
from resadapt.adapters import ConvAdapter, LoraAdapter, ParallelAdapter, SeriesAdapter, SsfAdapter
from resadapt.adapters.own_forward import input_padding, uses_parameters
from resadapt.injection.own_dtype import apply


def as_tensorflow_pads(x: Tensor, layer: Any) -> Tensor:
    """Half of the padding in front, which depends on the size of the input."""
    sides: list[int] = []
    for size, k, s, d in zip(
        x.shape[2:], layer.kernel_size, layer.stride, layer.dilation, strict=True
    ):
        total = max((-(-size // s) - 1) * s + d * (k - 1) + 1 - size, 0)
        sides = [total // 2, total - total // 2, *sides]
    return F.pad(x, sides)


def in_front(x: Tensor, layer: Any) -> Tensor:
    """All of the padding in front, as causal convolutions pad."""
    spans = [d * (k - 1) for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    return F.pad(x, [side for span in reversed(spans) for side in (span, 0)])


def behind(x: Tensor, layer: Any) -> Tensor:
    """One more element behind, as some halve a feature map."""
    return F.pad(x, [0, 1] * len(layer.kernel_size))


PADDINGS = {"tensorflow": as_tensorflow_pads, "in front": in_front, "behind": behind}


def padding_layer(padding: str, dims: int, *args: Any, **options: Any) -> Any:
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]

    class Padding(kind):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(PADDINGS[padding](x, self))

    return Padding(*args, **options)


class Chomping(nn.Conv1d):
    """A causal convolution that pads on both sides and cuts the end off."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., : -self.padding[0]]


class ChompingTranspose(nn.ConvTranspose1d):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[..., :-1]


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class Doubled(nn.Conv2d):
    def _conv_forward(self, *args: Any) -> Tensor:
        return 2 * super()._conv_forward(*args)


class OwnBias(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight, None) + 1


class Rectified(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Flipped(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flip(1)


class FlippedInput(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flip(1))


class Twice(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(x)


class Reflecting(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, [1, 1, 1, 1], mode="reflect"))


GEOMETRIES = [
    {"kernel_size": 3, "stride": 2},
    {"kernel_size": 4, "stride": 3},
    {"kernel_size": 2, "stride": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 3, "stride": 1, "dilation": 2},
    {"kernel_size": 5, "stride": 2, "groups": 2},
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("padding", PADDINGS)
def test_bypass_equals_folded(padding: str, dims: int, geometry: Any) -> None:
    torch.manual_seed(0)
    layer = padding_layer(padding, dims, 4, 6, **geometry).double()
    adapters = [
        LoraAdapter(site_of(layer), 3),
        LoraAdapter(site_of(layer), 3, dora=True),
        ParallelAdapter(site_of(layer)),
        SsfAdapter(site_of(layer)),
        *([] if layer.groups > 1 else [SeriesAdapter(site_of(layer))]),
    ]
    for adapter, size in itertools.product(adapters, (7, 8, 9) if dims < 3 else (5, 6)):
        x = torch.randn(2, 4, size, *[6] * (dims - 1), dtype=torch.float64)
        assert_folded(strengthened(adapter.double()), layer, x, 1e-11)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("padding", PADDINGS)
def test_conv_adapters_read_what_the_layer_reads(padding: str, geometry: Any) -> None:
    torch.manual_seed(0)
    layer = padding_layer(padding, 2, 4, 6, **geometry)
    adapter = strengthened(ConvAdapter(site_of(layer), 2))
    for size in (7, 8, 9):
        x = torch.randn(2, 4, size, 8)
        output = layer(x)
        hidden = F.conv2d(
            PADDINGS[padding](x, layer),
            adapter.down.weight,
            stride=layer.stride,
            dilation=layer.dilation,
            groups=2,
        )
        expected = output + adapter.scale * adapter.up(torch.relu(hidden))
        torch.testing.assert_close(adapter(output, x), expected)


@pytest.mark.parametrize(
    "layer",
    [Chomping(4, 6, 3, padding=4, dilation=2), ChompingTranspose(4, 6, 3, stride=2)],
    ids=lambda layer: type(layer).__name__,
)
def test_an_output_that_is_cut(layer: Any) -> None:
    layer = layer.double()
    for adapter in (LoraAdapter(site_of(layer), 2), ParallelAdapter(site_of(layer))):
        for size in (5, 6):
            x = torch.randn(2, 4, size, dtype=torch.float64)
            assert_folded(strengthened(adapter.double()), layer, x, 1e-11)


@pytest.mark.parametrize("family", [LoraAdapter, ParallelAdapter, ConvAdapter])
def test_a_causal_layer_stays_causal(family: Any) -> None:
    """Its output has the sizes of a layer that pads on both sides."""
    layer = padding_layer("in front", 1, 4, 6, 3)
    options = {} if family is ParallelAdapter else {"bottleneck": 2}
    adapter = strengthened(family(site_of(layer), **options))
    x = torch.randn(1, 4, 9, requires_grad=True)
    (adapter(layer(x), x) - layer(x))[..., 4].sum().backward()
    assert x.grad is not None
    assert x.grad[..., :5].any()
    assert not x.grad[..., 5:].any()


@pytest.mark.parametrize("kind", [Standardized, Doubled, OwnBias, Reflecting])
@pytest.mark.parametrize("family", ["lora", "parallel", "conv"])
def test_another_weight_or_result_is_adapted_but_not_folded(kind: Any, family: str) -> None:
    """The bypass adds what it adds to a stock layer of the same geometry."""
    torch.manual_seed(0)
    own, stock = (
        small_net(head=nn.Linear(layer.out_channels, 2)) for layer in (nn.Conv2d(4, 4, 3),) * 2
    )
    own.c2, stock.c2 = kind(4, 4, 3, stride=2), nn.Conv2d(4, 4, 3, stride=2)
    if kind is Reflecting:
        stock.c2.padding = (1, 1)
    models = [
        injected(each, "c2", family, **({} if family == "parallel" else {"bottleneck": 2}))
        for each in (own, stock)
    ]
    adapters = [each.c2.resadapt.default for each in models]
    adapters[1].load_state_dict(adapters[0].state_dict())
    x = torch.randn(2, 4, 8, 7)
    with torch.no_grad():
        changes = []
        for model, adapter in zip(models, adapters, strict=True):
            with resadapt.adapters_disabled(model):
                output = model.c2(x)
            changes.append(apply(adapter, model.c2, (x,), output) - output)
    torch.testing.assert_close(*changes)
    assert changes[0].abs().max() > 1e-3
    reason = "it is not linear" if family == "conv" else f"the forward of {kind.__name__} is not a"
    with pytest.raises(resadapt.AdapterError, match=rf"'c2' \({kind.__name__}\): {reason}"):
        resadapt.fold_adapters(own)
    images = torch.randn(2, 3, 11, 12)
    assert torch.equal(resadapt.inference_copy(own)(images), own(images))


@pytest.mark.parametrize("family", ["ssf", "series"])
def test_families_that_read_the_output_are_not_folded_either(family: str) -> None:
    model = small_net()
    model.c2 = Standardized(4, 4, 1)
    injected(model, "c2", family)
    with pytest.raises(resadapt.AdapterError, match="the forward of Standardized is not a"):
        resadapt.fold_adapters(model)


def test_a_whole_model_is_folded() -> None:
    model = small_net()
    model.conv = padding_layer("tensorflow", 2, 3, 4, 3, stride=2)
    injected(model, "conv", "lora", bottleneck=2)
    for size in (11, 12):
        x = torch.randn(2, 3, size, size)
        torch.testing.assert_close(resadapt.fold_adapters(model)(x), model(x))


@pytest.mark.parametrize(
    "kind", [Standardized, Doubled, OwnBias, Rectified, Flipped, FlippedInput, Twice]
)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_changed_weight_or_result_is_seen(kind: Any, kernel: int, stride: int) -> None:
    assert not uses_parameters(kind(4, 6, kernel, stride=stride))


def test_dora_needs_a_layer_that_uses_its_weight() -> None:
    with pytest.raises(ValueError, match="dora=True needs a layer that convolves with its param"):
        LoraAdapter(site_of(Standardized(4, 4, 3)), 2, dora=True)


class Elsewhere(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, 2, 2)


class Several(nn.Conv2d):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


class Failing(nn.Conv2d):
    def forward(self, x: Tensor, weights: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x) * weights


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Elsewhere, "its own forward reads other positions of its input than a convolution with"),
        (Several, "its own forward fails on a generated input: TypeError: expected Tensor"),
        (Failing, "its own forward fails on a generated input: TypeError: .*weights"),
    ],
)
def test_refusals(kind: Any, message: str) -> None:
    model = small_net()
    model.c2 = kind(4, 4, 3)
    with pytest.raises(
        resadapt.InjectionError,
        match=rf"site 'c2' \({kind.__name__}\): {message}.*can adapt 'conv'",
    ):
        resadapt.inject_adapters(model, "c2", 2, family="lora")


class Remembering(nn.Conv2d):
    """Writes an attribute, a buffer and a module in its forward."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register_buffer("calls", torch.zeros(()))
        self.pad: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.size = x.shape
        self.pad = nn.ZeroPad2d(1)
        return super().forward(self.pad(x))


def test_the_layer_is_not_changed() -> None:
    layer = Remembering(4, 6, 3)
    before = copy.copy(vars(layer)), layer.calls.clone()
    padding = input_padding(layer)
    assert padding is not None
    assert (padding.before, padding.halved) == ([1, 1], [False, False])
    assert vars(layer) == before[0]
    assert torch.equal(layer.calls, before[1])
    assert layer.pad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_dtypes_and_devices(dtype: torch.dtype, device: str) -> None:
    layer = padding_layer("tensorflow", 2, 4, 6, (7, 3), stride=(2, 1)).to(device, dtype)
    with torch.device(device):
        padding = input_padding(layer)
    assert padding is not None
    assert (padding.before, padding.halved) == ([0, 1], [True, False])
    assert uses_parameters(layer)
    assert not uses_parameters(Standardized(4, 6, 3).to(device, dtype))


def test_a_kernel_that_spans_many_positions() -> None:
    layer = padding_layer("in front", 2, 64, 6, 3, dilation=36)
    padding = input_padding(layer)
    assert padding is not None
    assert padding.before == [72, 72]


class Same(nn.Conv2d):
    """Pads as TensorFlow does, for kernels not smaller than the stride; scriptable, traceable."""

    def forward(self, x: Tensor) -> Tensor:
        height, width, step, reach = x.shape[2], x.shape[3], self.stride[0], self.kernel_size[0]
        above = (height - 1) // step * step + reach - height
        left = (width - 1) // step * step + reach - width
        x = F.pad(x, [left // 2, left - left // 2, above // 2, above - above // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "tensorflow": lambda: Same(8, 8, 4, stride=2, groups=2),
    "standardized": lambda: Standardized(8, 8, 3, stride=2, padding=1),
}
FAMILIES: dict[str, dict[str, Any]] = {
    "lora": {"bottleneck": 3},
    "parallel": {},
    "conv": {"bottleneck": 4},
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_survives(layer: str, family: str, tmp_path: Path) -> None:
    assert_survives(LAYERS[layer], tmp_path / "adapters.pt", family=family, **FAMILIES[family])


def test_dora_survives(tmp_path: Path) -> None:
    assert_survives(
        LAYERS["tensorflow"], tmp_path / "adapters.pt", family="lora", bottleneck=3, dora=True
    )


def test_sizes_of_an_exported_model_may_change() -> None:
    model = small_net()
    model.conv = Same(3, 4, 3, stride=2)
    injected(model, "conv", "lora", bottleneck=2)
    sizes = {
        2: torch.export.Dim("height", min=8, max=64),
        3: torch.export.Dim("width", min=8, max=64),
    }
    exported = torch.export.export(model, (torch.randn(2, 3, 17, 18),), dynamic_shapes=(sizes,))
    x = torch.randn(2, 3, 20, 21)
    torch.testing.assert_close(exported.module()(x), model(x))
