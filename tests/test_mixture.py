"""One batch, a set for each sample: equal to separate forwards, heads and norms included, in training too."""

from __future__ import annotations

import copy
import sys
from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import images, small_net
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

import resadapt
from resadapt.injection.ledger import adapter_tensors, ledger_of, own_tensors

SETS: dict[str, dict[str, Any]] = {
    "pooled": {"layers": ("layer2", "layer4"), "head": "fc", "dropout": 0.0},
    "norms": {"layers": (), "head": {"fc": nn.Linear(512, 3)}, "norm": "affine+stats"},
    "wide": {"layers": "layer4", "head": {"fc": nn.Linear(512, 7)}, "norm": "affine", "dropout": 0.0},
    "stage": {"layers": "layer1", "head": ("layer4", "fc"), "dropout": 0.0},
}


def mixed_model() -> Any:
    return copy.deepcopy(_mixed_model())


@lru_cache(maxsize=1)
def _mixed_model() -> Any:
    """Sets of every kind on one backbone, in float64, so that the rounding of other batch sizes is small."""
    torch.manual_seed(0)
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3).double()
    for name, arguments in SETS.items():
        resadapt.inject_adapters(model, name=name, bottleneck=4, **arguments)
        generator = torch.Generator().manual_seed(len(name))
        state = resadapt.adapter_state_dict(model, name)
        moved = {k: t + 0.1 * torch.rand(t.shape, generator=generator) if t.is_floating_point() else t for k, t in state.items()}
        resadapt.load_adapter_state_dict(model, {k: t.to(state[k].dtype) for k, t in moved.items()}, name)
    return model


def gradients_of(model: nn.Module, name: str) -> dict[str, Tensor | None]:
    record = ledger_of(model).sets[name]
    tensors = dict(adapter_tensors(model, record.spec)) | own_tensors(model, record)
    return {key: tensor.grad for key, tensor in tensors.items()}


def loss(row: Tensor, sample: int) -> Tensor:
    return (row * (sample + 1)).square().sum()


@settings(max_examples=8, deadline=None)
@given(st.lists(st.sampled_from([*SETS, None]), min_size=4, max_size=7), st.booleans())
def test_equal_to_separate_forwards(names: list[str | None], training: bool) -> None:
    names = names + [name for name in names if name is not None]  # no set alone: statistics of one sample need two
    names += ["pooled"]
    x = images(len(names)).double()
    together, apart = mixed_model().train(training), mixed_model().train(training)
    resadapt.set_active_adapters(together, None)
    with resadapt.adapters_for(together, names):
        rows = together(x)
    torch.autograd.backward(sum((loss(row, i) for i, row in enumerate(rows)), torch.zeros(())))
    gradients = {name: gradients_of(together, name) for name in names if name is not None}  # before a switch drops them
    for name in dict.fromkeys(names):
        resadapt.set_active_adapters(apart, name)
        own = [i for i, each in enumerate(names) if each == name]
        expected = apart(x[own])
        for i, row in zip(own, expected, strict=True):
            torch.testing.assert_close(rows[i], row, rtol=1e-9, atol=1e-9)
        if name is None:
            continue
        torch.autograd.backward(sum((loss(row, i) for i, row in zip(own, expected, strict=True)), torch.zeros(())))
        for key, gradient in gradients_of(apart, name).items():
            torch.testing.assert_close(gradients[name][key], gradient, rtol=1e-7, atol=1e-9)
        statistics = resadapt.adapter_state_dict(apart, name)
        for key, tensor in resadapt.adapter_state_dict(together, name).items():
            torch.testing.assert_close(tensor, statistics[key], rtol=1e-9, atol=1e-12)
    assert resadapt.check_backbone(together).ok


def test_the_backbone_runs_once() -> None:
    model, runs = mixed_model().eval(), []
    model.conv1.register_forward_hook(lambda _module, args, _output: runs.append(len(args[0])))
    with resadapt.adapters_for(model, ["pooled", "norms", None, "wide"]):
        model(images(4).double())
    assert runs == [4]


def test_what_comes_back() -> None:
    model, x = mixed_model().eval(), images(3).double()
    with resadapt.adapters_for(model, ["pooled", None, "norms"]):
        assert model(x).shape == (3, 3)
    with resadapt.adapters_for(model, ["wide", "pooled", "wide"]):
        assert [tuple(row.shape) for row in model(x)] == [(7,), (3,), (7,)]
    with resadapt.adapters_for(model, ["wide"] * 3):
        assert model(x).shape == (3, 7)


def test_everything_is_put_back_also_after_an_error() -> None:
    model, x = mixed_model().eval(), images(3).double()
    expected = model(x)
    forwards = {name for name, module in model.named_modules() if "forward" in module.__dict__}
    with pytest.raises(KeyError), resadapt.adapters_for(model, ["wide", None, "norms"]):
        raise KeyError
    assert torch.equal(model(x), expected)
    assert {name for name, module in model.named_modules() if "forward" in module.__dict__} == forwards
    resadapt.set_active_adapters(model, "pooled")
    count = resadapt.count_parameters(model)
    assert count.trainable == count.adapters + count.head
    resadapt.set_active_adapters(model, "stage")
    assert [info.name for info in resadapt.list_adapters(model) if info.active] == ["stage"]


@pytest.mark.parametrize("names", [["wide", None], [None, None]])
def test_sets_stay_as_they_are_while_a_batch_is_mixed(names: list[str | None], tmp_path: Any) -> None:
    model = mixed_model().eval()
    with resadapt.adapters_for(model, names):
        for call in (
            lambda: resadapt.set_active_adapters(model, "wide"),
            lambda: resadapt.set_active_adapters(model, None),
            lambda: resadapt.adapters_disabled(model).__enter__(),
            lambda: resadapt.inject_adapters(model, "layer3", name="new"),
            lambda: resadapt.remove_adapters(model),
            lambda: resadapt.save_adapters(model, tmp_path / "a", name="wide"),
            lambda: resadapt.adapters_for(model, ["norms"]).__enter__(),
        ):
            with pytest.raises(resadapt.InjectionError, match="Inside adapters_for"):
                call()
    assert [info.name for info in resadapt.list_adapters(model)] == list(SETS)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ("wide", resadapt.AdapterError, "give a list"),
        ([], resadapt.AdapterError, "give a list"),
        (["wide", "wider"], resadapt.AdapterKeyError, "no adapter set 'wider'"),
        ([3], resadapt.AdapterError, "is int"),
    ],
)
def test_unsuitable_names(names: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message), resadapt.adapters_for(mixed_model(), names):
        pass


def test_a_name_for_each_sample() -> None:
    model = mixed_model().eval()
    with resadapt.adapters_for(model, ["wide", None]), pytest.raises(resadapt.InjectionError, match="given 2 names"):
        model(images(3).double())


def test_trained_sets_are_left_trainable_until_the_next_switch() -> None:
    model = mixed_model()
    resadapt.set_active_adapters(model, None)
    with resadapt.adapters_for(model, ["wide", "pooled"]):
        rows = model(images(2).double())
    torch.autograd.backward(sum((row.sum() for row in rows), torch.zeros(())))
    assert model.layer4[-1].get_submodule("resadapt.pooled.up").weight.grad is not None
    resadapt.set_active_adapters(model, "norms")
    assert not model.layer4[-1].get_submodule("resadapt.pooled.up").weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters()), "no optimizer can apply them later"
    resadapt.set_active_adapters(model, "wide")
    assert model.fc.weight.grad is None
    assert model.fc.weight.requires_grad


@pytest.mark.parametrize("policy", ["affine", "stats"])
def test_norms_that_are_held_in_evaluation(policy: str) -> None:
    model = small_net(norm=nn.InstanceNorm2d(4, affine=True, track_running_stats=True))
    resadapt.inject_adapters(model, (), name="own", norm=policy)
    resadapt.set_active_adapters(model, None)
    before = resadapt.adapter_state_dict(model, "own")["norms.bn.running_mean"]
    with resadapt.adapters_for(model.train(), ["own", None]):
        model(images())
    moved = not torch.equal(before, resadapt.adapter_state_dict(model, "own")["norms.bn.running_mean"])
    assert moved is (policy == "stats")
    assert resadapt.check_backbone(model).ok


def calls_of(function: Any) -> int:
    count = 0

    def profile(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def test_switching_takes_as_long_with_many_sets() -> None:
    model = ResNet(BasicBlock, [1, 1, 1, 1])
    calls = {}
    for number in range(32):
        resadapt.inject_adapters(model, "layer4", 2, name=f"s{number}", head="fc", norm="affine")
        if number in (1, 31):
            calls[number] = calls_of(lambda: resadapt.set_active_adapters(model, "s0"))
            resadapt.set_active_adapters(model, f"s{number}")
    assert calls[31] < 1.1 * calls[1]


def test_many_sets_on_one_backbone() -> None:
    model, x = ResNet(BasicBlock, [1, 1, 1, 1]).double(), images(64, 32).double()
    for number in range(64):
        resadapt.inject_adapters(model, "layer4", 2, name=f"s{number}", head="fc")
        with torch.no_grad():
            model.fc.bias.fill_(float(number))
            model.fc.weight.zero_()
    model.eval()
    with resadapt.adapters_for(model, [f"s{63 - number}" for number in range(64)]):
        assert model(x)[:, 0].tolist() == [float(63 - number) for number in range(64)]
