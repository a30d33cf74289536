"""How feature maps and gradients lie in memory: as those of the plain backbone, where seen."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from optimized import compare, lies, near
from support import images, small_resnet
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.utils.checkpoint import checkpoint
from torchvision import models

import resadapt
from resadapt.base.tensors import CHANNELS_LAST
from resadapt.lean.functions import FrozenConvolution


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
    model = resadapt.inject_adapters(
        Viewing(), "trunk.7", 4, head="fc", init="normal", dropout=0.0
    ).train(training)
    x, seen = images(2, 64), []
    model.trunk[5][0].register_forward_hook(
        lambda _module, _args, output: seen.append(output.stride())
    )
    model.trunk[6][1].conv2.register_forward_pre_hook(
        lambda _module, args: seen.append(args[0].stride())
    )
    plain = model(x)
    compare(resadapt.optimize_backbone(model)(x), plain, True)
    assert seen[:2] == seen[2:]


@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("inputs", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [32, 100])
@pytest.mark.parametrize("fold", [True, False])
def test_feature_maps_lie_as_those_of_the_plain_backbone(
    weights: Any, inputs: Any, size: int, fold: bool
) -> None:
    """Of feature maps where a hook sees them, of the output of a part, and of the gradient of the
    input.
    """
    model = (
        resadapt.inject_adapters(small_resnet(), "layer[24].*", family="ssf", head="fc")
        .eval()
        .to(memory_format=weights)
    )
    x = images(2, size).contiguous(memory_format=inputs).requires_grad_()
    seen: list[Any] = []
    for name in ("conv1", "maxpool", "layer2", "layer3.0", "layer4.0.conv1"):
        model.get_submodule(name).register_forward_hook(
            lambda _m, args, output: seen.extend((lies(args[0]), lies(output)))
        )
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
    """torch has other kernels for small batches, and tells from the input's strides, which are not
    there, how to lay it out.
    """
    torch.manual_seed(0)
    weight = torch.randn(8, 8 // groups, kernel, kernel).contiguous(memory_format=weights)
    x = torch.randn(batch, 8, 6, 5).contiguous(memory_format=inputs).requires_grad_()
    geometry = ((stride, stride), (kernel // 2, kernel // 2), (1, 1), groups)
    outputs = [
        torch.nn.functional.conv2d(x, weight, None, *geometry),
        FrozenConvolution.apply(x, weight, None, *geometry),
    ]
    gradients = [torch.autograd.grad(out, x, torch.ones_like(outputs[0]))[0] for out in outputs]
    assert torch.equal(*outputs)
    assert lies(outputs[0]) == lies(outputs[1])
    assert torch.equal(*gradients)
    assert lies(gradients[0]) == lies(gradients[1])


def test_the_gradient_of_the_input_lies_as_ever_where_nothing_is_seen_on_the_way() -> None:
    model, x = (
        resadapt.inject_adapters(small_resnet(), "layer*.*", family="ssf").eval(),
        images(2, 96).requires_grad_(),
    )
    gradients = []
    for _ in range(2):
        gradients += torch.autograd.grad(model(x).sum(), x)
        resadapt.optimize_backbone(model)
    assert lies(gradients[0]) == lies(gradients[1])
    compare(gradients[1], gradients[0], True)


@pytest.mark.parametrize("checkpointed", ["blocks", "a stage's forward"])
def test_checkpointed_activations_that_lie_otherwise_the_second_time(checkpointed: str) -> None:
    """Blocks that are run again on their own know of smaller images than when the whole model ran
    them.
    """
    model = resadapt.inject_adapters(
        small_resnet(), "layer1", 4, init="normal", dropout=0.0
    ).train()
    if checkpointed == "blocks":
        apply_activation_checkpointing(
            model, check_fn=lambda module: isinstance(module, models.resnet.BasicBlock)
        )
    else:
        forward = model.layer3.forward
        model.layer3.forward = lambda x: checkpoint(forward, x, use_reentrant=False)
    x = images(2, 128)
    gradients = []
    for _ in range(2):
        gradients.append(
            torch.autograd.grad(
                model(x).square().mean(), list(resadapt.trainable_parameters(model))
            )
        )
        resadapt.optimize_backbone(model)
    for theirs, ours in zip(*gradients, strict=True):
        near(ours, theirs)


def test_gradients_of_feature_maps_lie_as_those_of_the_plain_backbone() -> None:
    """Where a hook on a tensor sees them, between blocks too."""
    model, seen = resadapt.inject_adapters(small_resnet(), "layer2", 4).eval(), []
    for name in ("layer2", "layer3", "layer4.0"):
        model.get_submodule(name).register_forward_hook(
            lambda *args: (
                args[2].register_hook(lambda gradient: seen.append(lies(gradient))) and None
            )
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
def test_gradients_of_layers_lie_as_the_stock_ones(
    layer: nn.Module, sizes: tuple[int, ...], last: tuple[bool, bool]
) -> None:
    """Whether channels come last in their input, and in the gradient of their output."""
    model = resadapt.inject_adapters(
        nn.Sequential(nn.Conv1d(1, 1, 1), copy.deepcopy(layer)), "0", family="ssf"
    ).eval()
    formats = [CHANNELS_LAST[len(sizes) + 1] if each else torch.contiguous_format for each in last]
    torch.manual_seed(0)
    x = torch.randn(2, *sizes).contiguous(memory_format=formats[0]).requires_grad_()
    gradients = []
    for _ in range(2):
        out = model[1](x)
        gradients += torch.autograd.grad(
            out, x, torch.ones_like(out).contiguous(memory_format=formats[1])
        )
        resadapt.optimize_backbone(model, fold_norms=False)
    assert gradients[0].stride() == gradients[1].stride()
    compare(gradients[1], gradients[0], fold=True)
