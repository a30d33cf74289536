"""An optimized backbone: the same outputs and gradients, a fraction of the memory, and nothing that others could trip over."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from measuring import bytes_saved
from support import images, picture, small_resnet
from torch import Tensor, fx, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor

import resadapt
from resadapt.base.overlay import Overlay
from resadapt.base.tensors import CHANNELS_LAST
from resadapt.lean.bits import packed, unpacked
from resadapt.lean.functions import FrozenConvolution, FrozenNorm, PackedReLU, SmallIndexPool
from resadapt.lean.layers import LeanMaxPool2d


@given(st.lists(st.sampled_from([-1.0, -0.0, 0.0, 0.5, float("nan"), float("inf"), -float("inf")]), max_size=40))
def test_bits_are_those_of_the_mask(values: list[float]) -> None:
    x = torch.tensor(values, requires_grad=True)
    bits = packed(torch.relu(x).detach())
    assert bits.dtype == torch.uint8
    assert len(bits) == (len(values) + 7) // 8
    (passes,) = torch.autograd.grad(torch.relu(x).sum(), x)
    assert (unpacked(bits, len(values), torch.float16) > 0).tolist() == passes.bool().tolist()


@pytest.mark.parametrize("double", [gradcheck, gradgradcheck])
def test_functions_against_finite_differences(double: Callable[..., bool]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(6, 2, 3, 2, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    assert double(lambda x: FrozenConvolution.apply(x, weight, bias, (2, 1), (1, 0), (1, 2), 2), x)
    mean, var, scale, shift = torch.randn(4, 4, dtype=torch.float64).unbind()
    assert double(lambda x: FrozenNorm.apply(x, mean, var.abs(), scale, shift, 1e-3), x)
    assert double(lambda x: FrozenNorm.apply(x, mean, var.abs(), None, None, 1e-3), x)
    assert double(lambda x: PackedReLU.apply(x, False), x)
    assert double(lambda x: SmallIndexPool.apply(x, (3, 2), (2, 1), (1, 0), (1, 2), False)[0], x)


@given(
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.booleans(),
    st.booleans(),
)
def test_pooling_of_any_geometry(kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool, last: bool) -> None:
    padding = tuple(min(size, side // 2) for size, side in zip(padding, kernel, strict=True))
    layer = nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=ceil_mode)
    x = torch.randint(-3, 4, (2, 3, 9, 8)).float()  # with ties
    x[0, 0, 4, 4] = float("nan")
    x = x.to(memory_format=torch.channels_last if last else torch.contiguous_format).requires_grad_()
    results = []
    for kind in (nn.MaxPool2d, LeanMaxPool2d):
        layer.__class__ = kind
        out = layer(x)
        results.append((out, *torch.autograd.grad(out, x, torch.arange(out.numel()).reshape(out.shape).float())))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("form", ["contiguous", "channels_last", "strided", "expanded", "empty", "scalar"])
def test_relu_of_any_layout(form: str, inplace: bool) -> None:
    torch.manual_seed(0)
    x = {
        "contiguous": torch.randn(3, 5, 7, 2),
        "channels_last": torch.randn(3, 5, 7, 2).to(memory_format=torch.channels_last),
        "strided": torch.randn(6, 5, 7, 2)[::2, :, 1:6].transpose(1, 2),
        "expanded": torch.randn(3, 1, 7, 1).expand(3, 5, 7, 2),
        "empty": torch.randn(0, 5),
        "scalar": torch.randn(()),
    }[form].requires_grad_()
    results = []
    for run in (lambda h: PackedReLU.apply(h, inplace), torch.relu):
        out = run(x * 1)
        results.append((out, *torch.autograd.grad(out, x, out.detach() + 1)))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


FOLD = pytest.mark.parametrize("fold", [True, False], ids=["folded", "exact"])


def compare(ours: Tensor, theirs: Tensor, fold: bool) -> None:
    """The same to the last bit, or as far as another order of rounding lets them be."""
    if fold:
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))
    else:
        assert torch.equal(ours, theirs)


def near(ours: Tensor, theirs: Tensor) -> None:
    """Gradients: as far as rounding lets them be, some of whose elements are differences of much larger numbers."""
    allowed = 1e-7 if theirs.dtype is torch.float64 else 0.01
    assert (ours - theirs).norm() <= allowed * theirs.norm(), (ours, theirs)


def measured(model: nn.Module, x: Tensor) -> tuple[int, Tensor, list[Tensor]]:
    """Bytes saved for backward that are not the model's own, the output, and the gradients of what is trained."""
    training = model.training
    with torch.no_grad():
        model.eval()(x)  # so that what is folded is there: constants, as the weights are
    model.train(training)
    torch.manual_seed(1)  # the same dropout
    saved, output = bytes_saved(model, x)
    output = output["out"] if isinstance(output, dict) else output
    gradients = torch.autograd.grad(output.square().mean(), list(resadapt.trainable_parameters(model)))
    return saved, output.detach(), list(gradients)


BUILDS: dict[str, tuple[Callable[[], nn.Module], str, Any, float]] = {
    "resnet18": (lambda: models.resnet18(num_classes=3), "layer*", images(2, 64), 50),
    "resnext50": (lambda: models.resnext50_32x4d(num_classes=3), "layer*.*.conv2", images(2, 64), 3),
    "deeplabv3": (
        lambda: models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=3),
        "backbone.layer[34]",
        images(2, 64),
        5,
    ),
    "r3d_18": (lambda: models.video.r3d_18(num_classes=3), "layer*", torch.randn(1, 3, 4, 32, 32), 20),
    "mc3_18": (lambda: models.video.mc3_18(num_classes=3), "layer2", torch.randn(1, 3, 4, 32, 32), 5),
    "vgg11_bn": (lambda: models.vgg11_bn(num_classes=3), "features.1", images(2, 32), 4),
    "densenet121": (lambda: models.densenet121(num_classes=3), "features.norm0", images(2, 32), 10),
}


@FOLD
@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_equal_to_the_plain_backbone_with_less_memory(name: str, training: bool, fold: bool) -> None:
    build, layers, x, times = BUILDS[name]
    torch.manual_seed(0)
    family = "pooled" if layers.startswith("layer*") and "conv" not in layers else "bottleneck"
    model = resadapt.inject_adapters(build(), layers, 4, family=family, init="normal").train(training)
    if fold:  # in float64, so that rounding, which differs by the machine, hides nothing
        model, x = model.double(), x.double()
        resadapt.accept_backbone(model)
    plain = measured(model, x)
    before = picture(model)
    lean = measured(resadapt.optimize_backbone(model, fold_norms=fold), x)
    compare(lean[1], plain[1], fold)
    for ours, theirs in zip(lean[2], plain[2], strict=True):
        near(ours, theirs)
    assert lean[0] * times < plain[0], (lean[0], plain[0])
    resadapt.restore_backbone(model)
    assert picture(model) == before
    assert resadapt.check_backbone(model).ok


def test_float64_is_the_judge() -> None:
    """Gradients of the optimized backbone in float32 are as near to those in float64 as the plain one's."""
    torch.manual_seed(0)
    model = resadapt.inject_adapters(small_resnet(), init="normal").train()
    x = images(4, 64)
    plain = measured(model, x)[2]
    lean = measured(resadapt.optimize_backbone(model), x)[2]
    exact = measured(resadapt.restore_backbone(model).double(), x.double())[2]
    errors = [
        max(float((ours.double() - right).norm() / right.norm()) for ours, right in zip(found, exact, strict=True))
        for found in (plain, lean)
    ]
    assert errors[1] < 2 * errors[0] + 1e-6


PLACES = dict.fromkeys(("pooled", "bottleneck", "mona", "series"), "layer*") | {
    **{"lora": "layer*.*.conv2", "parallel": "layer*.*.conv1", "conv": "layer*.*.conv1", "ssf": "layer*.*.bn1"}
}


@FOLD
@pytest.mark.parametrize("family", PLACES)
def test_every_family(family: str, fold: bool) -> None:
    torch.manual_seed(0)
    model = resadapt.inject_adapters(small_resnet(), PLACES[family], family=family, head="fc").train()
    with torch.no_grad():
        for parameter in resadapt.trainable_parameters(model):
            parameter.add_(0.05 * torch.randn_like(parameter))
    x = images(4, 32)
    plain, lean = measured(model, x), measured(resadapt.optimize_backbone(model, fold_norms=fold), x)
    compare(lean[1], plain[1], fold)
    for ours, theirs in zip(lean[2], plain[2], strict=True):
        near(ours, theirs)
    assert lean[0] < plain[0]


@FOLD
def test_what_is_trained_runs_as_the_stock_layer(fold: bool) -> None:
    """A set with norms and a head of its own, beside one without: switched while the backbone is optimized."""
    torch.manual_seed(0)
    model = resadapt.inject_adapters(small_resnet(), name="plain", init="normal")
    resadapt.inject_adapters(model, name="own", norm="affine+stats", head=["fc", "layer4.1.conv2"], init="normal")
    x, found = images(4, 32), {}
    for optimized in (False, True):
        if optimized:
            resadapt.optimize_backbone(model, fold_norms=fold)
        for name in ("plain", "own", "plain", "own"):
            resadapt.set_active_adapters(model, name)
            state = copy.deepcopy(model.state_dict())
            result = measured(model.train(), x)
            model.load_state_dict(state)  # the statistics that the set's own norms moved
            before = found.setdefault(name, result)
            compare(result[1], before[1], fold)
            for ours, theirs in zip(result[2], before[2], strict=True):
                near(ours, theirs)
    names = ["plain", None, "own", "plain"]
    with resadapt.adapters_for(model.eval(), names):
        mixed = model(x)
    resadapt.restore_backbone(model)
    with resadapt.adapters_for(model, names):
        compare(mixed, model(x), fold)


@FOLD
def test_files_do_not_know_of_it(fold: bool, tmp_path: Path) -> None:
    model = resadapt.inject_adapters(small_resnet(), head="fc", init="normal")
    resadapt.optimize_backbone(model, fold_norms=fold)
    optimizer = torch.optim.SGD(resadapt.trainable_parameters(model), 0.1)
    model.train()(images(4, 32)).square().mean().backward()
    optimizer.step()
    assert resadapt.check_backbone(model).ok
    report = resadapt.save_adapters(model, tmp_path / "set.pt", rebuild=small_resnet)
    assert report.ok
    assert report["outputs"].outcome == "passed"
    for optimized in (False, True):
        fresh = small_resnet()
        resadapt.load_adapters(fresh, tmp_path / "set.pt")
        if optimized:
            resadapt.optimize_backbone(fresh, fold_norms=fold)
        compare(fresh.eval()(images()), model.eval()(images()), fold)
        assert resadapt.verify_adapters(fresh, tmp_path / "set.pt", rebuild=small_resnet).ok
    with torch.no_grad():
        model.layer1[0].conv1.weight.add_(1e-3)
    assert not resadapt.check_backbone(model).ok


def test_copies_and_removal() -> None:
    model = small_resnet()
    before, x = picture(model), images()
    resadapt.optimize_backbone(resadapt.inject_adapters(model, init="normal")).eval()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other.conv1).__name__ == "LeanConv2d"
        assert torch.equal(other(x), model(x))
    plain = resadapt.inference_copy(model)
    assert type(plain.conv1) is nn.Conv2d
    assert not any(type(module).__module__.startswith("resadapt.lean") for module in plain.modules())
    resadapt.optimize_backbone(model)  # once more is no more
    resadapt.remove_adapters(model)
    assert picture(model) == before
    with pytest.raises(resadapt.InjectionError, match="was not injected into"):
        resadapt.optimize_backbone(model)


def test_a_set_that_comes_later() -> None:
    model = resadapt.optimize_backbone(resadapt.inject_adapters(small_resnet(), name="first"))
    resadapt.inject_adapters(model, "layer*.*.conv1", 2, family="lora", name="second")
    measured(model.train(), images(4, 32))
    resadapt.remove_adapters(model, "first")
    assert type(model.bn1).__name__ == "LeanBatchNorm2d"
    measured(model, images(4, 32))


@FOLD
@pytest.mark.parametrize("family", PLACES)
def test_an_optimized_backbone_is_what_it_was_to_sets(family: str, fold: bool, tmp_path: Path) -> None:
    """Injected into it, saved from it and loaded into it: heads of its layers too, and stages, which are Sequentials."""
    plain = resadapt.inject_adapters(small_resnet(), name="before")
    model = resadapt.optimize_backbone(resadapt.inject_adapters(small_resnet(), name="before"), fold_norms=fold)
    classes = [type(module) for module in model.modules()]
    for each in (plain, model):
        torch.manual_seed(0)
        resadapt.inject_adapters(each, PLACES[family], family=family, name="later", head=["fc", "layer4.0.downsample.0"])
    assert resadapt.read_adapter_info(saved(model, tmp_path / "model.pt")).set == (
        resadapt.read_adapter_info(saved(plain, tmp_path / "plain.pt")).set
    )
    assert (tmp_path / "model.pt").read_bytes() == (tmp_path / "plain.pt").read_bytes()
    fresh = resadapt.optimize_backbone(resadapt.inject_adapters(small_resnet(), name="before"), fold_norms=fold)
    resadapt.load_adapters(fresh, tmp_path / "plain.pt")
    compare(fresh.eval()(images()), plain.eval()(images()), fold)
    for each in (model, fresh, plain):
        resadapt.remove_adapters(each, "later")
    assert [type(module) for module in model.modules()] == [type(module) for module in fresh.modules()] == classes
    suggested = [str(resadapt.suggest_layers(each, 700_000, family=family, layers=PLACES[family])) for each in (model, plain)]
    assert suggested[0] == suggested[1]


def saved(model: nn.Module, path: Path) -> Path:
    assert resadapt.save_adapters(model, path, rebuild=small_resnet).ok
    return path


def test_tools_that_take_models_apart() -> None:
    """Compilers, tracers, torch.func, checkpointing, autocast: the layers are stock ones there, or do as these ask."""
    model = resadapt.inject_adapters(small_resnet(), init="normal")
    x = images(4, 32)
    plain = model.eval()(x)
    expected = measured(model.train(), x)
    resadapt.optimize_backbone(model)
    assert torch.equal(fx.GraphModule(model, fx.Tracer().trace(model.eval()))(x), plain)
    torch.testing.assert_close(torch.jit.trace(model.eval(), x)(x), plain)
    parameters = {name: parameter.detach() for name, parameter in resadapt.named_trainable_parameters(model)}

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
        torch.autograd.grad(output.square().mean(), list(resadapt.trainable_parameters(model))), expected[2], strict=True
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


@pytest.mark.parametrize(("layers", "family"), [(("layer1", "layer3"), "pooled"), ("conv1", "ssf")])
def test_compiled_it_keeps_as_little(layers: Any, family: str) -> None:
    """As without compiling, where a compiler keeps of stock layers what they keep; the second time with sizes of its choice."""
    start = {"init": "normal"} if family == "pooled" else {}
    model = resadapt.inject_adapters(small_resnet(), layers, family=family, head="fc", dropout=None, **start).eval()
    stock = torch.compile(copy.deepcopy(model), backend="aot_eager_decomp_partition")
    lean = torch.compile(resadapt.optimize_backbone(model), backend="aot_eager_decomp_partition", fullgraph=True)
    for x in (images(4, 64), images(6, 48)):
        kept, *results = zip(measured(stock, x), measured(lean, x), strict=True)
        assert kept[1] * (20 if family == "pooled" else 2) < kept[0]
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
    model = resadapt.optimize_backbone(resadapt.inject_adapters(small_resnet(), init="normal")).eval()
    x = images()
    for strict in (True, False):
        program = torch.export.export(model, (x,), strict=strict)
        assert not [node for node in program.graph.nodes if "resadapt" in str(node.target) and node.op == "call_function"]
        torch.testing.assert_close(program.module()(x), model(x))


def test_folded_norms_follow_what_they_were_made_from() -> None:
    """Weights that are loaded, moved or cast after the first forward count, and copies do not share what is folded."""
    model = resadapt.optimize_backbone(resadapt.inject_adapters(small_resnet(), init="normal")).eval()
    x = images()
    before = model(x)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.layer1[0].bn1.running_mean.add_(1)
        other.layer2[0].downsample[0].weight.mul_(2)
    compare(model(x), before, fold=True)
    with torch.inference_mode():
        other(x)
    other(x).sum().backward()  # with what was folded then
    folded = other(x)
    assert not torch.allclose(folded, before, rtol=1e-2)
    compare(folded, resadapt.restore_backbone(other)(x), fold=True)
    resadapt.optimize_backbone(other).double()
    compare(other(x.double()), resadapt.restore_backbone(other)(x.double()), fold=True)


def test_nothing_is_folded_where_something_could_see_it() -> None:
    model = resadapt.optimize_backbone(resadapt.inject_adapters(small_resnet(), name="first")).eval()
    x, seen = images(), []
    model(x)
    plain = resadapt.restore_backbone(model)(x)
    hooks = [model.layer1[0].conv1.register_forward_hook(lambda *args: seen.append(args[2]))]
    hooks.append(model.layer1[0].bn2.register_forward_pre_hook(lambda *args: seen.append(args[1][0])))
    model(x)
    expected, seen[:] = list(seen), []
    resadapt.optimize_backbone(model)
    compare(model(x), plain, fold=True)
    for ours, theirs in zip(seen, expected, strict=True):
        compare(ours, theirs, fold=True)
    for hook in hooks:
        hook.remove()
    calls = []
    with torch.nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(module)):
        model(x)
    assert model.layer1[0].bn1 in calls, "a profiler's hooks on all modules see each of them"
    resadapt.inject_adapters(model, "layer1.0.conv1", 2, family="lora", name="second")
    with torch.no_grad():
        for parameter in resadapt.trainable_parameters(model):
            parameter.add_(torch.randn_like(parameter))
    adapted = model.eval()(x)
    compare(adapted, resadapt.restore_backbone(model)(x), fold=True)
    assert not torch.allclose(adapted, plain, rtol=1e-3)


def test_an_adapted_network_without_gradients_is_folded_too() -> None:
    model = resadapt.optimize_backbone(resadapt.inject_adapters(small_resnet(), init="normal")).eval()
    calls = []
    batch_norm = torch.nn.functional.batch_norm
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "batch_norm", lambda *args: calls.append(1) or batch_norm(*args))
        model(images())
        assert not calls
        resadapt.restore_backbone(model)(images())
        assert len(calls) == 20
        flat = resadapt.inject_adapters(models.vgg11_bn(num_classes=3), "features.27", example_input=images())
        calls.clear()
        resadapt.optimize_backbone(flat).eval()(images())
    assert not calls, "in a long Sequential too"


def test_a_parametrized_weight_keeps_its_gradient() -> None:
    model = resadapt.optimize_backbone(resadapt.inject_adapters(small_resnet(), init="normal"))
    convolution = model.layer4[1].conv2
    torch.nn.utils.parametrizations.weight_norm(convolution)
    convolution.parametrizations.weight.original1.requires_grad_()
    model.train()(images(4, 32)).square().mean().backward()
    assert convolution.parametrizations.weight.original1.grad.any()


class Viewing(nn.Module):
    """Its forward is nobody's but its own, and looks at how a feature map lies in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(*list(models.resnet18().children())[:-2])
        self.plain = nn.Sequential(nn.Conv2d(512, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk(x)
        x = self.plain(x.view(x.shape[0], 512, 2, 2))
        return self.fc(x.view(x.shape[0], -1))


@pytest.mark.parametrize("training", [True, False])
def test_nobody_notices_how_feature_maps_lie_in_memory(training: bool) -> None:
    torch.manual_seed(0)
    model = resadapt.inject_adapters(Viewing(), "trunk.7", 4, head="fc", init="normal", dropout=0.0).train(training)
    x, seen = images(2, 64), []
    model.trunk[5][0].register_forward_hook(lambda _module, _args, output: seen.append(output.stride()))
    model.trunk[6][1].conv2.register_forward_pre_hook(lambda _module, args: seen.append(args[0].stride()))
    plain = model(x)
    compare(resadapt.optimize_backbone(model)(x), plain, True)
    assert seen[:2] == seen[2:]


@pytest.mark.parametrize("case", ["order", "segmentation", "maps"])
def test_random_numbers_are_drawn_as_by_the_plain_backbone(case: str) -> None:
    """In the same order, and for the same places."""
    torch.manual_seed(0)
    x, model = images(2, 64).double(), models.resnet18(num_classes=3)
    if case == "order":
        resadapt.inject_adapters(model, ["layer2.0.downsample.0", "layer2.0.conv1"], 64, init="normal", dropout=0.5)
    elif case == "maps":
        resadapt.inject_adapters(model, "layer*.*", 8, family="bottleneck", init="normal")
        for place in ("layer1.0", "layer2.1"):
            model.get_submodule(place).register_forward_hook(lambda _m, _a, output: nn.functional.dropout(output, 0.5))
    else:
        model = models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, num_classes=3, aux_loss=True)
        resadapt.inject_adapters(model, "backbone.layer4", 8, init="normal")
    model.double().train()
    resadapt.accept_backbone(model)
    outputs = []
    for _ in range(2):
        torch.manual_seed(1)
        output = model(x)
        outputs.append(output["out"] if isinstance(output, dict) else output)
        resadapt.optimize_backbone(model)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-9, atol=1e-9 * float(outputs[0].abs().max()))


def test_hooks_run_in_the_order_of_the_plain_backbone() -> None:
    model = resadapt.inject_adapters(small_resnet(), "layer4", 4).eval()
    order: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _m, _a, _o, name=name: order.append(name))
    model(images())
    plain = order.copy()
    order.clear()
    resadapt.optimize_backbone(model)(images())
    assert order == plain


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.ones(()))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor


def test_a_weight_that_is_parametrized_afterwards() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), nn.Conv2d(8, 8, 1))
    model: Any = resadapt.inject_adapters(net, "1", 4).eval()
    resadapt.optimize_backbone(model)
    x, convolution = images(), model[0][0]
    model(x)
    parametrize.register_parametrization(convolution, "weight", Scaled())
    with torch.no_grad():
        for factor in range(30):
            convolution.parametrizations.weight[0].factor.fill_(factor)
            expected = model[1](model[0][2](model[0][1](convolution(x))))
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    resadapt.restore_backbone(model)
    assert type(convolution).__bases__ == (nn.Conv2d,)
    resadapt.optimize_backbone(model)
    resadapt.remove_adapters(model)
    assert not any(issubclass(type(module), Overlay) for module in model.modules())


def test_another_eps_is_noticed() -> None:
    model = resadapt.optimize_backbone(resadapt.inject_adapters(small_resnet(), "layer4", 4)).eval()
    x = images()
    model(x)
    model.layer1[0].bn1.eps = 0.1
    compare(model(x), resadapt.restore_backbone(model)(x), True)


@pytest.mark.parametrize("size", [{"kernel_size": (2,)}, {"stride": (2,)}, {"padding": (1,)}, {"stride": []}, {"dilation": [1]}])
def test_poolings_with_sizes_of_one_number(size: dict[str, Any]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(**{"kernel_size": 3, **size}))
    model, x = resadapt.inject_adapters(net, "0", 2, init="normal").eval(), images()
    plain = torch.autograd.grad(model(x).square().sum(), list(resadapt.trainable_parameters(model)))
    resadapt.optimize_backbone(model)
    for ours, theirs in zip(
        torch.autograd.grad(model(x).square().sum(), list(resadapt.trainable_parameters(model))), plain, strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_convolution_with_two_norms_in_threads() -> None:
    """As RetinaNet-like heads have it: each call folds another norm."""
    torch.manual_seed(0)
    shared = nn.Conv2d(8, 8, 3, padding=1)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3)
            self.one, self.other = (nn.Sequential(shared, nn.BatchNorm2d(8)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.one(h) - self.other(h)

    model, x = Net(), images(1, 16)
    for norm in (model.one[1], model.other[1]):
        norm.running_var.uniform_(0.5, 4)  # type: ignore[operator, union-attr]
    resadapt.inject_adapters(model, "first", 4)
    expected = resadapt.optimize_backbone(model).eval()(x)
    wrong: list[float] = []

    def work() -> None:
        with torch.no_grad():
            for _ in range(200):
                if not torch.allclose(out := model(x), expected, atol=1e-5):
                    wrong.append(float((out - expected).abs().max()))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert not wrong


def lies(x: Tensor) -> tuple[bool, bool]:
    """How a tensor lies in memory: strides of sides of one pixel say nothing."""
    return x.is_contiguous(), x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("inputs", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [32, 100])
@pytest.mark.parametrize("fold", [True, False])
def test_feature_maps_lie_as_those_of_the_plain_backbone(weights: Any, inputs: Any, size: int, fold: bool) -> None:
    """Of feature maps where a hook sees them, of the output of a part, and of the gradient of the input."""
    model = resadapt.inject_adapters(small_resnet(), "layer[24].*", family="ssf", head="fc").eval().to(memory_format=weights)
    x = images(2, size).contiguous(memory_format=inputs).requires_grad_()
    seen: list[Any] = []
    for name in ("conv1", "maxpool", "layer2", "layer3.0", "layer4.0.conv1"):
        model.get_submodule(name).register_forward_hook(lambda _m, args, output: seen.extend((lies(args[0]), lies(output))))
    for _ in range(2):
        (gradient,) = torch.autograd.grad(model(x).sum(), x)
        trunk = nn.Sequential(*list(model.children())[:-2])
        seen += [lies(gradient), lies(trunk(x))]
        resadapt.optimize_backbone(model, fold_norms=fold)
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]


@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("inputs", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("batch", [2, 16])
def test_the_gradient_of_a_convolution_lies_as_the_stock_ones(
    batch: int, kernel: int, stride: int, groups: int, inputs: Any, weights: Any
) -> None:
    """torch has other kernels for small batches, and tells from the input's strides, which are not there, how to lay it out."""
    torch.manual_seed(0)
    weight = torch.randn(8, 8 // groups, kernel, kernel).contiguous(memory_format=weights)
    x = torch.randn(batch, 8, 6, 5).contiguous(memory_format=inputs).requires_grad_()
    geometry = ((stride, stride), (kernel // 2, kernel // 2), (1, 1), groups)
    outputs = [torch.nn.functional.conv2d(x, weight, None, *geometry), FrozenConvolution.apply(x, weight, None, *geometry)]
    gradients = [torch.autograd.grad(out, x, torch.ones_like(outputs[0]))[0] for out in outputs]
    assert torch.equal(*outputs)
    assert lies(outputs[0]) == lies(outputs[1])
    assert torch.equal(*gradients)
    assert lies(gradients[0]) == lies(gradients[1])


def test_the_gradient_of_the_input_lies_as_ever_where_nothing_is_seen_on_the_way() -> None:
    model, x = resadapt.inject_adapters(small_resnet(), "layer*.*", family="ssf").eval(), images(2, 96).requires_grad_()
    gradients = []
    for _ in range(2):
        gradients += torch.autograd.grad(model(x).sum(), x)
        resadapt.optimize_backbone(model)
    assert lies(gradients[0]) == lies(gradients[1])
    compare(gradients[1], gradients[0], True)


@pytest.mark.parametrize("checkpointed", ["blocks", "a stage's forward"])
def test_checkpointed_activations_that_lie_otherwise_the_second_time(checkpointed: str) -> None:
    """Blocks that are run again on their own know of smaller images than when the whole model ran them."""
    model = resadapt.inject_adapters(small_resnet(), "layer1", 4, init="normal", dropout=0.0).train()
    if checkpointed == "blocks":
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, models.resnet.BasicBlock))
    else:
        forward = model.layer3.forward
        model.layer3.forward = lambda x: checkpoint(forward, x, use_reentrant=False)
    x = images(2, 128)
    gradients = []
    for _ in range(2):
        gradients.append(torch.autograd.grad(model(x).square().mean(), list(resadapt.trainable_parameters(model))))
        resadapt.optimize_backbone(model)
    for theirs, ours in zip(*gradients, strict=True):
        near(ours, theirs)


@pytest.mark.parametrize("size", [64, 128])
def test_a_hook_that_changes_what_a_block_is_given(size: int) -> None:
    model, x = resadapt.inject_adapters(small_resnet(), "layer4", 4).eval(), images(2, size)
    for name in ("layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1"):
        model.get_submodule(name).register_forward_pre_hook(lambda _, args: args[0].mul_(0.5) is None or None)
    expected = model(x)
    compare(resadapt.optimize_backbone(model)(x), expected, fold=True)


def test_weights_that_do_not_show_when_they_are_written_to_are_not_folded() -> None:
    with torch.inference_mode():
        model = resadapt.optimize_backbone(resadapt.inject_adapters(small_resnet(), "layer4", 4)).eval()
        x = images()
        model(x)
        model.load_state_dict({k: 1.3 * v if v.is_floating_point() else v for k, v in model.state_dict().items()})
        found = model(x)
        compare(found, resadapt.restore_backbone(model)(x), fold=True)


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
    compare(torch.autograd.functional.jacobian(resadapt.optimize_backbone(model), x, vectorize=True), expected, fold=True)
    for fold in (True, False):
        resadapt.optimize_backbone(model.to(memory_format=torch.channels_last), fold_norms=fold)
        compare(torch.autograd.functional.jacobian(model, x, vectorize=True), expected, fold=True)


def test_another_default_device() -> None:
    model, x = resadapt.optimize_backbone(resadapt.inject_adapters(small_resnet(), "layer1", 4)), images()
    with torch.device("meta"):
        model(x).square().sum().backward()


def test_gradients_of_feature_maps_lie_as_those_of_the_plain_backbone() -> None:
    """Where a hook on a tensor sees them, between blocks too."""
    model, seen = resadapt.inject_adapters(small_resnet(), "layer2", 4).eval(), []
    for name in ("layer2", "layer3", "layer4.0"):
        model.get_submodule(name).register_forward_hook(
            lambda *args: args[2].register_hook(lambda gradient: seen.append(lies(gradient))) and None
        )
    for _ in range(2):
        model(images(1, 128)).sum().backward()
        resadapt.optimize_backbone(model)
    assert len(seen) == 6
    assert seen[:3] == seen[3:]


@pytest.mark.parametrize(
    ("layer", "sizes"),
    [
        (nn.Conv3d(4, 6, (1, 3, 3), padding=(0, 1, 1)), (4, 3, 6, 5)),
        (nn.Conv3d(4, 6, 1), (4, 3, 6, 5)),
        (nn.Conv2d(4, 4, 1, groups=4), (4, 6, 5)),
        (nn.Conv2d(4, 4, 3, groups=4), (4, 6, 5)),
        (nn.MaxPool2d(2), (4, 6, 6)),
        (nn.BatchNorm2d(4), (4, 6, 5)),
        (nn.BatchNorm3d(4), (4, 3, 6, 5)),
    ],
)
@pytest.mark.parametrize("last", [(True, True), (True, False), (False, True)])
def test_gradients_of_layers_lie_as_the_stock_ones(layer: nn.Module, sizes: tuple[int, ...], last: tuple[bool, bool]) -> None:
    """Whether channels come last in their input, and in the gradient of their output."""
    model = resadapt.inject_adapters(nn.Sequential(nn.Conv1d(1, 1, 1), copy.deepcopy(layer)), "0", family="ssf").eval()
    formats = [CHANNELS_LAST[len(sizes) + 1] if each else torch.contiguous_format for each in last]
    torch.manual_seed(0)
    x = torch.randn(2, *sizes).contiguous(memory_format=formats[0]).requires_grad_()
    gradients = []
    for _ in range(2):
        out = model[1](x)
        gradients += torch.autograd.grad(out, x, torch.ones_like(out).contiguous(memory_format=formats[1]))
        resadapt.optimize_backbone(model, fold_norms=False)
    assert gradients[0].stride() == gradients[1].stride()
    compare(gradients[1], gradients[0], fold=True)
