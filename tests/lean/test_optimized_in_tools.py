"""An optimized backbone in compilers, tracers, torch.func, checkpointing and autocast."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from optimized import compare, measured, near
from support import images, small_resnet
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock, ResNet

import resadapt


def test_tools_that_take_models_apart() -> None:
    """Compilers, tracers, torch.func, checkpointing, autocast: the layers are stock ones there, or
    do as these ask.
    """
    model = resadapt.inject_adapters(small_resnet(), init="normal")
    x = images(4, 32)
    plain = model.eval()(x)
    expected = measured(model.train(), x)
    resadapt.optimize_backbone(model)
    assert torch.equal(fx.GraphModule(model, fx.Tracer().trace(model.eval()))(x), plain)
    torch.testing.assert_close(torch.jit.trace(model.eval(), x)(x), plain)
    parameters = {
        name: parameter.detach() for name, parameter in resadapt.named_trainable_parameters(model)
    }

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x[None],)).square().mean()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    alone = torch.func.grad(loss)(parameters, x[0])
    for name, gradient in each.items():
        assert (gradient[0] - alone[name]).norm() <= 0.1 * alone[name].norm()
    forwards = []
    for _ in range(2):
        along = torch.ones_like(x)
        forwards.append(torch.func.jvp(lambda x: model(x), (x,), (along,))[1])
        with torch.autograd.forward_ad.dual_level():
            output = model(torch.autograd.forward_ad.make_dual(x, along))
            forwards.append(torch.autograd.forward_ad.unpack_dual(output).tangent)
        resadapt.restore_backbone(model)
    for each in forwards:
        near(each, forwards[-1])
    resadapt.optimize_backbone(model.train(), fold_norms=False)
    torch.manual_seed(1)
    output = checkpoint(model, x.clone().requires_grad_(), use_reentrant=False)
    for ours, theirs in zip(
        torch.autograd.grad(output.square().mean(), list(resadapt.trainable_parameters(model))),
        expected[2],
        strict=True,
    ):
        near(ours, theirs)
    with torch.autocast("cpu", torch.bfloat16):
        lean = measured(model, x)
        stock = measured(resadapt.restore_backbone(model), x)
    assert torch.equal(lean[1], stock[1])
    for ours, theirs in zip(lean[2], stock[2], strict=True):
        assert (ours - theirs).norm() <= 0.1 * theirs.norm()
    second = []
    for _ in range(2):
        torch.manual_seed(1)
        (gradient,) = torch.autograd.grad(model(x.requires_grad_()).sum(), x, create_graph=True)
        trained = list(resadapt.trainable_parameters(model))
        second.append(torch.autograd.grad(gradient.square().sum(), trained, allow_unused=True))
        resadapt.optimize_backbone(model)
    assert any(gradient is not None for gradient in second[0])
    for ours, theirs in zip(*second, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            near(ours, theirs)


def test_compiled_it_keeps_as_little() -> None:
    """As without compiling, where a compiler keeps of stock layers what they keep; the second time
    with sizes of its choice.
    """
    net = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3)  # compiles in half of a resnet18's time
    model = resadapt.inject_adapters(
        net, ("layer1", "layer3"), head="fc", dropout=None, init="normal"
    ).eval()
    stock = torch.compile(copy.deepcopy(model), backend="aot_eager_decomp_partition")
    lean = torch.compile(
        resadapt.optimize_backbone(model), backend="aot_eager_decomp_partition", fullgraph=True
    )
    for x in (images(4, 64), images(6, 48)):
        kept, *results = zip(measured(stock, x), measured(lean, x), strict=True)
        assert kept[1] * 10 < kept[0]
        compare(results[0][1], results[0][0], fold=True)
        for theirs, ours in zip(*results[1], strict=True):
            compare(ours, theirs, fold=True)


class Ignores(nn.Module):
    """Has a layer change its input in place, and does not look at what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self.relu(x)
        return x


@pytest.mark.parametrize("compiled", [False, True])
def test_a_layer_that_changes_its_input(compiled: bool) -> None:
    torch.manual_seed(0)
    model, x = resadapt.inject_adapters(Ignores(), "first", family="ssf").eval(), images()
    expected = measured(model, x)
    resadapt.optimize_backbone(model)
    run: Any = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    found = measured(run, x)
    assert torch.equal(found[1], expected[1])
    for ours, theirs in zip(found[2], expected[2], strict=True):
        compare(ours, theirs, fold=True)


def test_exported_it_is_the_stock_backbone() -> None:
    model = resadapt.optimize_backbone(
        resadapt.inject_adapters(small_resnet(), init="normal")
    ).eval()
    x = images()
    for strict in (True, False):
        program = torch.export.export(model, (x,), strict=strict)
        assert not [
            node
            for node in program.graph.nodes
            if "resadapt" in str(node.target) and node.op == "call_function"
        ]
        torch.testing.assert_close(program.module()(x), model(x))


def test_feature_extractors_find_the_same_nodes() -> None:
    """Layers that are called twice have two nodes, as layers of torch.nn have."""
    model, x = resadapt.inject_adapters(small_resnet(), "layer4", 4).eval(), images()
    names = ["layer1.0.relu", "layer1.0.relu_1", "maxpool", "layer2.0.conv1"]
    expected = create_feature_extractor(model, names)(x)
    found = create_feature_extractor(resadapt.optimize_backbone(model, fold_norms=False), names)(x)
    assert all(torch.equal(found[name], expected[name]) for name in names)
    assert "__module__" not in vars(resadapt.restore_backbone(model).relu)
    resadapt.remove_adapters(resadapt.optimize_backbone(model))
    assert "__module__" not in vars(model.relu)


def test_gradients_in_batches() -> None:
    model, x = resadapt.inject_adapters(small_resnet(), "layer*", 4).eval(), images(1, 32)
    expected = torch.autograd.functional.jacobian(model, x, vectorize=True)
    compare(
        torch.autograd.functional.jacobian(resadapt.optimize_backbone(model), x, vectorize=True),
        expected,
        fold=True,
    )
    for fold in (True, False):
        resadapt.optimize_backbone(model.to(memory_format=torch.channels_last), fold_norms=fold)
        compare(torch.autograd.functional.jacobian(model, x, vectorize=True), expected, fold=True)


def test_another_default_device() -> None:
    model, x = (
        resadapt.optimize_backbone(resadapt.inject_adapters(small_resnet(), "layer1", 4)),
        images(),
    )
    with torch.device("meta"):
        model(x).square().sum().backward()
