"""Hooks survive whatever PyTorch does to a model: same numbers, independent copies."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import backbone_bytes, images, private, scramble, small_net, small_resnet, train
from torch import Tensor, nn, optim
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.feature_extraction import create_feature_extractor

import resadapt


@pytest.fixture
def model() -> nn.Module:
    """An injected model that has been trained far enough for its adapters to matter."""
    model = resadapt.inject_adapters(small_resnet(), head="fc", bottleneck=8)
    train(model, optim.AdamW(model.parameters(), lr=0.1))
    return model.eval()


X = images()


def _torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _torch_save]
)
@pytest.mark.parametrize("ran", [False, True])
def test_copies_are_equal_and_independent(
    model: nn.Module, copier: Callable[[nn.Module], nn.Module], ran: bool
) -> None:
    if not ran:
        fresh = resadapt.inject_adapters(small_resnet(), head="fc", bottleneck=8).eval()
        resadapt.load_adapter_state_dict(fresh, resadapt.adapter_state_dict(model))
        model = fresh
    twin = copier(model)
    expected = model(X)
    assert torch.equal(twin(X), expected)
    train(twin, optim.SGD(twin.parameters(), lr=1.0))
    assert torch.equal(model.eval()(X), expected), "training the copy changes the original"
    assert not torch.equal(twin.eval()(X), expected), "the copy runs its own adapters"
    resadapt.remove_adapters(twin)
    assert torch.equal(model(X), expected)
    with resadapt.adapters_disabled(model):
        assert torch.equal(twin.eval()(X), model(X))


def test_a_pickle_is_read_by_another_process(model: nn.Module, tmp_path: Path) -> None:
    torch.save(model, tmp_path / "model.pt")
    torch.save((X, model(X)), tmp_path / "io.pt")
    script = f"""
        import torch
        model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
        x, y = torch.load({str(tmp_path / "io.pt")!r})
        assert torch.equal(model(x), y)
        import resadapt
        assert resadapt.check_backbone(model).ok
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(model: nn.Module, dtype: torch.dtype) -> None:
    expected = model(X)
    assert torch.allclose(
        model.to(dtype)(X.to(dtype)).float(),
        expected,
        rtol=0.1,
        atol=0.1 * expected.abs().max().item(),
    )
    assert resadapt.check_backbone(model).ok == (dtype == torch.float64), (
        "a wider dtype holds the same numbers"
    )


def test_memory_format_and_autocast(model: nn.Module) -> None:
    expected = model(X)
    assert torch.allclose(model.to(memory_format=torch.channels_last)(X), expected, atol=1e-5)
    assert resadapt.check_backbone(model).ok
    with torch.autocast("cpu", torch.bfloat16):
        output = model(X)
    assert torch.allclose(
        output.float(), expected, rtol=0.1, atol=0.1 * expected.abs().max().item()
    )
    fresh = resadapt.inject_adapters(small_resnet(), head="fc", bottleneck=8, dropout=0.0).eval()
    with torch.autocast("cpu", torch.bfloat16):
        fresh(X).float().square().sum().backward()
    _same_gradients(fresh, lambda m: m(X).square().sum(), rtol=0.3)


def _same_gradients(model: nn.Module, loss: Callable[[nn.Module], Tensor], rtol: float) -> None:
    """Compares the gradients that the parameters hold with those of an eager float32 step."""
    got = [p.grad.clone() for p in resadapt.trainable_parameters(model)]
    model.zero_grad()
    loss(model).backward()
    for gradient, parameter in zip(got, resadapt.trainable_parameters(model), strict=True):
        scale = parameter.grad.abs().max().item()
        assert scale > 0
        assert torch.allclose(gradient, parameter.grad, rtol=rtol, atol=rtol * scale)


def test_slicing_and_feature_extractors(model: nn.Module) -> None:
    sliced = nn.Sequential(*list(model.children())[:-1])
    taken: list[Tensor] = []
    handle = model.avgpool.register_forward_hook(lambda m, a, o: taken.append(o))
    model(X)
    handle.remove()
    assert torch.equal(sliced(X), taken[0])
    seen: list[Tensor] = []
    model.layer4[-1].register_forward_hook(lambda m, a, o: seen.append(o))
    model(X)
    assert torch.equal(IntermediateLayerGetter(model, {"layer4": "out"})(X)["out"], seen[0])
    assert torch.equal(create_feature_extractor(model, ["layer4"])(X)["layer4"], seen[0])
    with resadapt.adapters_disabled(model):
        model(X)
    assert not torch.equal(seen[-1], seen[0]), "what layer4[-1] gives is adapted"


def test_grad_cam(model: nn.Module) -> None:
    """Activations and gradients at layer4[-1] are those of the adapted output."""
    kept: dict[str, Tensor] = {}

    def keep(_m: nn.Module, _a: object, output: Tensor) -> None:
        kept["activation"] = output
        if output.requires_grad:
            output.register_hook(lambda gradient: kept.__setitem__("gradient", gradient))

    model.layer4[-1].register_forward_hook(keep)
    model(X)[:, 0].sum().backward()
    positions = kept["activation"][0, 0].numel()
    assert torch.allclose(model.fc(kept["activation"].mean((2, 3))), model(X), atol=1e-5), (
        "what the head sees is this activation"
    )
    expected = (private(model, "fc").weight[0] / positions)[None, :, None, None].expand_as(
        kept["gradient"]
    )
    assert torch.allclose(kept["gradient"], expected, atol=1e-7)
    with resadapt.adapters_disabled(model):
        adapted = kept["activation"]
        model(X)
    assert not torch.allclose(kept["activation"], adapted)


@pytest.mark.parametrize("training", [False, True])
def test_torch_fx(model: nn.Module, training: bool) -> None:
    model.train(training)
    traced = torch.fx.symbolic_trace(model)
    torch.manual_seed(0)
    expected = model(X)
    torch.manual_seed(0)
    assert torch.equal(traced(X), expected)


def test_jit_trace(model: nn.Module) -> None:
    traced = torch.jit.trace(model, X)
    assert torch.equal(traced(X), model(X))
    larger = images(3, 64)
    assert torch.allclose(traced(larger), model(larger), atol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
def test_export(model: nn.Module, strict: bool) -> None:
    if strict and torch.__version__.startswith("2.4"):
        pytest.skip("torch 2.4 exports no model that has a hook of its own with strict=True")
    program = torch.export.export(model, (X,), strict=strict)
    assert torch.allclose(program.module()(X), model(X), atol=1e-6)


@pytest.mark.parametrize("ran", [False, True])
def test_compile_fullgraph(ran: bool) -> None:
    torch._dynamo.reset()
    small = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()),
    )
    plain = copy.deepcopy(small).eval()
    model = resadapt.inject_adapters(small, ["0", "3"], 4, dropout=0.0)
    with torch.no_grad():
        for parameter in resadapt.trainable_parameters(model):
            parameter.normal_()
    if ran:
        model(X)
    frozen = backbone_bytes(model)
    compiled = torch.compile(model, fullgraph=True)
    for mode in (False, True):
        model.train(mode)
        assert torch.allclose(compiled(X), model(X), atol=1e-4)
    compiled(X).sum().backward()
    got = [p.grad.clone() for p in resadapt.trainable_parameters(model)]
    model.zero_grad()
    model(X).sum().backward()
    for ours, eager in zip(got, resadapt.trainable_parameters(model), strict=True):
        assert torch.allclose(ours, eager.grad, rtol=1e-3, atol=1e-3)
    assert backbone_bytes(model) == frozen
    adapted = model(X)
    with resadapt.adapters_disabled(compiled):
        disabled = compiled(X)
        assert torch.allclose(disabled, model(X), atol=1e-4)
        assert torch.allclose(disabled, plain(X), atol=1e-4)
        assert not torch.allclose(disabled, adapted, atol=1e-2)
    assert torch.allclose(compiled(X), model(X), atol=1e-4)
    assert resadapt.count_parameters(compiled).trainable > 0
    resadapt.remove_adapters(model)
    model.eval()
    assert torch.allclose(compiled(X), model(X), atol=1e-4)


def test_compile_of_a_resnet(model: nn.Module) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(X), model(X), atol=1e-5)
    for dropout in (module for module in model.modules() if isinstance(module, nn.Dropout)):
        dropout.p = 0.0
    model.train()
    model.zero_grad()
    compiled(X).sum().backward()
    _same_gradients(model, lambda m: m(X).sum(), rtol=1e-3)
    assert resadapt.check_backbone(model).ok


@pytest.mark.parametrize("training", [False, True])
def test_sets_of_every_form_switch_in_a_compiled_model(training: bool) -> None:
    torch._dynamo.reset()
    parts = (
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    model = nn.Sequential(*parts, nn.Linear(4, 3))
    resadapt.inject_adapters(model, "3", 4, name="pooled", head="6", dropout=0.0)
    resadapt.inject_adapters(
        model, "0", 2, name="wide", family="lora", head={"6": nn.Linear(4, 7)}, norm="affine"
    )
    deep = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    resadapt.inject_adapters(
        model, "1", name="deep", family="ssf", head={"6": deep}, norm="affine+stats"
    )
    resadapt.inject_adapters(model, (), name="other", head={"1": nn.GroupNorm(2, 4)})
    for name in ("pooled", "wide", "deep", "other"):
        resadapt.set_active_adapters(model, name)
        for parameter in resadapt.trainable_parameters(model):
            nn.init.normal_(parameter)
    model.train(training)
    eager, compiled = (
        copy.deepcopy(model),
        torch.compile(model, fullgraph=True, backend="aot_eager"),
    )
    for name in ("pooled", "wide", None, "deep", "other", "wide", "pooled", "deep"):
        for each in (compiled, eager):
            resadapt.set_active_adapters(each, name)
        torch.testing.assert_close(compiled(X), eager(X))
        if name and training:
            for each in (compiled, eager):
                each(X).square().sum().backward()
            for ours, expected in zip(model.parameters(), eager.parameters(), strict=True):
                torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-4)
    names = ["pooled", "wide", "deep", "deep", "other", None, "wide"]
    with resadapt.adapters_for(compiled, names), resadapt.adapters_for(eager, names):
        for ours, expected in zip(compiled(images(7)), eager(images(7)), strict=True):
            torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(model.state_dict(), eager.state_dict())


def test_sets_of_one_form_share_a_compiled_graph() -> None:
    if not torch._dynamo.config.inline_inbuilt_nn_modules:
        pytest.skip("before torch 2.5 a graph contains the modules that it was compiled with")
    torch._dynamo.reset()
    model, counter = small_net().eval(), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    names = [f"set{number}" for number in range(10)]  # torch compiles 8 graphs of one function

    def follow(name: str, graphs: int) -> None:
        resadapt.set_active_adapters(compiled, name)
        torch.testing.assert_close(compiled(X), copy.deepcopy(model)(X))
        assert counter.frame_count == graphs

    for name in names:  # also while sets are added
        resadapt.inject_adapters(model, "c2", 2, name=name, head="head", norm="affine+stats")
        scramble(model.get_submodule(f"c2.resadapt.{name}"))
        scramble(model.get_submodule(f"head.resadapt.{name}@head"))
        follow(name, graphs=1)
    for name in names:
        follow(name, graphs=1)
    # As tools replace modules; these have no hook, so the graph is another one.
    model.head.resadapt.add_module(f"{name}@head", nn.Linear(4, 2))
    follow(name, graphs=2)
    setattr(model.head.resadapt, f"{name}@head", nn.Linear(4, 2))
    follow(name, graphs=2)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.head.resadapt.current.private is private(twin, "head", name)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(model: nn.Module, reentrant: bool) -> None:
    model.zero_grad()
    x = X.clone().requires_grad_()
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in resadapt.trainable_parameters(model)]
    model.zero_grad()
    fresh = copy.deepcopy(model)
    layer4 = fresh.layer4.forward
    fresh.layer4.forward = lambda x: checkpoint(layer4, x, use_reentrant=reentrant)  # type: ignore[method-assign]
    fresh(X.clone().requires_grad_()).square().sum().backward()
    for p, gradient in zip(resadapt.trainable_parameters(fresh), expected, strict=True):
        assert torch.equal(p.grad, gradient)
