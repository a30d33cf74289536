"""Norms folded into convolutions: never out of date, and never where something could see it."""

from __future__ import annotations

import copy
import sys
import threading
from typing import Any

import pytest
import torch
from optimized import compare
from support import images, small_resnet
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torchvision import models

import resadapt
from resadapt.base.overlay import Overlay


def test_folded_norms_follow_what_they_were_made_from() -> None:
    """Weights that are loaded, moved or cast after the first forward count, and copies do not share
    what is folded.
    """
    model = resadapt.optimize_backbone(
        resadapt.inject_adapters(small_resnet(), init="normal")
    ).eval()
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
    model = resadapt.optimize_backbone(
        resadapt.inject_adapters(small_resnet(), name="first")
    ).eval()
    x, seen = images(), []
    model(x)
    plain = resadapt.restore_backbone(model)(x)
    hooks = [model.layer1[0].conv1.register_forward_hook(lambda *args: seen.append(args[2]))]
    hooks.append(
        model.layer1[0].bn2.register_forward_pre_hook(lambda *args: seen.append(args[1][0]))
    )
    model(x)
    expected, seen[:] = list(seen), []
    resadapt.optimize_backbone(model)
    compare(model(x), plain, fold=True)
    for ours, theirs in zip(seen, expected, strict=True):
        compare(ours, theirs, fold=True)
    for hook in hooks:
        hook.remove()
    calls = []
    with torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: calls.append(module)
    ):
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
    model = resadapt.optimize_backbone(
        resadapt.inject_adapters(small_resnet(), init="normal")
    ).eval()
    calls = []
    batch_norm = torch.nn.functional.batch_norm
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.nn.functional, "batch_norm", lambda *args: calls.append(1) or batch_norm(*args)
        )
        model(images())
        assert not calls
        resadapt.restore_backbone(model)(images())
        assert len(calls) == 20
        flat = resadapt.inject_adapters(
            models.vgg11_bn(num_classes=3), "features.27", example_input=images()
        )
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


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.ones(()))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor


def test_a_weight_that_is_parametrized_afterwards() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), nn.Conv2d(8, 8, 1)
    )
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


@pytest.mark.parametrize("size", [64, 128])
def test_a_hook_that_changes_what_a_block_is_given(size: int) -> None:
    model, x = resadapt.inject_adapters(small_resnet(), "layer4", 4).eval(), images(2, size)
    for name in ("layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1"):
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args: args[0].mul_(0.5) is None or None
        )
    expected = model(x)
    compare(resadapt.optimize_backbone(model)(x), expected, fold=True)


def test_weights_that_do_not_show_when_they_are_written_to_are_not_folded() -> None:
    with torch.inference_mode():
        model = resadapt.optimize_backbone(
            resadapt.inject_adapters(small_resnet(), "layer4", 4)
        ).eval()
        x = images()
        model(x)
        model.load_state_dict(
            {k: 1.3 * v if v.is_floating_point() else v for k, v in model.state_dict().items()}
        )
        found = model(x)
        compare(found, resadapt.restore_backbone(model)(x), fold=True)
