"""Optimized backbones under autocast: no tensor is converted twice, and nothing leaves bfloat16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optimized import FOLD
from support import images, small_resnet
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import models

import resadapt
from resadapt.lean.constants import constants_in

BF16 = torch.autocast("cpu", torch.bfloat16)
FORMATS = pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])


class Operators(TorchDispatchMode):
    """Writes down each operator with the tensors that it reads and returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[str, list[Tensor], Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator."""
        output = func(*args, **(kwargs or {}))
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor):
            read = [each for each in args if isinstance(each, Tensor)]
            self.calls.append((func.__name__, read, first))
        return output


def injected(form: Any = torch.channels_last, head: Any = "fc", seed: int = 0) -> Any:
    net = small_resnet(seed)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
    model = resadapt.inject_adapters(net, bottleneck=4, init="normal", head=head)
    return model.to(memory_format=form).train()


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output under autocast, and the gradients of what is trained."""
    torch.manual_seed(0)
    with BF16:
        out = model(x)
    return [out, *torch.autograd.grad(out.float().square().sum(), [*trained(model)])]


def trained(model: nn.Module) -> list[Tensor]:
    return [*resadapt.trainable_parameters(model)]


@FORMATS
def test_without_folding_every_bit_is_that_of_the_plain_backbone(form: Any) -> None:
    model, x = injected(form), images(2, 64).contiguous(memory_format=form)
    expected = run(model, x)
    resadapt.optimize_backbone(model, fold_norms=False)
    for _ in range(2):
        assert all(map(torch.equal, run(model, x), expected))


def test_folded_norms_round_no_more_than_autocast_alone() -> None:
    """Compared with float64, over several networks."""
    errors = []
    for seed in range(4):
        model = injected(seed=seed).eval()
        x = images(4, 64).contiguous(memory_format=torch.channels_last)
        exact = model.double()(x.double())
        plain = run(model.float(), x)[0]
        folded = run(resadapt.optimize_backbone(model), x)[0]
        assert not torch.equal(folded, plain)
        errors.append([(each - exact).norm() / exact.norm() for each in (folded, plain)])
    assert sum(folded for folded, _ in errors) < 1.25 * sum(plain for _, plain in errors)


@FOLD
def test_frozen_weights_are_converted_once(fold: bool) -> None:
    model, x = resadapt.optimize_backbone(injected(head=()), fold_norms=fold), images(2, 64)

    def converted() -> int:
        with Operators() as operators:
            run(model, x)
        frozen = {id(p) for p in model.parameters() if not p.requires_grad}
        return sum(
            name.startswith("_to_copy") and any(id(each) in frozen for each in read)
            for name, read, _ in operators.calls
        )

    assert converted() > 20
    assert converted() == 0
    before = run(model, x)[0]
    model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()})
    assert converted() > 20, "new values"
    assert not torch.equal(run(model, x)[0], before)
    with torch.autocast("cpu", torch.float16):
        assert model(x).dtype is torch.float16
    assert model(x).dtype is torch.float32
    assert converted() == 0, "each dtype has its own"


def test_a_weight_that_is_loaded_for_each_call_leaves_nothing_behind() -> None:
    """As offloading does (accelerate's `cpu_offload`): memory must not grow with each forward."""
    model, x = resadapt.optimize_backbone(injected(head=())), images(2, 32)
    loaded: list[Tensor] = []  # kept, so that no two have the same id

    def load(module: Any, args: object) -> None:
        loaded.append(nn.Parameter(module.weight.detach().clone(), requires_grad=False))
        module.weight = loaded[-1]

    model.conv1.register_forward_pre_hook(load)
    model.fc.register_forward_pre_hook(load)
    kept = []
    for _ in range(3):
        run(model, x)
        kept.append(len(constants_in(model)))
    assert kept[0] == kept[2] > 0


def test_linear_layers_too() -> None:
    model: Any = models.vgg11_bn(num_classes=3, dropout=0.0)
    model.classifier = nn.Sequential(nn.Linear(25088, 4), nn.ReLU(), nn.Linear(4, 3))
    resadapt.inject_adapters(model, "features.27", 4, example_input=images())
    expected = run(model, images())
    run(resadapt.optimize_backbone(model, fold_norms=False), images())
    with Operators() as operators:
        found = run(model, images())
    assert all(map(torch.equal, found, expected))
    weight = model.classifier[0].weight
    assert not any(weight is each for _, read, _ in operators.calls for each in read)


@FOLD
def test_feature_maps_stay_in_bfloat16_and_channels_last(fold: bool) -> None:
    """From the first convolution to the head and back to the first adapter, in every operator."""
    model = resadapt.optimize_backbone(injected(), fold_norms=fold)
    x = images(2, 64).contiguous(memory_format=torch.channels_last)
    run(model, x)
    with Operators() as operators:
        run(model, x)
    maps = [
        (name, each)
        for name, _, each in operators.calls
        if each.ndim == 4 and min(each.shape[2:]) > 1 and each.is_floating_point()
    ]
    assert not [name for name, each in maps if each.dtype is not torch.bfloat16]
    # Views, and gradients of means, have no memory format of their own.
    free = ("permute", "view", "expand", "div", "add.")
    last = torch.channels_last
    assert not [
        (name, each.shape)
        for name, each in maps
        if not name.startswith(free) and not each.is_contiguous(memory_format=last)
    ]
    copies = [each.shape for name, each in maps if "copy" in name or "clone" in name]
    assert copies == [x.shape], "the input's conversion"
