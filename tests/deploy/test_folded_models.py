"""Folding a set into a plain backbone: its own keys, no hooks, the same outputs up to rounding."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from support import images, picture, scramble, small_resnet
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torchvision.models import ResNet, resnet18, resnext50_32x4d

import resadapt
from resadapt.adapters import FAMILIES

LINEAR: list[tuple[dict[str, Any], str]] = [
    ({"family": "series"}, "layer*.*.conv2"),
    ({"family": "ssf"}, "layer*.*.bn2"),
    ({"family": "ssf"}, "layer*.*.bn?"),
    ({"family": "parallel"}, "layer*.*.conv?"),
    ({"family": "lora", "bottleneck": 2}, "layer*.*.conv?"),
    ({"family": "lora", "bottleneck": 2, "dora": True}, "layer*.*.conv?"),
]


def adapted(build: Any, layers: str, **arguments: Any) -> Any:
    torch.manual_seed(0)
    model = build(num_classes=3)
    model.train()(images())
    resadapt.inject_adapters(model, layers, head="fc", norm="affine+stats", **arguments)
    model.train()(images())
    for module in model.modules():
        if isinstance(module, resadapt.Adapter):
            scramble(module)
            for parameter in module.parameters():
                parameter.data.mul_(0.1)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("arguments", "layers"), LINEAR)
@pytest.mark.parametrize("build", [resnet18, resnext50_32x4d])
def test_folded_is_a_plain_backbone_with_the_same_outputs(
    build: Any, arguments: Any, layers: str, dtype: torch.dtype
) -> None:
    if build is resnext50_32x4d:
        layers = layers.replace("2", "3")
    model, x = adapted(build, layers, **arguments).to(dtype), images().to(dtype)
    before, expected = picture(model), model(x)
    folded = resadapt.fold_adapters(model)
    assert picture(model) == before
    plain = build(num_classes=3).to(dtype)
    plain.load_state_dict(folded.state_dict(), strict=True)
    assert list(folded.state_dict()) == list(plain.state_dict())
    assert [(name, type(module)) for name, module in folded.named_modules()] == [
        (name, type(module)) for name, module in plain.named_modules()
    ]
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in folded.modules()
    )
    bound = 4096 * torch.finfo(dtype).eps
    assert (plain.eval()(x) - expected).abs().max() <= bound * expected.abs().max()
    with resadapt.adapters_disabled(model):
        assert (model(x) - expected).abs().max() > 100 * bound * expected.abs().max(), (
            "the adapters do something"
        )


def test_flags_are_those_of_before_the_injection() -> None:
    model = small_resnet()
    model.conv1.requires_grad_(False)
    folded = resadapt.fold_adapters(
        resadapt.inject_adapters(model, "layer4.1.bn2", family="ssf", head="fc")
    )
    assert {name for name, p in folded.named_parameters() if not p.requires_grad} == {
        "conv1.weight"
    }
    assert isinstance(folded, ResNet)


def test_what_cannot_be_folded_is_named() -> None:
    model = resadapt.inject_adapters(small_resnet(), ["layer3", "layer4"])
    with pytest.raises(
        resadapt.AdapterError,
        match=r"'pooled' cannot be folded at 'layer3' \(BasicBlock\): it is not linear",
    ):
        resadapt.fold_adapters(model)
    resadapt.inject_adapters(model, "layer4", family="series", name="block")
    with pytest.raises(
        resadapt.AdapterError, match=r"'layer4' \(BasicBlock\): BasicBlock is not a convolution"
    ):
        resadapt.fold_adapters(model, "block")


class Tied(nn.Module):
    """Two convolutions with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.b.weight = self.a.weight

    def forward(self, x: Any) -> Any:
        return self.b(self.a(x))


class Rectified(nn.Conv2d):
    """Computes something else than a convolution."""

    def _conv_forward(self, *args: Any) -> Any:
        return super()._conv_forward(*args).relu()


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 3, 1))
    model[0].register_forward_hook(lambda _module, _args, output: 2 * output)
    return model


def patched() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 3, 1))
    forward = model[0].forward
    model[0].forward = lambda x: forward(x).relu()  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (Tied, "its weight is shared with another module"),
        (
            lambda: nn.Sequential(Rectified(3, 3, 1)),
            "the forward of Rectified is not a convolution of the padded input",
        ),
        (hooked, "has forward hooks from before the injection"),
        (patched, "its forward was replaced"),
    ],
)
@pytest.mark.parametrize("family", ["ssf", "series"])
def test_where_folding_would_give_something_else_it_is_refused(
    build: Any, message: str, family: str
) -> None:
    model = build()
    resadapt.inject_adapters(
        model, next(name for name, _ in model.named_modules() if name), family=family
    )
    with pytest.raises(resadapt.AdapterError, match=message):
        resadapt.fold_adapters(model)


def test_a_later_hook_sees_the_same_in_the_folded_model() -> None:
    model, x = adapted(resnet18, "layer4.1.conv2", family="series"), images()
    model.layer4[1].conv2.register_forward_hook(lambda _module, _args, output: 2 * output)
    torch.testing.assert_close(resadapt.fold_adapters(model)(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_set_without_adapters_folds_into_its_head_and_norms() -> None:
    model = resadapt.inject_adapters(
        small_resnet(), (), head={"fc": nn.Linear(512, 7)}, norm="stats"
    )
    model.train()(images())
    folded = resadapt.fold_adapters(model.eval())
    assert torch.equal(folded(images()), model(images()))
    small_resnet(classes=7).load_state_dict(folded.state_dict(), strict=True)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda module: module.weight, "folded returned Parameter"),
        (lambda module: (module.weight[:1], None), "folded returned"),
        (lambda module: (module.weight, torch.zeros(64)), "folded returned"),
        (lambda module: None, "folded returned None"),
        (lambda module: module.nothing, "AttributeError: .*nothing"),
    ],
)
def test_what_a_family_of_ones_own_folds_into(result: Any, message: str) -> None:
    class Odd(resadapt.Adapter):
        def __init__(self, site: Any) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

        def folded(self, module: nn.Module) -> Any:
            return result(module)

    resadapt.register_family("odd")(Odd)
    try:
        model = resadapt.inject_adapters(small_resnet(), "layer1.0.conv1", family="odd")
        with pytest.raises(resadapt.AdapterError, match=rf"'layer1.0.conv1' \(Conv2d\): {message}"):
            resadapt.fold_adapters(model)
    finally:
        FAMILIES.pop("odd")


def _pruned(module: nn.Module) -> None:
    prune.l1_unstructured(module, "bias", amount=0.5)


def _parametrized(module: nn.Module) -> None:
    parametrize.register_parametrization(module, "bias", nn.Softplus())


@pytest.mark.parametrize("computed", [_pruned, _parametrized])
@pytest.mark.parametrize("family", ["series", "ssf", "lora", "parallel"])
def test_a_bias_that_is_computed_cannot_take_anything_up(computed: Any, family: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    computed(model[0])
    resadapt.inject_adapters(model, {"0": 2} if family == "lora" else "0", family=family)
    model(torch.randn(1, 3, 8, 8))
    with pytest.raises(
        resadapt.AdapterError, match=r"computes its (weight or )?bias from other tensors"
    ):
        resadapt.fold_adapters(model)


class Elsewhere(nn.Module):
    """Its weight is used once more, or only, by a function."""

    def __init__(self, only: bool) -> None:
        super().__init__()
        self.conv, self.only = nn.Conv2d(3, 3, 3, padding=1), only

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x if self.only else self.conv(x), self.conv.weight, padding=1)


@pytest.mark.parametrize("only", [False, True])
def test_a_weight_that_is_used_elsewhere_too_is_found_out(only: bool) -> None:
    model = resadapt.inject_adapters(Elsewhere(only).eval(), "conv", family="parallel", init="he")
    before = picture(model)
    with pytest.raises(resadapt.AdapterError, match="outputs of the copy differ from the model"):
        resadapt.fold_adapters(model)
    assert picture(model) == before


def test_rounding_is_no_other_output() -> None:
    """What cancels out leaves rounding alone; in half precision rounding may decide what a model
    does.
    """
    torch.manual_seed(0)
    tail = (nn.InstanceNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), *tail
    )
    resadapt.inject_adapters(model, "2", 2, family="lora", init="normal")
    resadapt.fold_adapters(model)

    class Deciding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, dtype=torch.bfloat16)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x.bfloat16())
            return (y > y.median()).float()

    coarse = resadapt.inject_adapters(Deciding(), "conv", 2, family="lora", init="normal")
    scramble(coarse.conv.resadapt)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", resadapt.AdapterWarning)
        resadapt.fold_adapters(coarse)


def test_neither_model_nor_copy_is_used_up() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.runs = nn.Conv2d(3, 8, 3), 0

        def forward(self, x: Tensor) -> Tensor:
            self.runs += 1
            return self.conv(x).mean((2, 3))

    model = resadapt.inject_adapters(Counting(), "conv", 2, family="lora")
    assert (
        resadapt.fold_adapters(model).runs,
        resadapt.inference_copy(model).runs,
        model.runs,
    ) == (0, 0, 0)
