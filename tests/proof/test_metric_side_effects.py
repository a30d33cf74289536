"""A metric may train, switch, freeze and fail: afterwards the model is what it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from support import picture, small_resnet, train
from torch import nn
from verifying import X, net, two_sets

import resadapt
from resadapt.proof.probe import same


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a"), ("b", None)])
def test_a_metric_over_all_sets_leaves_them_as_they_were(
    order: tuple[Any, ...], path: Path
) -> None:
    """Which ones are trained, their gradients and statistics."""
    model = two_sets()
    with resadapt.adapters_for(model, ["a", "b"]):
        model.train()(X[:2]).sum().backward()
    states = {name: resadapt.adapter_state_dict(model, name) for name in "ab"}
    before, gradients = (
        picture(model),
        [p.grad.clone() for p in resadapt.trainable_parameters(model)],
    )

    def metric(m: Any) -> float:
        there = [info.name for info in resadapt.list_adapters(m)]
        for name in order:
            if name is None or name in there:
                resadapt.set_active_adapters(m, name)
                with torch.enable_grad():
                    m.train()(X.clone().requires_grad_()).sum().backward()
                m.requires_grad_(False)
        return 0.0

    assert resadapt.save_adapters(model, path, metric=metric).ok
    assert picture(model) == before
    assert all(
        torch.equal(p.grad, g)
        for p, g in zip(resadapt.trainable_parameters(model), gradients, strict=True)
    )
    assert all(
        same(state, resadapt.adapter_state_dict(model, name)) for name, state in states.items()
    )
    for name in "ba":
        resadapt.set_active_adapters(model, name)
        trained = [p.requires_grad for p in model.conv.resadapt.parameters()]
        assert trained == [name == "b"] * 4 + [name == "a"] * 4
    assert resadapt.parameter_groups(model, 0.1)


def test_gradients_that_a_metric_accumulates_are_taken_back(path: Path) -> None:
    model = resadapt.inject_adapters(net(), "conv", 2, init="normal", head="fc")
    model(X).sum().backward()
    gradients = [(p.grad, p.grad.clone()) for p in resadapt.trainable_parameters(model)]

    def metric(m: nn.Module) -> float:
        with torch.enable_grad():
            m(X).square().sum().backward()
        return 0.0

    assert resadapt.save_adapters(model, path, metric=metric).ok
    for parameter, (gradient, value) in zip(
        resadapt.trainable_parameters(model), gradients, strict=True
    ):
        assert parameter.grad is gradient
        assert torch.equal(gradient, value)


def test_a_metric_in_training_mode_leaves_the_statistics_of_the_head(path: Path) -> None:
    model = resadapt.inject_adapters(net(), "conv", 2, head=["bn", "fc"])
    before = resadapt.adapter_state_dict(model)
    resadapt.save_adapters(model, path, metric=lambda m: float(m.train()(X).numel()))
    assert all(
        torch.equal(value, before[key]) for key, value in resadapt.adapter_state_dict(model).items()
    )


def _switches(model: nn.Module) -> float:
    resadapt.set_active_adapters(model, None)
    return 1.0


def _trains(model: nn.Module) -> float:
    model.train()(X)
    model.requires_grad_(True)
    model.zero_grad()
    return 1.0


def _freezes(model: nn.Module) -> float:
    model.requires_grad_(False)
    return 1.0


def _switches_and_trains(model: nn.Module) -> float:
    resadapt.set_active_adapters(model, None)
    model.train()(X)
    return 1.0


def _raises(model: nn.Module) -> float:
    _switches_and_trains(model)
    raise ZeroDivisionError


@pytest.mark.parametrize("metric", [_switches, _trains, _freezes, _switches_and_trains, _raises])
@pytest.mark.parametrize("training", [False, True])
def test_a_metric_that_leaves_something_behind_changes_nothing(
    metric: Any, training: bool, path: Path
) -> None:
    model = resadapt.inject_adapters(net(), "conv", 2, head=["bn", "fc"])
    train(model, torch.optim.SGD(resadapt.trainable_parameters(model), lr=0.1))
    model.train(training)
    model(X).sum().backward()
    before = picture(model)
    gradients = [(p, p.grad.clone()) for p in resadapt.trainable_parameters(model)]
    for call in (resadapt.save_adapters, resadapt.verify_adapters):
        if metric is _raises:
            if call is resadapt.verify_adapters:
                resadapt.save_adapters(model, path)
            with pytest.raises(ZeroDivisionError):
                call(model, path, metric=metric)
        else:
            assert call(model, path, metric=metric)["metric"].outcome == "passed"
        assert picture(model) == before
        assert all(torch.equal(p.grad, gradient) for p, gradient in gradients)
    with resadapt.adapters_disabled(model):
        assert torch.equal(model.bn.running_mean, net().bn.running_mean), (
            "those of the plain head, too"
        )


def test_a_metric_that_fails_leaves_the_set_as_it_was(path: Path) -> None:
    model = resadapt.inject_adapters(small_resnet(), "layer4", 4, head="fc")
    resadapt.save_adapters(model, path)
    before, bytes_before = resadapt.adapter_state_dict(model), path.read_bytes()

    def metric(model: nn.Module) -> float:
        with torch.no_grad():
            for parameter in resadapt.trainable_parameters(model):
                parameter.add_(1)
        raise KeyError("after it had trained")

    for call in (resadapt.save_adapters, resadapt.verify_adapters):
        with pytest.raises(KeyError, match="after it had trained"):
            call(model, path, metric=metric)
        for key, tensor in resadapt.adapter_state_dict(model).items():
            assert torch.equal(tensor, before[key]), key
    assert path.read_bytes() == bytes_before


def _writes_everywhere(model: Any) -> float:
    resadapt.inject_adapters(model, "conv", 2, name="new")
    with torch.no_grad():
        for parameter in model.conv.resadapt.parameters():
            parameter.add_(1)
    return 1.0


def test_a_metric_that_changes_sets_and_fails(path: Path) -> None:
    model = two_sets()
    before = picture(model)

    def metric(m: Any) -> float:
        return _writes_everywhere(m) / 0

    with pytest.raises(ZeroDivisionError):
        resadapt.save_adapters(model, path, metric=metric)
    assert picture(model) == before


def test_verifying_changes_nothing_either(path: Path) -> None:
    model = two_sets()
    resadapt.save_adapters(model, path)
    before = picture(model)
    with pytest.raises(resadapt.VerificationError, match=r"'new' was added.*is restored"):
        resadapt.verify_adapters(model, path, metric=_writes_everywhere)
    assert picture(model) == before


def test_a_metric_that_knows_the_live_model_leaves_it_as_it_was(path: Path) -> None:
    model = resadapt.inject_adapters(net(), "conv", 2, init="normal", head="fc").train()
    model(X).sum().backward()
    before, gradients = (
        picture(model),
        [p.grad.clone() for p in resadapt.trainable_parameters(model)],
    )

    def metric(_: object) -> float:
        model.requires_grad_(False).zero_grad()
        model.eval()
        return float(model(X).sum())

    assert resadapt.save_adapters(model, path, metric=metric).ok
    assert picture(model) == before
    assert all(
        torch.equal(p.grad, g)
        for p, g in zip(resadapt.trainable_parameters(model), gradients, strict=True)
    )
