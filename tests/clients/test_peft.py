"""PEFT: its LoRA and DoRA give the same outputs, gradients and merged weights, where they can."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from geometries import site_of
from torch import Tensor, nn

import resadapt
from resadapt.adapters import LoraAdapter
from resadapt.injection.own_dtype import apply

peft = pytest.importorskip("peft")

LAYERS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "conv": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 7, 8)),
    "conv without bias": (lambda: nn.Conv2d(4, 6, (3, 2), bias=False), (2, 4, 7, 8)),
    "1x1": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 5, 5)),
    "1-D": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 7)),
    "3-D": (lambda: nn.Conv3d(4, 6, 3, padding=1), (2, 4, 3, 4, 5)),
    "linear": (lambda: nn.Linear(4, 6), (3, 4)),
    "linear without bias, tokens": (lambda: nn.Linear(4, 6, bias=False), (2, 5, 4)),
}


def both(layer: Any, dora: bool) -> tuple[Any, Any]:
    """PEFT's layer and our adapter around copies of one layer, with the same tensors."""
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"], use_dora=dora)
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), config).base_model.model[0]
    ours = LoraAdapter(site_of(layer), 3, alpha=5.0, dora=dora)
    with torch.no_grad():
        norms = layer.weight.flatten(1).norm(dim=1)
        if dora:
            magnitude = theirs.lora_magnitude_vector["default"].weight
            torch.testing.assert_close(magnitude.flatten(), norms)
            magnitude.mul_(0.5 + torch.rand_like(magnitude))
            ours.magnitude.copy_(magnitude.flatten() - norms)
        for mine, their in ((ours.down, theirs.lora_A), (ours.up, theirs.lora_B)):
            mine.weight.normal_(std=0.5)
            their["default"].weight.copy_(mine.weight)
    return theirs, ours


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dora", [False, True])
def test_outputs_gradients_and_merged_weights_are_the_same(name: str, dora: bool) -> None:
    build, shape = LAYERS[name]
    layer = build().requires_grad_(False)
    theirs, ours = both(layer, dora)
    results = []
    for forward in (theirs, lambda x: apply(ours, layer, (x,), layer(x))):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
        output = forward(x)
        output.square().sum().backward()
        results.append((output.detach(), x.grad))
    pairs: list[tuple[Tensor | None, Tensor | None]] = list(zip(*results, strict=True))
    pairs += [
        (theirs.lora_A["default"].weight.grad, ours.down.weight.grad),
        (theirs.lora_B["default"].weight.grad, ours.up.weight.grad),
    ]
    if dora:
        pairs.append(
            (theirs.lora_magnitude_vector["default"].weight.grad.flatten(), ours.magnitude.grad)
        )
    theirs.merge()
    pairs.append((theirs.get_base_layer().weight.detach(), ours.folded(layer)[0].detach()))
    for their, our in pairs:
        assert their is not None
        assert our is not None
        assert our.abs().max() > 0
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-5 * their.abs().max().item())


@pytest.mark.parametrize("name", LAYERS)
def test_three_steps_of_training_are_the_same(name: str) -> None:
    """The magnitude is kept as a difference, which an optimizer does not notice."""
    build, shape = LAYERS[name]
    layer = build().requires_grad_(False)
    theirs, ours = both(layer, True)
    x = torch.randn(shape)
    outputs = []
    for forward, parameters in (
        (theirs, theirs.parameters()),
        (lambda x: apply(ours, layer, (x,), layer(x)), ours.parameters()),
    ):
        optimizer = torch.optim.Adam([p for p in parameters if p.requires_grad], lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            (forward(x) - 1).square().mean().backward()
            optimizer.step()
        outputs.append(forward(x).detach())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["linear", "conv", "1-D"])
def test_the_sum_of_changes_is_its_cat(name: str) -> None:
    build, _ = LAYERS[name]
    layer = build().requires_grad_(False)
    net = nn.Sequential(layer)
    theirs = peft.get_peft_model(
        copy.deepcopy(net), peft.LoraConfig(r=3, target_modules=["0"], lora_alpha=3), "a"
    )
    theirs.add_adapter("b", peft.LoraConfig(r=2, target_modules=["0"], lora_alpha=2))
    its = theirs.base_model.model[0]
    for rank, each in ((3, "a"), (2, "b")):
        net = resadapt.inject_adapters(
            net, "0", rank, family="lora", name=each, example_input=torch.randn(LAYERS[name][1])
        )
        adapter = net[0].resadapt.get_submodule(each)
        with torch.no_grad():
            for mine, their in ((adapter.down, its.lora_A), (adapter.up, its.lora_B)):
                mine.weight.normal_()
                their[each].weight.copy_(mine.weight)
    weights = {"a": 1.5, "b": 0.5}
    resadapt.combine_adapters(net, weights, "sum")
    theirs.add_weighted_adapter([*weights], [*weights.values()], "sum", combination_type="cat")
    change = net[0].resadapt.get_submodule("sum").folded(net[0])[0] - net[0].weight
    torch.testing.assert_close(its.get_delta_weight("sum"), change, rtol=1e-3, atol=1e-5)


def test_what_it_cannot_do() -> None:
    """If one of these passes some day, the tests of LoRA named for it may lose their names."""

    def its(layer: nn.Module, rank: int = 2) -> Any:
        return peft.get_peft_model(
            nn.Sequential(layer), peft.LoraConfig(r=rank, target_modules=["0"])
        ).base_model.model[0]

    x = torch.randn(1, 4, 9, 9)
    with pytest.raises(RuntimeError):  # the dilation is not in A
        its(nn.Conv2d(4, 4, 3, dilation=2))(x)
    assert (
        its(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")).lora_A["default"].padding_mode
        == "zeros"
    )
    with (
        pytest.warns(UserWarning, match="groups > 1"),
        pytest.raises(ValueError, match="divisible by groups"),
    ):
        its(nn.Conv2d(4, 4, 3, groups=4))
    with (
        pytest.warns(UserWarning, match="groups > 1"),
        pytest.raises(NotImplementedError, match="Merging"),
    ):
        its(nn.Conv2d(4, 4, 3, groups=2)).merge()
    with pytest.raises(ValueError, match="not supported"):
        its(nn.ConvTranspose2d(4, 4, 3))
