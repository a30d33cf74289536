"""One batch, a set for each sample: equal to separate forwards, in training too."""

from __future__ import annotations

import copy
import pickle
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixed import SETS, gradients_of, mixed_model
from support import images, private, small_net
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

import resadapt
from resadapt.adapters import FAMILIES
from resadapt.injection.ledger import adapter_tensors, ledger_of


def loss(row: Tensor, sample: int) -> Tensor:
    return (row * (sample + 1)).square().sum()


@settings(max_examples=8, deadline=None)
@given(st.lists(st.sampled_from([*SETS, None]), min_size=4, max_size=7), st.booleans())
def test_equal_to_separate_forwards(names: list[str | None], training: bool) -> None:
    names = names + [
        name for name in names if name is not None
    ]  # no set alone: statistics of one sample need two
    names += ["pooled"]
    x = images(len(names)).double()
    together, apart = mixed_model().train(training), mixed_model().train(training)
    resadapt.set_active_adapters(together, None)
    with resadapt.adapters_for(together, names):
        rows = together(x)
    torch.autograd.backward(sum((loss(row, i) for i, row in enumerate(rows)), torch.zeros(())))
    gradients = {
        name: gradients_of(together, name) for name in names if name is not None
    }  # before a switch drops them
    for name in dict.fromkeys(names):
        resadapt.set_active_adapters(apart, name)
        own = [i for i, each in enumerate(names) if each == name]
        expected = apart(x[own])
        for i, row in zip(own, expected, strict=True):
            torch.testing.assert_close(rows[i], row, rtol=1e-9, atol=1e-9)
        if name is None:
            continue
        torch.autograd.backward(
            sum((loss(row, i) for i, row in zip(own, expected, strict=True)), torch.zeros(()))
        )
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
    assert {
        name for name, module in model.named_modules() if "forward" in module.__dict__
    } == forwards
    resadapt.set_active_adapters(model, "pooled")
    count = resadapt.count_parameters(model)
    assert count.trainable == count.adapters + count.head
    resadapt.set_active_adapters(model, "stage")
    assert [info.name for info in resadapt.list_adapters(model) if info.active] == ["stage"]


@pytest.mark.parametrize("names", [["wide", None], [None, None]])
def test_sets_stay_as_they_are_while_a_batch_is_mixed(
    names: list[str | None], tmp_path: Any
) -> None:
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
    with (
        resadapt.adapters_for(model, ["wide", None]),
        pytest.raises(resadapt.InjectionError, match="given 2 names"),
    ):
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
    assert all(parameter.grad is None for parameter in model.parameters()), (
        "no optimizer can apply them later"
    )
    resadapt.set_active_adapters(model, "wide")
    assert private(model, "fc", "wide").weight.grad is None
    assert private(model, "fc", "wide").weight.requires_grad


@pytest.mark.parametrize("policy", ["affine", "stats"])
def test_norms_that_are_held_in_evaluation(policy: str) -> None:
    model = small_net(norm=nn.InstanceNorm2d(4, affine=True, track_running_stats=True))
    resadapt.inject_adapters(model, (), name="own", norm=policy)
    resadapt.set_active_adapters(model, None)
    before = resadapt.adapter_state_dict(model, "own")["norms.bn.running_mean"]
    with resadapt.adapters_for(model.train(), ["own", None]):
        model(images())
    moved = not torch.equal(
        before, resadapt.adapter_state_dict(model, "own")["norms.bn.running_mean"]
    )
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
            private(model, "fc", f"s{number}").bias.fill_(float(number))
            private(model, "fc", f"s{number}").weight.zero_()
    model.eval()
    with resadapt.adapters_for(model, [f"s{63 - number}" for number in range(64)]):
        assert model(x)[:, 0].tolist() == [float(63 - number) for number in range(64)]


class Tiny(nn.Module):
    """Channels that do not change, and a head of several layers."""

    def __init__(self, *inside: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc = nn.Sequential(nn.Linear(8, 6), *inside, nn.Linear(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.bn(self.conv(x))).mean((2, 3)))


def tiny(*inside: nn.Module, names: tuple[str, ...] = ("a", "b", "c"), **arguments: Any) -> Any:
    torch.manual_seed(0)
    model = Tiny(*inside)
    options = {
        "layers": "conv",
        "bottleneck": 4,
        "family": "bottleneck",
        "init": "normal",
        "head": "fc",
    } | arguments
    for name in names:
        resadapt.inject_adapters(model, name=name, **options)
    return model.train()


def trained(model: nn.Module) -> dict[str, bool]:
    return {
        name: all(t.requires_grad for _, t in adapter_tensors(model, record.spec))
        for name, record in _sets(model).items()
    }


def reached(model: nn.Module) -> dict[str, set[bool]]:
    return {
        name: {gradient is not None for gradient in gradients_of(model, name).values()}
        for name in _sets(model)
    }


def _sets(model: nn.Module) -> Any:
    return ledger_of(model).sets


@pytest.mark.parametrize("active", ["a", "b", "c", None])
@pytest.mark.parametrize("how", ["adapters_for", "forward_all"])
@pytest.mark.parametrize("between", ["nothing", "disabled", "saved", "evaluated"])
def test_every_step_trains_all_that_are_named(
    active: str | None, how: str, between: str, tmp_path: Any
) -> None:
    """Not the first alone: temporarily running another set leaves alone which are trained."""
    model, x = tiny(), images(4)
    resadapt.set_active_adapters(model, active)
    for _ in range(3):
        model.zero_grad()
        if how == "adapters_for":
            with resadapt.adapters_for(model, ["a", "b", "a", "b"]):
                loss = model(x).square().sum()
        else:
            loss = sum(
                output.square().sum()
                for output in resadapt.forward_all(model, x, ["a", "b"]).values()
            )
        if between == "disabled":
            with resadapt.adapters_disabled(model):
                model(x)
        elif between == "saved":
            resadapt.save_adapters(model, tmp_path / "c", name="c")
        elif between == "evaluated":
            with torch.no_grad(), resadapt.adapters_for(model.eval(), ["c", "b", None, "a"]):
                model(x)
            model.train()
        loss.backward()
        assert reached(model) == {"a": {True}, "b": {True}, "c": {False}}
    resadapt.set_active_adapters(model, "a")
    assert trained(model) == {"a": True, "b": False, "c": False}
    assert reached(model) == {"a": {True}, "b": {False}, "c": {False}}
    resadapt.set_active_adapters(model, None)
    assert trained(model) == {"a": False, "b": False, "c": False}


def test_a_backward_pass_inside_of_a_plain_forward_reaches_the_adapters() -> None:
    """As in distillation from the plain model."""
    model, x = tiny(names=("a",)), images(2)
    output = model(x)
    with resadapt.adapters_disabled(model):
        (output - model(x).detach()).square().sum().backward()
    assert reached(model) == {"a": {True}}


def test_inference_mode_makes_no_heads_that_cannot_be_trained() -> None:
    model, x = tiny().double().eval(), images(2).double()
    with torch.inference_mode(), resadapt.adapters_for(model, ["a", "b"]):
        model(x)
    resadapt.set_active_adapters(model, "a")
    model.train()(x).sum().backward()
    assert reached(model)["a"] == {True}


def test_flags_inside_of_a_head_and_hooks_around_it() -> None:
    model, x = tiny(nn.BatchNorm1d(6)), images(4)
    resadapt.set_active_adapters(model, "a")
    private(model, "fc", "a")[1].eval()
    private(model, "fc", "a")[0].register_forward_hook(lambda _module, _args, output: 2 * output)
    model.fc.register_forward_pre_hook(
        lambda _module, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True
    )
    before = resadapt.adapter_state_dict(model, "a")
    expected = model(x)
    with resadapt.adapters_for(model, ["a"] * 4):
        torch.testing.assert_close(model(x), expected)
    assert torch.equal(resadapt.forward_all(model, x, ["a"])["a"], expected)
    for key, tensor in resadapt.adapter_state_dict(model, "a").items():
        assert torch.equal(tensor, before[key]), key


def test_a_family_that_reads_a_weight_reads_that_of_its_set() -> None:
    class Reading(resadapt.Adapter):
        reads = "weight"

        def __init__(self, site: Any) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(site.channels, 1, 1))

        def forward(self, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return y + self.scale * (weight + bias)[:, None, None]

    resadapt.register_family("reading")(Reading)
    try:
        model = Tiny().eval()
        resadapt.inject_adapters(model, "bn", family="reading", norm="affine", name="a")
        with torch.no_grad():
            private(model, "bn", "a").weight.add_(1)
        expected = model(images(2))
        with resadapt.adapters_for(model, ["a", "a"]):
            torch.testing.assert_close(model(images(2)), expected)
        assert torch.equal(resadapt.forward_all(model, images(2))["a"], expected)
    finally:
        FAMILIES.pop("reading")


def test_heads_inside_of_heads() -> None:
    model, x = tiny(names=("a",)).eval(), images(4)
    resadapt.inject_adapters(
        model, "conv", 4, family="bottleneck", name="b", head={"fc.1": nn.Linear(6, 9)}
    )
    names = ["a", "b", None, "a"]
    with resadapt.adapters_for(model, names):
        rows = model(x)
    for name, row, sample in zip(names, rows, x, strict=True):
        resadapt.set_active_adapters(model, name)
        torch.testing.assert_close(row, model(sample[None])[0])


def test_no_copy_is_made_that_would_go_on_mixing() -> None:
    model = tiny()
    with resadapt.adapters_for(model, ["a"]):
        for duplicate in (copy.deepcopy, pickle.dumps):
            with pytest.raises(resadapt.InjectionError, match="cannot be copied or pickled"):
                duplicate(model)
    copy.deepcopy(model)


def test_an_adapter_that_never_runs_is_named_in_a_mixed_batch_too() -> None:
    class Idle(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Conv2d(3, 8, 1)

    for run in (_in_a_mixture, resadapt.forward_all):
        model = resadapt.inject_adapters(Idle(), ["conv", "unused"], 4, name="a")
        with pytest.warns(resadapt.AdapterWarning, match="'unused' did not run"):
            run(model, images(2))


def _in_a_mixture(model: nn.Module, x: Tensor) -> None:
    with resadapt.adapters_for(model, ["a"] * len(x)):
        model(x)


def test_the_only_sample_of_a_set_moves_no_statistics() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4)
    )
    for name in ("a", "b"):
        resadapt.inject_adapters(model, (), norm="affine+stats", name=name)
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    message = "more than one value per channel.*single sample for 'b'.*were restored"
    with (
        pytest.raises(resadapt.InjectionError, match=message),
        resadapt.adapters_for(model, ["a", "b", "a"]),
    ):
        model(images(3))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    with resadapt.adapters_for(model, ["a", "b", "a", "b"]):
        model(images(4))
    assert not torch.equal(
        private(model, "1", "b").running_mean, before["1.resadapt.b@1.running_mean"]
    )
