"""`inference_copy` is independent, of stock modules that tools know, and gives the same."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import images, picture, scramble, small_net, small_resnet, train
from torch import Tensor, nn
from torch.ao.quantization import fuse_modules, get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, fuse_fx, prepare_fx
from torchvision.models import densenet121, quantization

import resadapt
from resadapt.injection.slots import AdapterSlot

X = images()


def trained(layers: Any = ("layer1", "layer2", "layer3", "layer4"), model: Any = None) -> Any:
    model = resadapt.inject_adapters(model or small_resnet(), layers, 8, head="fc")
    with torch.no_grad():
        for parameter in resadapt.trainable_parameters(model):
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize(
    "layers",
    [
        ("layer1", "layer2", "layer3", "layer4"),
        "layer*.*",
        ["conv1", "bn1", "maxpool"],
        ["layer2.0.conv1", "layer2.0", "layer2"],
    ],
)
def test_it_is_plain_independent_and_equal(layers: Any) -> None:
    model = trained(layers)
    model.train()
    before, expected = picture(model), model.eval()(X)
    model.train()
    plain = resadapt.inference_copy(model)
    assert picture(model) == before
    assert torch.equal(plain(X), expected)
    assert not any(module.training for module in plain.modules())
    assert not any(parameter.requires_grad for parameter in plain.parameters())
    assert resadapt.list_adapters(plain) == []
    for name, module in plain.named_modules():
        assert not isinstance(module, AdapterSlot)
        assert not module._forward_hooks, name
        assert not module._forward_pre_hooks, name
        assert not [attribute for attribute in module.__dict__ if "resadapt" in attribute]
        assert type(module).__module__.split(".")[:2] != ["resadapt", "injection"]
    with torch.no_grad():
        for tensor in plain.state_dict().values():
            tensor.zero_()
    assert torch.equal(model.eval()(X), expected)


def test_one_set_of_several() -> None:
    model = trained()
    expected = model(X)
    resadapt.inject_adapters(model, "layer4", 4, name="other", head="fc")
    other = model.eval()(X)
    assert torch.equal(resadapt.inference_copy(model)(X), other)
    assert torch.equal(resadapt.inference_copy(model, "default")(X), expected)
    with pytest.raises(resadapt.AdapterKeyError, match="There is no adapter set 'third'"):
        resadapt.inference_copy(model, "third")
    resadapt.set_active_adapters(model, None)
    with pytest.raises(
        resadapt.AdapterKeyError,
        match=r"No adapter set is active; the model has 'default', 'other'",
    ):
        resadapt.inference_copy(model)
    with pytest.raises(resadapt.InjectionError, match="was not injected into"):
        resadapt.inference_copy(small_net())


def test_hooks_of_ones_own_see_what_they_saw() -> None:
    model = small_net()
    seen: dict[str, list[Tensor]] = {"before": [], "after": []}
    model.c2.register_forward_hook(lambda _m, _a, output: seen["before"].append(output))
    resadapt.inject_adapters(model, "c2", 2)
    model.c2.register_forward_hook(
        lambda _m, _a, _k, output: seen["after"].append(output) or 2 * output, with_kwargs=True
    )
    expected = model.eval()(X)
    assert torch.equal(resadapt.inference_copy(model)(X), expected)
    for each in seen.values():
        assert torch.equal(each[0], each[-1])
    assert not torch.equal(seen["before"][0], seen["after"][0])


def test_wrapped_blocks_and_wrapped_models() -> None:
    torch._dynamo.reset()
    model = trained()
    expected = model(X)
    model.layer2 = torch.compile(model.layer2, backend="eager")
    plain = resadapt.inference_copy(nn.DataParallel(model))
    assert type(plain.layer2) is nn.Sequential
    assert torch.equal(plain(X), expected)


def test_a_model_that_cannot_be_copied() -> None:
    model = trained()
    model.cache = torch.zeros(1, requires_grad=True) * 2
    with pytest.raises(resadapt.AdapterError, match="cannot be copied"):
        resadapt.inference_copy(model)


def test_fusing_norms_into_convolutions() -> None:
    model = trained()
    plain = resadapt.inference_copy(model)
    fuse_modules(
        plain, [["conv1", "bn1", "relu"], ["layer4.1.0.conv2", "layer4.1.0.bn2"]], inplace=True
    )
    assert type(plain.bn1) is nn.Identity
    torch.testing.assert_close(plain(X), model(X), rtol=1e-4, atol=1e-4)
    model = trained(model=quantization.resnet18(weights=None, num_classes=3, quantize=False))
    plain = resadapt.inference_copy(model)
    plain.fuse_model()
    assert type(plain.layer4[1][0].bn2) is nn.Identity
    torch.testing.assert_close(plain(X), model(X), rtol=1e-4, atol=1e-4)


def test_quantizing_with_fx() -> None:
    model = trained()
    fused = fuse_fx(resadapt.inference_copy(model))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    torch.testing.assert_close(fused(X), model(X), rtol=1e-4, atol=1e-4)
    prepared = prepare_fx(
        resadapt.inference_copy(model), get_default_qconfig_mapping("onednn"), (X,)
    )
    torch.testing.assert_close(prepared(X), model(X), rtol=1e-4, atol=1e-4)
    quantized = convert_fx(prepared)
    assert (quantized(X) - model(X)).abs().max() < 0.2 * model(X).abs().max()


@pytest.mark.parametrize(
    "optimize", [lambda m: m, torch.jit.freeze, torch.jit.optimize_for_inference]
)
def test_scripting(optimize: Callable[[Any], Any]) -> None:
    model = trained("layer*.*")
    scripted = optimize(torch.jit.script(resadapt.inference_copy(model)))
    torch.testing.assert_close(scripted(X), model(X), rtol=1e-4, atol=1e-4)
    x = images(3, 64)
    torch.testing.assert_close(scripted(x), model(x), rtol=1e-4, atol=1e-4)


def test_scripting_is_exact_without_optimizing() -> None:
    model = trained()
    assert torch.equal(torch.jit.script(resadapt.inference_copy(model))(X), model(X))


def test_exporting() -> None:
    model = trained()
    program = torch.export.export(resadapt.inference_copy(model), (X,))
    torch.testing.assert_close(program.module()(X), model(X))


def test_another_architecture() -> None:
    model = resadapt.inject_adapters(
        densenet121(weights=None), ["features.transition1", "features.norm5"], 4
    )
    train(
        model, torch.optim.SGD(resadapt.trainable_parameters(model), lr=0.1), inputs=images(2, 64)
    )
    x = images(2, 64)
    assert torch.equal(resadapt.inference_copy(model)(x), model.eval()(x))


class TwoArguments(nn.Module):
    """As a decoder block: takes what comes from below, and a skip connection by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.block = Joins()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.block(x, skip=x)


class Joins(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        return self.conv(x) if skip is None else self.conv(x) + skip


def test_a_site_that_takes_several_arguments() -> None:
    model = resadapt.inject_adapters(TwoArguments(), "block", 2).eval()
    with torch.no_grad():
        model.block.resadapt.default.up.bias.add_(1)
    plain = resadapt.inference_copy(model)
    assert torch.equal(plain(X), model(X))
    assert torch.equal(torch.export.export(plain, (X,)).module()(X), model(X))
    assert isinstance(plain.block, nn.Sequential)


def test_weights_that_another_module_computes_with() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    resadapt.inject_adapters(model, "linear1", 2, family="lora", example_input=x)
    scramble(model.linear1.resadapt)
    with pytest.raises(
        resadapt.AdapterError, match="The outputs of the copy differ from the model's"
    ):
        resadapt.inference_copy(model)


def test_a_copy_keeps_a_mixture_of_dtypes_and_the_outputs() -> None:
    model: Any = resadapt.inject_adapters(
        small_net().bfloat16(), ("conv", "bn"), 2, head="head", norm="affine+stats"
    )
    for module in model.modules():
        if isinstance(module, AdapterSlot):
            scramble(module)
    seen: list[torch.dtype] = []
    hook = model.head.register_forward_hook(lambda _m, args, _o: seen.append(args[0].dtype))
    x, model = X.bfloat16(), model.eval()
    expected = model(x)
    plain = resadapt.inference_copy(model)
    seen.clear()
    for copied in (plain, copy.deepcopy(plain)):
        assert torch.equal(copied(x), expected)
    assert seen == [torch.bfloat16] * 2, "once in each run"
    assert torch.equal(torch.fx.symbolic_trace(plain)(x), expected)
    assert plain.head.in_features == 4
    assert plain.head[0].weight.dtype == torch.float32
    assert plain.float()(X).dtype == torch.float32
    with pytest.raises(AttributeError, match="in_channels"):
        _ = plain.head.in_channels
    hook.remove()
    uniform = resadapt.inference_copy(copy.deepcopy(model).bfloat16())
    assert type(uniform.head) is nn.Linear
    assert torch.allclose(uniform(x), expected, rtol=0.05, atol=0.05)
    torch.jit.script(uniform)
