"""Weighted sums of sets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import images, picture, private, small_net, small_resnet
from torch import nn

import resadapt


def test_combined_sets_are_weighted_sums(tmp_path: Any) -> None:
    model = small_resnet()
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        torch.manual_seed(seed)
        resadapt.inject_adapters(
            model, "layer4", 4, name=name, head={"fc": nn.Linear(512, 5)}, norm="affine+stats"
        )
        model.train()(images(seed=seed))
    states = {name: resadapt.adapter_state_dict(model, name) for name in "abc"}
    assert resadapt.combine_adapters(model, {"a": 0.25, "b": -1, "c": 2.5}, "sum") is model
    for key, tensor in resadapt.adapter_state_dict(model).items():
        a, b, c = (states[name][key].double() for name in "abc")
        expected = (
            (0.25 * a - b + 2.5 * c).to(tensor.dtype)
            if tensor.is_floating_point()
            else states["a"][key]
        )
        assert torch.equal(tensor, expected)
    assert all(
        torch.equal(t, resadapt.adapter_state_dict(model, n)[k])
        for n in "abc"
        for k, t in states[n].items()
    )
    assert [info.name for info in resadapt.list_adapters(model) if info.active] == ["sum"]
    assert resadapt.save_adapters(model, tmp_path / "sum").ok
    resadapt.combine_adapters(model, {"a": 1}, "same")
    resadapt.set_active_adapters(model, "a")
    alone = model.eval()(images())
    resadapt.set_active_adapters(model, "same")
    assert torch.equal(model.eval()(images()), alone)


def test_a_variance_is_never_negative() -> None:
    model = small_net()
    for name, seed in (("a", 1), ("b", 2)):
        resadapt.inject_adapters(model, (), name=name, norm="stats")
        model.train()(images(seed=seed) * seed)
    before = picture(model)
    with pytest.raises(resadapt.AdapterError, match=r"'norms\.bn\.running_var' would be negative"):
        resadapt.combine_adapters(model, {"a": 1, "b": -1}, "c")
    assert picture(model) == before


def test_complex_tensors_are_summed() -> None:
    head = nn.Linear(4, 2, dtype=torch.complex64)
    model = small_net(head=head)
    for name in ("a", "b"):
        resadapt.inject_adapters(model, (), name=name, head="head")
        with torch.no_grad():
            private(model, "head", name).weight.add_(2j if name == "a" else 4j)
    resadapt.combine_adapters(model, {"a": 0.5, "b": 0.5}, "c")
    combined = private(model, "head", "c").weight
    torch.testing.assert_close(combined - model.head.weight, torch.full((2, 4), 3j))


@pytest.mark.parametrize(
    ("weights", "name", "error", "message"),
    [
        ({}, "s", resadapt.AdapterError, "give a mapping"),
        ({"a": float("nan")}, "s", resadapt.AdapterError, "not a finite number"),
        ({"a": True}, "s", resadapt.AdapterError, "not a finite number"),
        ({"x": 1}, "s", resadapt.AdapterKeyError, "no adapter set 'x'"),
        ({"a": 1, "b": 1}, "s", resadapt.AdapterKeyError, "differ in 'sites'"),
        ({"a": 1}, "b", resadapt.InjectionError, "set 'b' already"),
    ],
)
def test_sums_that_there_are_not(
    weights: Any, name: str, error: type[Exception], message: str
) -> None:
    model = resadapt.inject_adapters(
        resadapt.inject_adapters(small_resnet(), "layer4", name="a"), "layer3", name="b"
    )
    before = picture(model)
    with pytest.raises(error, match=message):
        resadapt.combine_adapters(model, weights, name)
    assert picture(model) == before


@pytest.mark.parametrize("active", ["a", "b", None])
def test_a_sum_has_the_head_of_its_sets_whichever_is_active(active: str | None) -> None:
    model, x = small_resnet(classes=5).eval(), images()
    for name in ("a", "b"):
        head = {"fc": nn.Sequential(nn.Linear(512, 4), nn.Sigmoid(), nn.Linear(4, 3))}
        resadapt.inject_adapters(model, "layer4", 4, name=name, head=head)
    resadapt.set_active_adapters(model, "a")
    expected = model.eval()(x)
    for order in (("a", "b"), ("b", "a")):
        resadapt.set_active_adapters(model, active)
        resadapt.combine_adapters(model, {name: float(name == "a") for name in order}, "sum")
        assert torch.equal(model.eval()(x), expected)
        assert [info.name for info in resadapt.list_adapters(model) if info.active] == ["sum"]
        resadapt.remove_adapters(model, "sum")


@pytest.mark.parametrize("name", ["a", "not a name", "train"])
def test_a_sum_that_cannot_be_put_in_leaves_the_model_as_it_was(name: str) -> None:
    model = resadapt.inject_adapters(small_resnet(), "layer4", 4, name="a", head="fc")
    before = picture(model)
    with pytest.raises(resadapt.AdapterError):
        resadapt.combine_adapters(model, {"a": 1.0}, name)
    assert picture(model) == before
    assert resadapt.list_adapters(model)[0].active


def test_a_sum_of_a_model_that_was_converted() -> None:
    for convert in (nn.Module.half, nn.Module.double):
        model = small_resnet()
        for name in ("a", "b"):
            resadapt.inject_adapters(model, "layer4", 4, name=name, head="fc", norm="affine")
        convert(model)
        states = [resadapt.adapter_state_dict(model, name) for name in ("a", "b")]
        assert {t.dtype for state in states for t in state.values() if t.is_floating_point()} == {
            model.conv1.weight.dtype
        }
        resadapt.combine_adapters(model, {"a": 0.3, "b": 0.7}, "sum")
        total = resadapt.adapter_state_dict(model, "sum")
        for key, tensor in total.items():
            if tensor.is_floating_point():
                expected = 0.3 * states[0][key].double() + 0.7 * states[1][key].double()
                assert torch.equal(tensor, expected.to(tensor.dtype)), key


def test_a_weight_of_a_sum_that_is_too_large() -> None:
    model = resadapt.inject_adapters(small_resnet(), "layer4", 4, name="a")
    with pytest.raises(resadapt.AdapterError, match="not a finite number"):
        resadapt.combine_adapters(model, {"a": 10**400}, "c")
