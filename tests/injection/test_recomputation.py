"""Checkpointed activations are recomputed with the sets that the forward ran with.

The reference is the same program without checkpointing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed._composable import checkpoint as composable_checkpoint
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.utils.checkpoint import CheckpointError, checkpoint
from torchvision.models.resnet import BasicBlock

import resadapt
from tests.support import images

KINDS: dict[str, dict[str, Any]] = {
    "adapters": {"bottleneck": 8, "dropout": 0.0},
    "affine": {"layers": (), "norm": "affine"},
    "both": {"bottleneck": 8, "dropout": 0.0, "norm": "affine+stats", "head": "fc"},
    "head": {"layers": (), "head": "fc"},
    "inside": {"layers": (), "head": "layer3"},
    "lora": {"layers": "layer*.*.conv*", "bottleneck": 2, "family": "lora", "norm": "affine"},
}


class Small(nn.Module):
    """The places of a ResNet, with eight channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        for number in range(1, 5):
            self.add_module(f"layer{number}", nn.Sequential(BasicBlock(8, 8)))
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.stem(x)))))
        return self.fc(x.mean((2, 3)))


def built(kind: str) -> nn.Module:
    """A model with sets "a" and "b" that differ in every tensor."""
    torch.manual_seed(0)
    model = Small().double()
    for name in ("a", "b"):
        # Adapters inside of a module that the other set replaces.
        inside = kind == "inside" and name == "b"
        resadapt.inject_adapters(model, name=name, **KINDS["lora" if inside else kind])
        with torch.no_grad():
            for parameter in resadapt.trainable_parameters(model):
                parameter.normal_(0, 0.3)
    return model.train()


def whole(reentrant: bool, model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: checkpoint(model, x.clone().requires_grad_(), use_reentrant=reentrant)


def by_layer(reentrant: bool, model: nn.Module) -> Callable[[Tensor], Tensor]:
    for layer in (model.layer2, model.layer3):
        forward = layer.forward
        layer.forward = partial(checkpoint, forward, use_reentrant=reentrant)
    return lambda x: model(x.clone().requires_grad_())


def nested(reentrant: bool, model: nn.Module) -> Callable[[Tensor], Tensor]:
    return whole(reentrant, model) if by_layer(False, model) else model


def wrapped_blocks(model: nn.Module) -> Callable[[Tensor], Tensor]:
    apply_activation_checkpointing(model, check_fn=lambda each: isinstance(each, BasicBlock))
    return model


def composable(model: nn.Module) -> Callable[[Tensor], Tensor]:
    composable_checkpoint(model.layer3)
    return model


def offloaded(model: nn.Module) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return whole(False, model)(x)

    return run


WAYS: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "whole": partial(whole, False),
    "whole, reentrant": partial(whole, True),
    "layers": partial(by_layer, False),
    "layers, reentrant": partial(by_layer, True),
    "nested": partial(nested, False),
    "nested, reentrant": partial(nested, True),
    "wrapped blocks": wrapped_blocks,
    "composable": composable,
    "offloaded": offloaded,
}


def two_forwards(model: nn.Module, run: Callable[[Tensor], Tensor]) -> Tensor:
    resadapt.set_active_adapters(model, "a")
    first = run(X1)
    resadapt.set_active_adapters(model, "b")
    return first.square().sum() + run(X2).square().sum()


def switched(model: nn.Module, run: Callable[[Tensor], Tensor]) -> Tensor:
    for name in ("b", "a"):  # both get gradients of their own
        resadapt.set_active_adapters(model, name)
        loss = run(X1).square().sum()
        resadapt.set_active_adapters(model, None)
        resadapt.set_active_adapters(model, name)
        with torch.no_grad():
            model(X2)
        loss.backward()
        if name == "b":
            model.zero_grad()
    with resadapt.adapters_for(model, ["a", "b"]):
        loss = run(X1).square().sum()
    with resadapt.adapters_disabled(model):
        loss.backward()
    return loss.new_zeros((), requires_grad=True)


def two_mixed_batches(model: nn.Module, run: Callable[[Tensor], Tensor]) -> Tensor:
    with resadapt.adapters_for(model, ["a", "b"]):
        first = run(X1)
    with resadapt.adapters_for(model, ["b", None]):
        return first.square().sum() + run(X2).square().sum()


def backward_inside_of_another_body(model: nn.Module, run: Callable[[Tensor], Tensor]) -> Tensor:
    with resadapt.adapters_for(model, ["b", "a"]):
        loss = run(X1).square().sum()
    with resadapt.adapters_for(model, ["a", "a", "b"]):
        loss.backward()
    return loss.new_zeros((), requires_grad=True)


def distillation(model: nn.Module, run: Callable[[Tensor], Tensor]) -> Tensor:
    resadapt.set_active_adapters(model, "a")
    student = run(X1)
    with torch.no_grad(), resadapt.adapters_disabled(model):
        teacher = run(X1)
    return (student - teacher).square().sum()


def all_sets_trainable(model: nn.Module, run: Callable[[Tensor], Tensor]) -> Tensor:
    losses = []
    for name in ("a", "b", None):
        resadapt.set_active_adapters(model, name)
        for each, parameter in model.named_parameters():
            parameter.requires_grad_("resadapt" in each)
        losses.append(run(X1 + len(losses)).square().sum())
    return sum(losses)


PROGRAMS = (
    two_forwards,
    switched,
    two_mixed_batches,
    backward_inside_of_another_body,
    distillation,
    all_sets_trainable,
)
X1, X2 = images(2, 8).double(), images(2, 8, seed=2).double()


def gradients(
    kind: str,
    way: Callable[[nn.Module], Callable[[Tensor], Tensor]],
    program: Callable[..., Tensor],
    prepare: Callable[[nn.Module], object] = lambda model: model,
) -> dict[str, Tensor | None]:
    model = built(kind)
    prepare(model)
    named = {name: each for name, each in model.named_parameters() if "resadapt" in name}
    program(model, way(model)).backward()
    return {name: copy.copy(parameter.grad) for name, parameter in named.items()}


def assert_same(found: dict[str, Tensor | None], wanted: dict[str, Tensor | None]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        if gradient is None:
            assert found[name] is None or not found[name].any(), name
        else:
            torch.testing.assert_close(found[name], gradient, msg=name)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_without_checkpointing(kind: str, way: str) -> None:
    for program in PROGRAMS:
        wanted = gradients(kind, lambda model: model, program)
        assert any(each is not None for each in wanted.values()), program
        try:
            assert_same(gradients(kind, WAYS[way], program), wanted)
        except CheckpointError:  # torch's: a part of a head alone, with nothing of ours inside
            assert (kind, way) == ("inside", "wrapped blocks"), program


@pytest.mark.parametrize("way", ["whole", "whole, reentrant", "layers"])
@pytest.mark.parametrize("kind", ["adapters", "affine"])
def test_folded_layers_too(kind: str, way: str) -> None:
    for program in PROGRAMS:
        wanted = gradients(kind, lambda model: model, program)
        assert_same(gradients(kind, WAYS[way], program, resadapt.optimize_backbone), wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_switch_inside_of_the_recomputed_function_is_refused(reentrant: bool) -> None:
    model = built("both")

    def both(x: Tensor) -> Tensor:
        with resadapt.adapters_disabled(model):
            plain = model(x)
        return model(x) - plain

    with pytest.raises(resadapt.InjectionError, match="ran with different sets inside one"):
        checkpoint(both, X1.clone().requires_grad_(), use_reentrant=reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_adapters_that_came_after_the_forward_are_refused(reentrant: bool) -> None:
    model = Small().double()
    output = checkpoint(model, X1.clone().requires_grad_(), use_reentrant=reentrant)
    resadapt.inject_adapters(model, bottleneck=8)
    with pytest.raises(resadapt.InjectionError, match="sets of the forward are not known"):
        output.sum().backward()


def test_two_models_in_one_function_keep_their_sets() -> None:
    first, second = built("adapters"), built("adapters")
    resadapt.set_active_adapters(first, "a")

    def run(x: Tensor) -> Tensor:
        return first(x) + second(x)

    loss = checkpoint(run, X1, use_reentrant=False).square().sum()
    resadapt.set_active_adapters(first, "b")
    resadapt.set_active_adapters(first, "a")
    loss.backward()
    found = [each.grad for each in resadapt.trainable_parameters(first)]
    for parameter in resadapt.trainable_parameters(first):
        parameter.grad = None
    run(X1).square().sum().backward()
    for gradient, parameter in zip(found, resadapt.trainable_parameters(first), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


@pytest.mark.parametrize("reentrant", [False, True])  # only the second runs to the end again
def test_recomputing_tells_nothing_about_idle_adapters(
    reentrant: bool, recwarn: pytest.WarningsRecorder
) -> None:
    model = built("both")
    resadapt.set_active_adapters(model, "a")
    loss = checkpoint(model, X1.clone().requires_grad_(), use_reentrant=reentrant).sum()
    resadapt.set_active_adapters(model, "b")
    loss.backward()
    assert not [each for each in recwarn if each.category is resadapt.AdapterWarning]


def test_a_head_that_is_checkpointed_while_inactive_trains_when_it_is_active() -> None:
    model = built("inside")
    wrapped_blocks(model)
    resadapt.set_active_adapters(model, "a")
    model(X1).sum().backward()
    gradients_ = [parameter.grad for parameter in resadapt.trainable_parameters(model)]
    assert gradients_, "wrappers change the names of what is inside"
    assert all(gradient is not None for gradient in gradients_)
