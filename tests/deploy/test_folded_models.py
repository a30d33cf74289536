"""Folding a set into a plain backbone: the original's keys, no hooks, the same outputs up to rounding."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from support import images, picture, private, scramble, small_net, small_resnet
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
def test_folded_is_a_plain_backbone_with_the_same_outputs(build: Any, arguments: Any, layers: str, dtype: torch.dtype) -> None:
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
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in folded.modules())
    bound = 4096 * torch.finfo(dtype).eps
    assert (plain.eval()(x) - expected).abs().max() <= bound * expected.abs().max()
    with resadapt.adapters_disabled(model):
        assert (model(x) - expected).abs().max() > 100 * bound * expected.abs().max(), "the adapters do something"


def test_flags_are_those_of_before_the_injection() -> None:
    model = small_resnet()
    model.conv1.requires_grad_(False)
    folded = resadapt.fold_adapters(resadapt.inject_adapters(model, "layer4.1.bn2", family="ssf", head="fc"))
    assert {name for name, p in folded.named_parameters() if not p.requires_grad} == {"conv1.weight"}
    assert isinstance(folded, ResNet)


def test_what_cannot_be_folded_is_named() -> None:
    model = resadapt.inject_adapters(small_resnet(), ["layer3", "layer4"])
    with pytest.raises(resadapt.AdapterError, match=r"'pooled' cannot be folded at 'layer3' \(BasicBlock\): it is not linear"):
        resadapt.fold_adapters(model)
    resadapt.inject_adapters(model, "layer4", family="series", name="block")
    with pytest.raises(resadapt.AdapterError, match=r"'layer4' \(BasicBlock\): BasicBlock is no convolution"):
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
        (Tied, "another module has its weight too"),
        (lambda: nn.Sequential(Rectified(3, 3, 1)), "Rectified is no convolution, Linear or norm of PyTorch's own"),
        (hooked, "has forward hooks from before the injection"),
        (patched, "its forward was replaced"),
    ],
)
@pytest.mark.parametrize("family", ["ssf", "series"])
def test_where_folding_would_give_something_else_it_is_refused(build: Any, message: str, family: str) -> None:
    model = build()
    resadapt.inject_adapters(model, next(name for name, _ in model.named_modules() if name), family=family)
    with pytest.raises(resadapt.AdapterError, match=message):
        resadapt.fold_adapters(model)


def test_a_later_hook_sees_the_same_in_the_folded_model() -> None:
    model, x = adapted(resnet18, "layer4.1.conv2", family="series"), images()
    model.layer4[1].conv2.register_forward_hook(lambda _module, _args, output: 2 * output)
    torch.testing.assert_close(resadapt.fold_adapters(model)(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_set_without_adapters_folds_into_its_head_and_norms() -> None:
    model = resadapt.inject_adapters(small_resnet(), (), head={"fc": nn.Linear(512, 7)}, norm="stats")
    model.train()(images())
    folded = resadapt.fold_adapters(model.eval())
    assert torch.equal(folded(images()), model(images()))
    small_resnet(classes=7).load_state_dict(folded.state_dict(), strict=True)


def test_combined_sets_are_weighted_sums(tmp_path: Any) -> None:
    model = small_resnet()
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        torch.manual_seed(seed)
        resadapt.inject_adapters(model, "layer4", 4, name=name, head={"fc": nn.Linear(512, 5)}, norm="affine+stats")
        model.train()(images(seed=seed))
    states = {name: resadapt.adapter_state_dict(model, name) for name in "abc"}
    assert resadapt.combine_adapters(model, {"a": 0.25, "b": -1, "c": 2.5}, "sum") is model
    for key, tensor in resadapt.adapter_state_dict(model).items():
        a, b, c = (states[name][key].double() for name in "abc")
        expected = (0.25 * a - b + 2.5 * c).to(tensor.dtype) if tensor.is_floating_point() else states["a"][key]
        assert torch.equal(tensor, expected)
    assert all(torch.equal(t, resadapt.adapter_state_dict(model, n)[k]) for n in "abc" for k, t in states[n].items())
    assert [info.name for info in resadapt.list_adapters(model) if info.active] == ["sum"]
    assert resadapt.save_adapters(model, tmp_path / "sum").ok
    resadapt.combine_adapters(model, {"a": 1}, "same")
    resadapt.set_active_adapters(model, "a")
    alone = model.eval()(images())
    resadapt.set_active_adapters(model, "same")
    assert torch.equal(model.eval()(images()), alone)


def test_a_variance_is_never_negative() -> None:
    model = small_net()
    for name, seed in (("a", 1), ("b", 2)):
        resadapt.inject_adapters(model, (), name=name, norm="stats")
        model.train()(images(seed=seed) * seed)
    before = picture(model)
    with pytest.raises(resadapt.AdapterError, match=r"'norms\.bn\.running_var' would be negative"):
        resadapt.combine_adapters(model, {"a": 1, "b": -1}, "c")
    assert picture(model) == before


def test_complex_tensors_are_summed() -> None:
    head = nn.Linear(4, 2, dtype=torch.complex64)
    model = small_net(head=head)
    for name in ("a", "b"):
        resadapt.inject_adapters(model, (), name=name, head="head")
        with torch.no_grad():
            private(model, "head", name).weight.add_(2j if name == "a" else 4j)
    resadapt.combine_adapters(model, {"a": 0.5, "b": 0.5}, "c")
    combined = private(model, "head", "c").weight
    torch.testing.assert_close(combined - model.head.weight, torch.full((2, 4), 3j))


@pytest.mark.parametrize(
    ("weights", "name", "error", "message"),
    [
        ({}, "s", resadapt.AdapterError, "give a mapping"),
        ({"a": float("nan")}, "s", resadapt.AdapterError, "not a finite number"),
        ({"a": True}, "s", resadapt.AdapterError, "not a finite number"),
        ({"x": 1}, "s", resadapt.AdapterKeyError, "no adapter set 'x'"),
        ({"a": 1, "b": 1}, "s", resadapt.AdapterKeyError, "differ in 'sites'"),
        ({"a": 1}, "b", resadapt.InjectionError, "set 'b' already"),
    ],
)
def test_sums_that_there_are_not(weights: Any, name: str, error: type[Exception], message: str) -> None:
    model = resadapt.inject_adapters(resadapt.inject_adapters(small_resnet(), "layer4", name="a"), "layer3", name="b")
    before = picture(model)
    with pytest.raises(error, match=message):
        resadapt.combine_adapters(model, weights, name)
    assert picture(model) == before


@pytest.mark.parametrize("active", ["a", "b", None])
def test_a_sum_has_the_head_of_its_sets_whichever_is_active(active: str | None) -> None:
    model, x = small_resnet(classes=5).eval(), images()
    for name in ("a", "b"):
        head = {"fc": nn.Sequential(nn.Linear(512, 4), nn.Sigmoid(), nn.Linear(4, 3))}
        resadapt.inject_adapters(model, "layer4", 4, name=name, head=head)
    resadapt.set_active_adapters(model, "a")
    expected = model.eval()(x)
    for order in (("a", "b"), ("b", "a")):
        resadapt.set_active_adapters(model, active)
        resadapt.combine_adapters(model, {name: float(name == "a") for name in order}, "sum")
        assert torch.equal(model.eval()(x), expected)
        assert [info.name for info in resadapt.list_adapters(model) if info.active] == ["sum"]
        resadapt.remove_adapters(model, "sum")


@pytest.mark.parametrize("name", ["a", "not a name", "train"])
def test_a_sum_that_cannot_be_put_in_leaves_the_model_as_it_was(name: str) -> None:
    model = resadapt.inject_adapters(small_resnet(), "layer4", 4, name="a", head="fc")
    before = picture(model)
    with pytest.raises(resadapt.AdapterError):
        resadapt.combine_adapters(model, {"a": 1.0}, name)
    assert picture(model) == before
    assert resadapt.list_adapters(model)[0].active


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
    with pytest.raises(resadapt.AdapterError, match=r"computes its (weight or )?bias from other tensors"):
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
    with pytest.raises(resadapt.AdapterError, match="gives other outputs than the model"):
        resadapt.fold_adapters(model)
    assert picture(model) == before


def test_a_sum_of_a_model_that_was_converted() -> None:
    for convert in (nn.Module.half, nn.Module.double):
        model = small_resnet()
        for name in ("a", "b"):
            resadapt.inject_adapters(model, "layer4", 4, name=name, head="fc", norm="affine")
        convert(model)
        states = [resadapt.adapter_state_dict(model, name) for name in ("a", "b")]
        assert {t.dtype for state in states for t in state.values() if t.is_floating_point()} == {model.conv1.weight.dtype}
        resadapt.combine_adapters(model, {"a": 0.3, "b": 0.7}, "sum")
        total = resadapt.adapter_state_dict(model, "sum")
        for key, tensor in total.items():
            if tensor.is_floating_point():
                expected = 0.3 * states[0][key].double() + 0.7 * states[1][key].double()
                assert torch.equal(tensor, expected.to(tensor.dtype)), key


def test_a_weight_of_a_sum_that_is_too_large() -> None:
    model = resadapt.inject_adapters(small_resnet(), "layer4", 4, name="a")
    with pytest.raises(resadapt.AdapterError, match="not a finite number"):
        resadapt.combine_adapters(model, {"a": 10**400}, "c")


def test_rounding_is_no_other_output() -> None:
    """What cancels out leaves rounding alone; in half precision rounding may decide what a model does."""
    torch.manual_seed(0)
    tail = (nn.InstanceNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), *tail)
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
    assert (resadapt.fold_adapters(model).runs, resadapt.inference_copy(model).runs, model.runs) == (0, 0, 0)
