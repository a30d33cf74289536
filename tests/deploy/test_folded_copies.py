"""Inference copies that are folded, cast and in another memory format."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import images, picture, scramble, small_net
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops import FrozenBatchNorm2d

import resadapt
from resadapt import inference_copy

pytestmark = pytest.mark.filterwarnings("ignore:The head or norms 'head':resadapt.AdapterWarning")
X = images()


def tiny(block: Any = BasicBlock, **options: Any) -> nn.Module:
    """A ResNet of one block a stage, whose norms have seen data."""
    torch.manual_seed(0)
    model = ResNet(block, [1, 1, 1, 1], num_classes=3, **options).train()
    with torch.no_grad():
        model(images(8))
    return model


def adapted(layers: Any, build: Callable[[], nn.Module] = tiny, **options: Any) -> Any:
    model = resadapt.inject_adapters(build(), layers, **options).eval()
    with torch.no_grad():
        for parameter in resadapt.trainable_parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


CASES: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "lora": (lambda: adapted("layer*.*.conv*", bottleneck=4, family="lora", head="fc"), []),
    "pooled": (lambda: adapted("layer*", bottleneck=8, head="fc"), []),
    "own norms": (lambda: adapted("layer4", bottleneck=8, norm="affine+stats"), []),
    "at norms": (lambda: adapted("layer1.*.bn?", family="ssf"), []),
    "behind norms": (lambda: adapted("layer1.*.bn1", bottleneck=8, family="bottleneck"), []),
    "between": (
        lambda: adapted("layer*.0.conv2", bottleneck=8, family="conv"),
        [f"layer{number}.0.bn2" for number in (1, 2, 3, 4)],
    ),
    "groups": (
        lambda: adapted(
            "layer4.*", lambda: tiny(Bottleneck, groups=8, width_per_group=8), bottleneck=8
        ),
        [],
    ),
    "half": (lambda: adapted("layer4", lambda: tiny().bfloat16(), bottleneck=8), []),
}


@pytest.mark.parametrize("case", CASES)
def test_a_folded_copy_in_half_precision(case: str) -> None:
    build, kept = CASES[case]
    model = build()
    before, dtype = picture(model), next(model.parameters()).dtype
    with warnings.catch_warnings():
        warnings.simplefilter("error", resadapt.AdapterWarning)  # within the stated bound
        plain = inference_copy(
            model, dtype=torch.bfloat16, memory_format=torch.channels_last, fold=True
        )
    assert picture(model) == before
    assert norms(plain) == kept
    assert {tensor.dtype for tensor in plain.state_dict().values()} <= {torch.bfloat16, torch.int64}
    assert plain.layer2[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert not any(parameter.requires_grad for parameter in plain.parameters())
    expected = model(X.to(dtype)).float()
    assert (plain(X.bfloat16()).float() - expected).abs().max() <= 0.05 * expected.abs().max()
    # Weights are folded in float64, whatever the dtypes of model and copy are.
    wide = inference_copy(model, dtype=torch.float64, fold=True)
    torch.testing.assert_close(wide(X.double()), model.double()(X.double()), rtol=1e-9, atol=1e-9)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, wide.state_dict()[name].to(tensor.dtype)), name


def test_linear_adapters_leave_a_plain_backbone() -> None:
    model = CASES["lora"][0]()
    plain, backbone = inference_copy(model, fold=True), tiny()
    assert [name for name, _ in plain.named_modules()] == [n for n, _ in backbone.named_modules()]
    torch.testing.assert_close(plain(X), model(X), rtol=1e-4, atol=1e-4)


class Activated(nn.BatchNorm2d):
    """Computes something else than a norm."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Rectified(nn.Conv2d):
    """Computes something else than a convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Pair(nn.Module):
    """A convolution, a norm and a head; the forward is given."""

    def __init__(
        self,
        forward: Callable[[Any, Tensor], Any] = lambda net, x: net.norm(net.conv(x)),
        conv: nn.Module | None = None,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.conv, self.norm = conv or nn.Conv2d(3, 4, 3, bias=False), norm or nn.BatchNorm2d(4)
        self.head, self._forward = nn.Linear(4, 3), forward

    def forward(self, x: Tensor) -> Any:
        return self._forward(self, x)


def _keeps(net: Any, x: Tensor) -> Tensor:
    net.features = net.conv(x)
    return net.norm(net.features)


def _skips(net: Any, x: Tensor) -> Tensor:
    y = net.conv(x)
    return net.norm(y) + y


def _returns(net: Any, x: Tensor) -> Any:
    y = net.conv(x)
    return {"output": net.norm(y), "features": y}


def _with_hook(place: str) -> nn.Module:
    net = Pair()
    net.get_submodule(place).register_forward_hook(lambda _module, _args, output: output * 2)
    return net


APART: dict[str, Callable[[], nn.Module]] = {
    "convolution run twice": lambda: Pair(
        lambda net, x: net.norm(net.conv(x)) + net.conv(x).mean()
    ),
    "norm run twice": lambda: Pair(
        lambda net, x: net.norm(net.conv(x)) + net.norm(torch.ones(1, 4, 1, 1))
    ),
    "used again": lambda: Pair(_skips),
    "changed before": lambda: Pair(lambda net, x: net.norm(net.conv(x).relu_())),
    "a view": lambda: Pair(lambda net, x: net.norm(net.conv(x).flip(3))),
    "returned": lambda: Pair(_returns),
    "kept": lambda: Pair(_keeps),
    "weight read": lambda: Pair(lambda net, x: net.norm(net.conv(x)) + net.conv.weight.mean()),
    "statistics read": lambda: Pair(
        lambda net, x: net.norm(net.conv(x)) + net.norm.running_mean[0]
    ),
    "norm before": lambda: Pair(lambda net, x: net.conv(net.norm(x)), norm=nn.BatchNorm2d(3)),
    "hook of the convolution": lambda: _with_hook("conv"),
    "hook of the norm": lambda: _with_hook("norm"),
    "another norm": lambda: Pair(norm=Activated(4)),
    "another convolution": lambda: Pair(conv=Rectified(3, 4, 3)),
    "computed weight": lambda: Pair(conv=nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))),
    "no statistics": lambda: Pair(norm=nn.BatchNorm2d(4, track_running_stats=False)),
    "unbatched": lambda: Pair(lambda net, x: net.norm(net.conv(x[0])), norm=nn.BatchNorm1d(30)),
}


@pytest.mark.parametrize("case", APART)
def test_a_norm_that_may_be_needed_stays(case: str) -> None:
    net = scramble(APART[case]())
    resadapt.inject_adapters(net, (), head="head", example_input=X).eval()
    plain = inference_copy(net, fold=True)
    assert isinstance(plain.norm, _BatchNorm)
    torch.testing.assert_close(plain(X), net(X), rtol=1e-4, atol=1e-4)


TOGETHER: dict[str, Callable[[], nn.Module]] = {
    "plain": Pair,
    "by keyword": lambda: Pair(lambda net, x: net.norm(input=net.conv(x))),
    "bias": lambda: Pair(conv=nn.Conv2d(3, 4, 3)),
    "no affine": lambda: Pair(norm=nn.BatchNorm2d(4, affine=False)),
    "frozen in torchvision": lambda: Pair(norm=FrozenBatchNorm2d(4, eps=0.1)),
    "transposed": lambda: Pair(
        lambda net, x: net.norm(net.conv(torch.cat([x, x], 1))),
        nn.ConvTranspose2d(6, 4, 3, groups=2),
    ),
    "circular": lambda: Pair(conv=nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")),
    "two convolutions": lambda: Pair(
        conv=nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 4, 3, bias=False))
    ),
    "two names": lambda: Pair(norm=nn.Sequential(nn.BatchNorm2d(4))),
}


@pytest.mark.parametrize("case", TOGETHER)
def test_a_norm_behind_a_convolution_is_folded(case: str) -> None:
    net: Any = scramble(TOGETHER[case]())
    if case == "two names":
        net.alias = net.norm[0]
    resadapt.inject_adapters(net, (), head="head", example_input=X).eval().double()
    plain: Any = inference_copy(net, fold=True)
    kinds = {type(module) for module in plain.modules()}
    assert nn.Identity in kinds
    assert not kinds & {nn.BatchNorm2d, FrozenBatchNorm2d}
    torch.testing.assert_close(plain(X.double()), net(X.double()), rtol=1e-10, atol=1e-10)


def test_video_in_its_memory_format() -> None:
    net = scramble(Pair(conv=nn.Conv3d(3, 4, 3), norm=nn.BatchNorm3d(4)))
    model, clip = resadapt.inject_adapters(net, (), head="head").eval(), torch.randn(2, 3, 4, 8, 8)
    plain: Any = inference_copy(model, memory_format=torch.channels_last_3d, fold=True)
    assert plain.conv.weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert isinstance(plain.norm, nn.Identity)
    torch.testing.assert_close(plain(clip), model(clip), rtol=1e-4, atol=1e-4)
    with pytest.raises(resadapt.AdapterError, match=r"channels_last does not fit .*_3d for 3-D"):
        inference_copy(model, memory_format=torch.channels_last)


def test_nothing_is_folded_where_nothing_can_be_run() -> None:
    class Strict(Pair):
        def forward(self, x: Tensor) -> Any:
            if x.shape[-1] != 20:
                raise ValueError("pictures of 20 pixels")
            return super().forward(x)

    for example in (None, images(size=20)):
        net = resadapt.inject_adapters(Strict(), (), head="head", example_input=example)
        found = type(inference_copy(net, fold=True).norm)
        assert found is (nn.BatchNorm2d if example is None else nn.Identity)


def test_a_cast_that_changes_the_outputs() -> None:
    class Deciding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return (y > y.median()).float()

    model = resadapt.inject_adapters(Deciding(), (), head="head")
    with pytest.warns(
        resadapt.AdapterWarning,
        match=r"copy in torch.bfloat16 differ from the model's by 1 .* and at most 0.5 is usual",
    ):
        inference_copy(model, dtype=torch.bfloat16)
    with pytest.warns(resadapt.AdapterWarning, match=r"torch.float16 differ .* at most 0.1 is"):
        inference_copy(model, dtype=torch.float16)

    class Constant(Pair):
        def forward(self, x: Tensor) -> Any:
            return torch.nn.functional.linear(x, torch.ones(3, x.shape[-1]))

    model = resadapt.inject_adapters(Constant(), (), head="head")
    with pytest.raises(resadapt.AdapterError, match="copy fails where the model runs: RuntimeErr"):
        inference_copy(model, dtype=torch.bfloat16)


def test_statistics_beyond_float16() -> None:
    """The channel would be constant, which the outputs hardly show."""
    net: Any = Pair()
    net.norm.running_var[0] = 1e6
    model = resadapt.inject_adapters(net, (), head="head", example_input=images())
    with pytest.warns(
        resadapt.AdapterWarning, match=r"Values of 'norm.running_var' are .* float16 \(6.55e\+04\)"
    ):
        inference_copy(model, dtype=torch.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("error", resadapt.AdapterWarning)
        inference_copy(model, dtype=torch.float16, fold=True)
        inference_copy(model, dtype=torch.bfloat16)


def test_another_model_is_no_rounding() -> None:
    """Half precision hides no error: the outputs are compared before the cast too."""
    model: Any = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    resadapt.inject_adapters(model, "linear1", 2, family="lora", example_input=x)
    scramble(model.linear1.resadapt)
    with torch.no_grad():
        model.linear1.resadapt.default.up.weight.mul_(0.1)
        expected = model(x)
        with resadapt.adapters_disabled(model):
            assert (model(x) - expected).abs().max() < 0.25 * expected.abs().max()
    with pytest.raises(resadapt.AdapterError, match="outputs of the copy differ"):
        inference_copy(model, dtype=torch.bfloat16)


def test_bad_arguments() -> None:
    model = resadapt.inject_adapters(small_net(), "conv", 2)
    for dtype in (torch.int8, torch.complex64, "bfloat16", 16):
        with pytest.raises(resadapt.AdapterError, match=r"dtype=.*: give a floating-point dtype"):
            inference_copy(model, dtype=dtype)  # type: ignore[arg-type]
    for memory_format in (torch.preserve_format, "channels_last", True):
        with pytest.raises(resadapt.AdapterError, match=r"memory_format=.*: give torch.channels"):
            inference_copy(model, memory_format=memory_format)  # type: ignore[arg-type]
    with pytest.raises(resadapt.AdapterError, match="fold=1 is int: pass True or False"):
        inference_copy(model, fold=1)  # type: ignore[arg-type]
