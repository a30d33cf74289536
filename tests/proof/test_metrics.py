"""The user's metric: of the live and the reloaded model; found out if it changes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from support import picture
from torch import nn
from verifying import net, two_sets

import resadapt
from resadapt.proof.probe import same

_LIVE: list[nn.Module] = []


@pytest.mark.parametrize(
    ("metric", "tolerance", "ok"),
    [
        (lambda m: 0.25, 0.0, True),
        (lambda m: m.fc.weight.norm() if m is not _LIVE[0] else float("nan"), 10.0, False),
        (lambda m: float("inf") if m is _LIVE[0] else -float("inf"), 10.0, False),
        (lambda m: float("inf") if m is _LIVE[0] else float("nan"), 10.0, False),
        (lambda m: -float("inf"), 10.0, True),  # no number: not checked
        (lambda m: float("nan"), 10.0, True),
        (lambda m: torch.rand(()).item(), 0.0, True),  # the same random state for both
    ],
)
def test_metrics(
    model: nn.Module, path: Path, metric: Callable[[nn.Module], float], tolerance: float, ok: bool
) -> None:
    _LIVE[:] = [model]
    if ok:
        report = resadapt.save_adapters(model, path, metric=metric, tolerance=tolerance)
        numbers = math.isfinite(report.metric_live)
        assert report["metric"].outcome == ("passed" if numbers else "not checked")
        assert report.ok, "what was not checked is no failure; the tensors were proven"
    else:
        with pytest.raises(resadapt.VerificationError, match=r"metric +failed"):
            resadapt.save_adapters(model, path, metric=metric, tolerance=tolerance)
        assert not list(path.parent.iterdir())


@pytest.mark.parametrize(
    ("difference", "tolerance", "ok"),
    [(0.25, 0.25, True), (0.25, 0.125, False), (-0.25, 0.125, False)],
)
def test_tolerance_is_absolute(
    model: nn.Module, path: Path, difference: float, tolerance: float, ok: bool
) -> None:
    values: Iterator[float] = iter([48.5, 48.5 + difference])
    arguments: dict[str, Any] = {"metric": lambda m: next(values), "tolerance": tolerance}
    if ok:
        report = resadapt.save_adapters(model, path, **arguments)
        assert (report.metric_live, report.metric_difference) == (48.5, 0.25)
    else:
        with pytest.raises(
            resadapt.VerificationError,
            match=r"live 48.5, reloaded 48.\d+, difference 0.25, tolerance 0.125",
        ):
            resadapt.save_adapters(model, path, **arguments)


@pytest.mark.parametrize("tolerance", [-1.0, float("nan"), float("inf"), "0"])
def test_tolerance_must_be_one(model: nn.Module, path: Path, tolerance: Any) -> None:
    with pytest.raises(resadapt.AdapterError, match="give a finite number") as caught:
        resadapt.save_adapters(model, path, tolerance=tolerance)
    assert not isinstance(caught.value, resadapt.VerificationError)


def test_a_metric_that_is_none(model: nn.Module, path: Path) -> None:
    for value in (None, "much", torch.zeros(2)):
        with pytest.raises(resadapt.AdapterError, match="not a number"):
            resadapt.save_adapters(model, path, metric=lambda m, value=value: value)
    with pytest.raises(ZeroDivisionError):
        resadapt.save_adapters(model, path, metric=lambda m: 1 / 0)
    assert not list(path.parent.iterdir())
    assert model.training


def _train_in_metric(model: nn.Module) -> float:
    with torch.no_grad():
        next(resadapt.trainable_parameters(model)).add_(1)
    return 1.0


def _drift_in_metric(model: nn.Module) -> float:
    with torch.no_grad():
        model.conv.weight.add_(1)
    return 1.0


def _halve_in_metric(model: nn.Module) -> float:
    for name, module in model.named_modules():
        if name.endswith("resadapt"):
            module.half()
    return 1.0


@pytest.mark.parametrize("metric", [_train_in_metric, _halve_in_metric])
def test_a_metric_that_changes_the_model_is_found_out(
    model: nn.Module, path: Path, metric: Callable[[nn.Module], float]
) -> None:
    state = resadapt.adapter_state_dict(model)
    with pytest.raises(
        resadapt.VerificationError, match=r"changed the live model.*is restored"
    ) as caught:
        resadapt.save_adapters(model, path, metric=metric)
    assert not list(path.parent.iterdir())
    assert same(state, resadapt.adapter_state_dict(model)), "the set is put back"
    assert caught.value.report["tensors"].outcome == "failed"


def test_a_metric_that_moves_the_backbone_is_found_out(model: nn.Module, path: Path) -> None:
    with pytest.raises(resadapt.BackboneDriftError, match=r"conv\.weight"):
        resadapt.save_adapters(model, path, metric=_drift_in_metric)
    assert not list(path.parent.iterdir())


def test_a_metric_that_prunes_is_found_out(model: nn.Module, path: Path) -> None:
    adapter = next(module for name, module in model.named_modules() if name.endswith("default.up"))
    with pytest.raises(resadapt.VerificationError, match="cannot be restored"):
        resadapt.save_adapters(
            model,
            path,
            metric=lambda m: float(
                torch.nn.utils.prune.l1_unstructured(adapter, "weight", 0.5) is None
            ),
        )
    assert not list(path.parent.iterdir())


def _trains_the_others(model: Any) -> float:
    with torch.no_grad():
        next(model.conv.resadapt.b.parameters()).add_(1)
    return 0.0


def _injects(model: Any) -> float:
    resadapt.inject_adapters(model, "conv", 2, name="new")
    return 0.0


@pytest.mark.parametrize("metric", [_trains_the_others, _injects])
def test_a_metric_that_changes_other_sets_is_found_out(path: Path, metric: Any) -> None:
    model = two_sets()
    before = picture(model)
    with pytest.raises(
        resadapt.VerificationError, match=r"changed the live model.*(is restored|is removed again)"
    ):
        resadapt.save_adapters(model, path, metric=metric)
    assert picture(model) == before
    with pytest.raises(resadapt.VerificationError, match="'b' was removed"):
        resadapt.save_adapters(
            model, path, metric=lambda m: float(resadapt.remove_adapters(m, "b") is None)
        )


def test_an_unproven_save_tells_the_metric(model: nn.Module, path: Path) -> None:
    assert (
        resadapt.save_adapters(model, path, metric=lambda m: 0.25, verify=False).metric_live == 0.25
    )


def test_a_metric_that_removes_the_set(path: Path) -> None:
    model = resadapt.inject_adapters(net(), "conv", 2)
    with pytest.raises(resadapt.AdapterError, match="changed the live model"):
        resadapt.save_adapters(
            model, path, metric=lambda m: float(len(list(resadapt.remove_adapters(m).children())))
        )
    assert not path.exists()
