"""Saving proves itself, and a failure of any kind leaves the previous file."""

from __future__ import annotations

import dataclasses
import math
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from support import SmallNet, images, picture, private, small_net, small_resnet, train
from torch import Tensor, nn

import resadapt
from resadapt.adapters import PooledAdapter
from resadapt.base.inputs import describe, generate, guesses
from resadapt.base.outputs import outputs_of
from resadapt.proof.probe import Probe, ProbeRun, compare_with_record, record_probe, same

X = images()
_LIVE: list[nn.Module] = []


class Net(nn.Module):
    """Small, takes images of any size, with dropout and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.bn(self.conv(x))).mean((2, 3)))


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def model() -> nn.Module:
    model = resadapt.inject_adapters(net(), "bn", 2, head="fc")
    train(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    return model


LINES = ("file", "reconstruction", "backbone", "tensors", "sites", "outputs", "recorded outputs", "metric")


def outcomes(report: resadapt.types.VerificationReport) -> dict[str, str]:
    return {check.name: check.outcome for check in report.checks}


def test_a_full_proof(model: nn.Module, path: Path) -> None:
    before = picture(model)
    report = resadapt.save_adapters(model, path, metric=lambda m: m(X).mean(), rebuild=net)
    assert set(outcomes(report).values()) == {"passed"}
    assert report.ok
    assert report.path == path
    assert report.metric_difference == 0.0
    assert report.metric_live == report.metric_reloaded == model.eval()(X).mean().item()
    model.train()
    assert picture(model) == before
    assert "equal bit for bit" in str(report)


def test_what_was_not_checked_says_so(model: nn.Module, path: Path) -> None:
    report = resadapt.save_adapters(model, path)
    assert outcomes(report)["metric"] == "not checked"
    assert report.metric_difference is None
    report = resadapt.save_adapters(model, path, verify=False)
    assert set(outcomes(report).values()) == {"not checked"}
    assert not report.ok
    plain = resadapt.verify_adapters(net(), path)
    with pytest.raises(resadapt.AdapterError, match="Load the file first, or leave out metric="):
        resadapt.verify_adapters(net(), path, metric=lambda m: 1.0)
    assert outcomes(plain) == {
        "file": "passed",
        "reconstruction": "not checked",
        "backbone": "passed",
        "tensors": "not checked",
        "sites": "passed",
        "outputs": "not checked",
        "recorded outputs": "passed",
        "metric": "not checked",
    }
    assert plain.ok
    flat = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    resadapt.inject_adapters(flat, "1", 2)
    report = resadapt.save_adapters(flat, path)
    assert outcomes(report)["outputs"] == "not checked"
    assert "pass probe=" in report["outputs"].detail
    assert report.ok
    assert not resadapt.verify_adapters(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), path).ok
    del flat
    fixed = resadapt.inject_adapters(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 30 * 30, 2)), "0", 2)
    report = resadapt.save_adapters(fixed, path)
    assert "does not take the input" in report["outputs"].detail
    assert outcomes(resadapt.save_adapters(fixed, path, probe=X))["outputs"] == "passed"


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
def test_metrics(model: nn.Module, path: Path, metric: Callable[[nn.Module], float], tolerance: float, ok: bool) -> None:
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


@pytest.mark.parametrize(("difference", "tolerance", "ok"), [(0.25, 0.25, True), (0.25, 0.125, False), (-0.25, 0.125, False)])
def test_tolerance_is_absolute(model: nn.Module, path: Path, difference: float, tolerance: float, ok: bool) -> None:
    values: Iterator[float] = iter([48.5, 48.5 + difference])
    arguments: dict[str, Any] = {"metric": lambda m: next(values), "tolerance": tolerance}
    if ok:
        report = resadapt.save_adapters(model, path, **arguments)
        assert (report.metric_live, report.metric_difference) == (48.5, 0.25)
    else:
        with pytest.raises(resadapt.VerificationError, match=r"live 48.5, reloaded 48.\d+, difference 0.25, tolerance 0.125"):
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
def test_a_metric_that_changes_the_model_is_found_out(model: nn.Module, path: Path, metric: Callable[[nn.Module], float]) -> None:
    state = resadapt.adapter_state_dict(model)
    with pytest.raises(resadapt.VerificationError, match=r"changed the live model.*is put back") as caught:
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
    with pytest.raises(resadapt.VerificationError, match="cannot be put back"):
        resadapt.save_adapters(
            model, path, metric=lambda m: float(torch.nn.utils.prune.l1_unstructured(adapter, "weight", 0.5) is None)
        )
    assert not list(path.parent.iterdir())


def _two_sets() -> Any:
    model = resadapt.inject_adapters(net(), "conv", 2, name="b", head="fc", norm="stats")
    return resadapt.inject_adapters(model, "conv", 2, name="a", head="fc", norm="stats")


def _trains_the_others(model: Any) -> float:
    with torch.no_grad():
        next(model.conv.resadapt.b.parameters()).add_(1)
    return 0.0


def _injects(model: Any) -> float:
    resadapt.inject_adapters(model, "conv", 2, name="new")
    return 0.0


@pytest.mark.parametrize("metric", [_trains_the_others, _injects])
def test_a_metric_that_changes_other_sets_is_found_out(path: Path, metric: Any) -> None:
    model = _two_sets()
    before = picture(model)
    with pytest.raises(resadapt.VerificationError, match=r"changed the live model.*(is put back|is taken out)"):
        resadapt.save_adapters(model, path, metric=metric)
    assert picture(model) == before
    with pytest.raises(resadapt.VerificationError, match="'b' is gone"):
        resadapt.save_adapters(model, path, metric=lambda m: float(resadapt.remove_adapters(m, "b") is None))


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a"), ("b", None)])
def test_a_metric_over_all_sets_leaves_them_as_they_were(order: tuple[Any, ...], path: Path) -> None:
    """Which ones are trained, their gradients and statistics."""
    model = _two_sets()
    with resadapt.adapters_for(model, ["a", "b"]):
        model.train()(X[:2]).sum().backward()
    states = {name: resadapt.adapter_state_dict(model, name) for name in "ab"}
    before, gradients = picture(model), [p.grad.clone() for p in resadapt.trainable_parameters(model)]

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
    assert all(torch.equal(p.grad, g) for p, g in zip(resadapt.trainable_parameters(model), gradients, strict=True))
    assert all(same(state, resadapt.adapter_state_dict(model, name)) for name, state in states.items())
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
    for parameter, (gradient, value) in zip(resadapt.trainable_parameters(model), gradients, strict=True):
        assert parameter.grad is gradient
        assert torch.equal(gradient, value)


def test_a_failing_probe_leaves_a_graph_that_waits_for_its_backward_pass(path: Path) -> None:
    model = resadapt.inject_adapters(net(), "conv", 2, init="normal", head="fc").train()
    loss = model(X).square().sum()
    with pytest.raises(resadapt.AdapterError, match="cannot be called"):
        resadapt.save_adapters(model, path, probe=torch.zeros(1, 7))
    loss.backward()


def test_an_unproven_save_tells_the_metric(model: nn.Module, path: Path) -> None:
    assert resadapt.save_adapters(model, path, metric=lambda m: 0.25, verify=False).metric_live == 0.25


def test_a_metric_in_training_mode_leaves_the_statistics_of_the_head(path: Path) -> None:
    model = resadapt.inject_adapters(net(), "conv", 2, head=["bn", "fc"])
    before = resadapt.adapter_state_dict(model)
    resadapt.save_adapters(model, path, metric=lambda m: float(m.train()(X).numel()))
    assert all(torch.equal(value, before[key]) for key, value in resadapt.adapter_state_dict(model).items())


def test_what_the_file_cannot_carry_is_found_out(model: nn.Module, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A family whose function depends on something that is not in the file: the old way to lose half an F1."""
    resadapt.save_adapters(model, path)
    saved = path.read_bytes()
    scale = [2.0]
    forward = PooledAdapter.forward
    monkeypatch.setattr(PooledAdapter, "forward", lambda self, x: forward(self, x) * getattr(self, "scale", 1.0))
    model.bn.resadapt.default.scale = scale[0]
    with pytest.raises(resadapt.VerificationError, match=r"outputs +failed +live and reloaded model differ"):
        resadapt.save_adapters(model, path)
    with pytest.raises(resadapt.VerificationError, match=r"metric +failed"):
        resadapt.save_adapters(model, path, metric=lambda m: m(X).sum())
    assert path.read_bytes() == saved
    assert [p.name for p in path.parent.iterdir()] == ["set.pt"]


def test_wrong_bytes_on_the_way_to_the_disk(model: nn.Module, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resadapt.save_adapters(model, path)
    saved = path.read_bytes()
    fsync = os.fsync

    def corrupting(descriptor: int) -> None:
        fsync(descriptor)
        os.pwrite(descriptor, b"\xff\xfe", 1000)

    monkeypatch.setattr(os, "fsync", corrupting)
    with pytest.raises(resadapt.AdapterFileError, match="damaged"):
        resadapt.save_adapters(model, path)
    assert path.read_bytes() == saved


def test_a_tensor_that_comes_back_otherwise(model: nn.Module, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = resadapt.proof.compare.load_file_content

    def careless(clean: nn.Module, *args: Any) -> None:
        load(clean, *args)
        with torch.no_grad():
            bias = private(clean, "fc").bias
            bias[0] = torch.nextafter(bias[0], torch.tensor(math.inf))

    monkeypatch.setattr(resadapt.proof.compare, "load_file_content", careless)
    with pytest.raises(resadapt.VerificationError, match=r"tensors +failed +differ: 'head\.fc\.bias'"):
        resadapt.save_adapters(model, path)
    assert not list(path.parent.iterdir())


def test_verifying_another_models_file(model: nn.Module, path: Path) -> None:
    resadapt.save_adapters(model, path)
    assert resadapt.verify_adapters(model, path, metric=lambda m: m(X).sum()).ok
    with torch.no_grad():
        private(model, "fc").bias.add_(1)
    report = resadapt.verify_adapters(model, path, metric=lambda m: m(X).sum())
    assert not report.ok
    assert (outcomes(report)["tensors"], outcomes(report)["outputs"], outcomes(report)["metric"]) == ("failed",) * 3
    assert outcomes(report)["recorded outputs"] == "passed"
    for name in ("default", "other"):
        other = resadapt.inject_adapters(net(), "conv", 2, name=name)
        report = resadapt.verify_adapters(other, path)
        assert not report.ok
        assert f"set '{name}' differs from the file's in 'sites', 'head'" in report["tensors"].detail


def test_verifying_under_another_name(model: nn.Module, path: Path) -> None:
    resadapt.save_adapters(model, path)
    renamed = resadapt.load_adapters(net(), path, name="renamed")
    assert outcomes(resadapt.verify_adapters(renamed, path))["tensors"] == "passed"


def test_probes_of_ones_own(model: nn.Module, path: Path) -> None:
    assert outcomes(resadapt.save_adapters(model, path, probe=X))["outputs"] == "passed"
    assert "another input" in resadapt.verify_adapters(model, path)["recorded outputs"].detail
    assert outcomes(resadapt.verify_adapters(model, path, probe=X))["recorded outputs"] == "passed"
    assert outcomes(resadapt.verify_adapters(model, path, probe={"x": X}))["outputs"] == "passed"
    report = resadapt.save_adapters(model, path, probe=X * float("nan"))
    assert "NaN, which proves nothing" in report["outputs"].detail
    assert outcomes(report)["outputs"] == outcomes(report)["recorded outputs"] == "not checked"
    assert resadapt.read_adapter_info(path).probe is None


def test_outputs_that_are_never_the_same(path: Path) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.runs = 0

        def forward(self, x: Tensor) -> Tensor:
            self.runs += 1
            return self.conv(x) + self.runs

    report = resadapt.save_adapters(resadapt.inject_adapters(Noisy(), "conv", 2), path)
    assert outcomes(report)["outputs"] == outcomes(report)["recorded outputs"] == "not checked"
    assert "other outputs each time" in report["outputs"].detail


def record(outputs: dict[str, Tensor]) -> tuple[resadapt.types.ProbeRecord, dict[str, Tensor]]:
    kept, stored = record_probe(ProbeRun(Probe(X), outputs))
    assert kept is not None
    return kept, stored


def test_recorded_outputs_find_other_weights(model: nn.Module, path: Path) -> None:
    """Outputs from another machine may differ in rounding, not in more."""
    outputs = outputs_of(model, X)
    kept, stored = record(outputs)
    assert compare_with_record(kept, stored, outputs) == (0.0, True)
    rounding = {key: value * (1 + 1e-6) for key, value in outputs.items()}
    difference, ok = compare_with_record(kept, stored, rounding)
    assert ok
    assert 0 < difference < 1e-5
    for wrong in (
        lambda value: value * 1.01,
        lambda value: value * math.nan,
        lambda value: value[:1],
        lambda value: value.double(),
    ):
        assert not compare_with_record(kept, stored, {key: wrong(value) for key, value in outputs.items()})[1]
    kept, stored = record({"a": torch.ones(2), "b": torch.ones(2)})
    for a, b in ((1.5, 1.25), (1.25, 1.5)):
        assert compare_with_record(kept, stored, {"a": torch.full((2,), a), "b": torch.full((2,), b)}) == (0.5, False), (
            "the largest"
        )
    assert math.isnan(compare_with_record(kept, stored, {"a": torch.full((2,), math.nan), "b": torch.ones(2)})[0])
    kept, stored = record({"output": torch.arange(10_000.0)})
    assert stored["probe.output"].tolist() == list(range(0, 10_000, 3))


def test_recorded_outputs_of_other_kinds_than_floats() -> None:
    for one, other in (
        (torch.tensor([1 + 0j]), torch.tensor([1 + 1000j])),
        (torch.tensor([2**60]), torch.tensor([2**60 + 7])),
        (torch.tensor([1j], dtype=torch.complex128).conj(), torch.tensor([1j], dtype=torch.complex128)),
    ):
        kept, stored = record({"output": one})
        assert compare_with_record(kept, stored, {"output": one})[1]
        assert compare_with_record(kept, {"probe.output": one.resolve_conj()}, {"output": one})[1], "as files of format 1 have it"
        assert not compare_with_record(kept, stored, {"output": other})[1]
    kept, stored = record({"output": torch.ones(3)})
    assert not compare_with_record(kept, {"probe.output": torch.ones(0)}, {"output": torch.ones(3)})[1]


def test_generated_probes_are_the_same_everywhere() -> None:
    values = generate({"shape": [2, 3], "dtype": "float64"})
    expected = [(i * 2654435761 % 2**32 // 2**16) / 2**15 - 1 for i in range(1, 7)]
    assert values.tolist() == [expected[:3], expected[3:]]
    long = generate({"shape": [2**20 + 5], "dtype": "float64"})
    assert long[-1] == ((2**20 + 5) * 2654435761 % 2**32 // 2**16) / 2**15 - 1, "made in pieces"
    form = describe([X, (X.double(), X[0])])
    made = generate(form)
    assert describe(made) == form
    assert describe({"x": X}) is describe(torch.zeros(2, dtype=torch.int64)) is describe(["text"]) is describe(None) is None
    assert describe(torch.zeros(1).expand(2**26 + 1)) is None, "larger than what would be made"
    assert guesses(small_resnet().double().modules())[0] == {"shape": [2, 3, 64, 64], "dtype": "float64"}
    assert guesses([nn.Linear(2, 2)]) == []


LARGE = {"shape": [2**26 // 4], "dtype": "float32"}


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"shape": [-1], "dtype": "float32"}, "not the form"),
        ({"shape": [1], "dtype": "int64"}, "not the form"),
        ({"shape": [True], "dtype": "nope"}, "not the form"),
        ({"shape": [1], "dtype": "float32", "list": [LARGE] * 99}, "not the form"),
        ({"list": [], "tuple": []}, "not the form"),
        ({"shape": [1] * 9, "dtype": "float32"}, "not the form"),
        (3, "not the form"),
        (None, "not the form"),
        ({"shape": [10**6, 10**6], "dtype": "float32"}, "elements"),
        ({"list": [LARGE] * 5}, "elements"),
        ({"tuple": [{"list": [LARGE, LARGE]}, {"tuple": [LARGE, LARGE, LARGE]}]}, "elements"),
    ],
)
def test_forms_from_a_file_are_checked_as_a_whole_before_memory_is_taken(form: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(form)


def test_a_form_that_is_too_deep() -> None:
    form: Any = {"shape": [1], "dtype": "float32"}
    for _ in range(8):
        form = {"list": [form]}
    generate(form)
    with pytest.raises(ValueError, match="not the form"):
        generate({"list": [form]})


def test_the_example_input_becomes_the_probe(path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat = nn.Flatten()
            self.one = nn.Linear(4, 4)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
            return {"both": [self.one(self.flat(x)) + y], "none": None}

    torch.manual_seed(0)
    model = resadapt.inject_adapters(Two(), "one", 2, example_input=(torch.zeros(3, 2, 2), torch.zeros(1)))
    assert outcomes(resadapt.save_adapters(model, path))["outputs"] == "passed"
    probe = resadapt.read_adapter_info(path).probe
    assert probe is not None
    assert list(probe.outputs) == ["output.both.0"]
    torch.manual_seed(0)
    assert outcomes(resadapt.verify_adapters(Two(), path))["recorded outputs"] == "passed"
    torch.manual_seed(0)
    loaded = resadapt.load_adapters(Two(), path)
    assert outcomes(resadapt.save_adapters(loaded, path))["outputs"] == "passed", "a loaded set has its example too"


def test_bad_targets(model: nn.Module, tmp_path: Path) -> None:
    for path, message in ((tmp_path, "is a directory"), (tmp_path / "no" / "set.pt", r"no does not exist\. Create it")):
        with pytest.raises(resadapt.AdapterFileError, match=message):
            resadapt.save_adapters(model, path)
    assert not list(tmp_path.iterdir())


def test_a_full_disk(model: nn.Module, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resadapt.save_adapters(model, path)
    saved = path.read_bytes()
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:

            def full(*_: Any) -> None:
                raise OSError(28, "No space left on device")

            patch.setattr(os, name, full)
            with pytest.raises(resadapt.AdapterFileError, match=r"No space left on device.*intact"):
                resadapt.save_adapters(model, path)
        assert path.read_bytes() == saved
        assert [p.name for p in path.parent.iterdir()] == ["set.pt"]


def test_a_link_stays_a_link_and_permissions_are_ordinary(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.pt"
    link.symlink_to(tmp_path / "real" / "set.pt")
    resadapt.save_adapters(model, link)
    assert link.is_symlink()
    assert (tmp_path / "real" / "set.pt").is_file()
    umask = os.umask(0)
    os.umask(umask)
    assert link.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_model_that_cannot_be_copied(path: Path) -> None:
    model = resadapt.inject_adapters(net(), "bn", 2)
    model.cache = torch.zeros(1, requires_grad=True) * 2  # deepcopy takes leaves only
    with pytest.raises(resadapt.VerificationError, match=r"reconstruction +failed .*cannot be copied.*: pass rebuild=") as caught:
        resadapt.save_adapters(model, path)
    assert outcomes(caught.value.report) == {**dict.fromkeys(LINES, "not checked"), "reconstruction": "failed"}
    assert not list(path.parent.iterdir())
    assert not resadapt.save_adapters(model, path, verify=False).ok
    assert resadapt.save_adapters(model, path, rebuild=net).ok


def test_kill_9_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    """Processes that save for ever are killed at thirty moments; what they leave is always a file that one of them wrote."""
    script = """
        import os, signal, sys, time
        import torch, resadapt
        from torch import nn

        torch.set_num_threads(1)  # so that forked children can go on computing
        path = sys.argv[1]
        def build():
            torch.manual_seed(0)
            return nn.Sequential(nn.Conv2d(3, 4, 3))
        def values(model):
            return {value for p in resadapt.trainable_parameters(model) for value in p.flatten().tolist()}
        model = resadapt.inject_adapters(build(), "0", 2)
        for moment in range(30):
            read, write = os.pipe()
            child = os.fork()
            if child == 0:
                count = 0
                while True:
                    count += 1
                    with torch.no_grad():
                        for parameter in resadapt.trainable_parameters(model):
                            parameter.fill_(1000 * moment + count)
                    resadapt.save_adapters(model, path)
                    os.write(write, b"x")
            os.close(write)
            os.read(read, 1)
            time.sleep(0.0007 * moment)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            saved = 1
            while more := os.read(read, 1024):
                saved += len(more)
            os.close(read)
            found = values(resadapt.load_adapters(build(), path))
            assert len(found) == 1, "never a mixture"
            assert found <= {1000 * moment + saved, 1000 * moment + saved + 1}, (found, moment, saved)
        print("survived")
    """
    path = tmp_path / "set.pt"
    command = [sys.executable, "-c", textwrap.dedent(script), str(path)]
    assert subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout == "survived\n"


def test_a_reloaded_model_that_fails_alone_is_a_failure(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = resadapt.inject_adapters(small_net(), "c2", 2)
    load = resadapt.proof.compare.load_file_content

    def broken(clean: Any, *args: Any) -> None:
        load(clean, *args)
        clean.bn.eps = float("nan")

    monkeypatch.setattr(resadapt.proof.compare, "load_file_content", broken)
    with pytest.raises(resadapt.VerificationError, match=r"outputs +failed +reloaded model: the outputs .* contain NaN"):
        resadapt.save_adapters(model, path)


def test_a_model_that_changes_its_input(path: Path) -> None:
    class InPlace(SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(2))

    torch.manual_seed(0)
    model = resadapt.inject_adapters(InPlace(), "c2", 2)
    probe = X.clone()
    assert resadapt.save_adapters(model, path, probe=probe)["outputs"].outcome == "passed"
    assert torch.equal(probe, X)


def test_no_numbers_are_no_proof(path: Path) -> None:
    class Empty(SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:0]

    report = resadapt.save_adapters(resadapt.inject_adapters(Empty(), "c2", 2), path)
    assert report["outputs"].outcome == "not checked"


def test_saving_under_autocast_records_what_is_there_without(path: Path) -> None:
    model = resadapt.inject_adapters(small_net(), "c2", 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert resadapt.save_adapters(model, path).ok
    assert resadapt.verify_adapters(model, path)["recorded outputs"].outcome == "passed"


class Reassigns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.register_buffer("n", torch.zeros(()))
        self.register_buffer("wide", torch.ones(1).expand(4))
        self.register_buffer("grid", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.conv(x)
        self.grid = torch.ones(x.shape[-1])
        self.n = self.n + 1
        return self.conv(x)


def test_buffers_that_a_forward_puts_in_place(path: Path) -> None:
    torch.manual_seed(0)
    model = Reassigns()
    before = picture(model)
    resadapt.inject_adapters(model, "conv", 2, example_input=X)
    assert resadapt.save_adapters(model, path).ok
    assert model.n == 0
    assert model.grid is None
    resadapt.remove_adapters(model)
    assert picture(model) == before


def test_a_cache_that_is_filled_later_is_no_drift(path: Path) -> None:
    class Caches(Reassigns):
        def forward(self, x: Tensor) -> Tensor:
            self.grid = torch.ones(x.shape[-1])
            return self.conv(x)

    torch.manual_seed(0)
    model = resadapt.inject_adapters(Caches(), "conv", 2)
    model(X)
    assert resadapt.check_backbone(model).ok
    assert resadapt.save_adapters(model, path).ok
    torch.manual_seed(0)
    ran = Caches()
    ran(X)
    resadapt.load_adapters(ran, path)


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
def test_a_metric_that_leaves_something_behind_changes_nothing(metric: Any, training: bool, path: Path) -> None:
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
        assert torch.equal(model.bn.running_mean, net().bn.running_mean), "those of the plain head, too"


def test_a_metric_that_removes_the_set(path: Path) -> None:
    model = resadapt.inject_adapters(net(), "conv", 2)
    with pytest.raises(resadapt.AdapterError, match="changed the live model"):
        resadapt.save_adapters(model, path, metric=lambda m: float(len(list(resadapt.remove_adapters(m).children()))))
    assert not path.exists()


class Returns(nn.Module):
    """Returns what it is told to, beside something that depends on the adapter."""

    def __init__(self, what: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.what = what

    def forward(self, x: Tensor) -> Any:
        return self.what(self.conv(x))


def returns(what: Callable[[Tensor], Any]) -> nn.Module:
    torch.manual_seed(0)
    return Returns(what)


@dataclasses.dataclass
class Output:
    logits: Tensor
    extra: Any = None


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize(
    ("what", "places"),
    [
        (lambda y: y.to(torch.complex128), ["output"]),
        (lambda y: y.mean((2, 3)).to_sparse(), ["output.part0", "output.part1"]),
        (lambda y: torch.nested.nested_tensor([y[0], y[1, :2]]), ["output.part0", "output.part1"]),
        (lambda y: torch.quantize_per_tensor(y, 0.1, 0, torch.qint8), ["output.part0", "output.part1"]),
        (lambda y: {"a": [y, (y > 0, y.long())], "b": "text"}, ["output.a.0", "output.a.1.0", "output.a.1.1"]),
        (lambda y: Output(y, Output(y.half())), ["output.logits", "output.extra.logits"]),
        (lambda y: y.to(torch.float8_e4m3fn), ["output"]),
    ],
)
def test_outputs_of_every_kind_are_compared(what: Any, places: list[str], suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"set.{suffix}"
    model = resadapt.inject_adapters(returns(what), "conv", 2)
    report = resadapt.save_adapters(model, path, probe=X, rebuild=lambda: returns(what))
    assert outcomes(report)["outputs"] == outcomes(report)["recorded outputs"] == "passed"
    assert list(resadapt.read_adapter_info(path).probe.outputs) == places
    with torch.no_grad():
        model.conv.resadapt.default.up.bias.add_(1)
    assert outcomes(resadapt.verify_adapters(model, path, probe=X))["outputs"] == "failed"


@pytest.mark.parametrize(
    "what",
    [
        lambda y: y[:0],
        lambda y: [{"boxes": y[:0, :0], "labels": torch.zeros(0)}],
        lambda y: None,
        lambda y: "text",
        lambda y: [],
        lambda y: y * float("nan"),
        lambda y: (y, y[:1] / 0 * 0),
    ],
)
def test_nothing_compared_is_nothing_proven(what: Any, path: Path) -> None:
    model = resadapt.inject_adapters(returns(what), "conv", 2)
    report = resadapt.save_adapters(model, path, probe=X)
    assert outcomes(report)["outputs"] == outcomes(report)["recorded outputs"] == "not checked"
    assert outcomes(report)["tensors"] == "passed"
    assert not resadapt.verify_adapters(returns(what), path, probe=X).ok, "a plain backbone has only the outputs"


def test_every_report_has_the_same_lines(path: Path) -> None:
    model = resadapt.inject_adapters(net(), "bn", 2)
    reports = [
        resadapt.save_adapters(model, path),
        resadapt.save_adapters(model, path, verify=False),
        resadapt.verify_adapters(model, path),
        resadapt.verify_adapters(net(), path),
        resadapt.verify_adapters(small_resnet(), path),
        resadapt.verify_adapters(resadapt.inject_adapters(net(), "conv", 2), path),
    ]
    for report in reports:
        assert tuple(check.name for check in report.checks) == LINES
        assert len(str(report).splitlines()) == 1 + len(LINES)
        assert report["backbone"].name == "backbone"
        assert all(check.detail for check in report.checks)


def test_errors_carry_their_reports_and_can_be_pickled(path: Path) -> None:
    model = resadapt.inject_adapters(net(), "bn", 2)
    with pytest.raises(resadapt.VerificationError) as failed:
        resadapt.save_adapters(model, path, metric=_counter())
    assert failed.value.report["metric"].outcome == "failed"
    model.conv.bias.data.add_(1)
    with pytest.raises(resadapt.BackboneDriftError) as drifted:
        resadapt.save_adapters(model, path)
    assert drifted.value.report == resadapt.check_backbone(model)
    for error in (failed.value, drifted.value):
        again = pickle.loads(pickle.dumps(error))
        assert (str(again), again.report) == (str(error), error.report)


def _counter() -> Callable[[nn.Module], float]:
    numbers = iter(range(99))
    return lambda _: float(next(numbers))


@pytest.mark.parametrize("prune", ["prune", "weight_norm", "parametrize"])
def test_an_adapter_that_was_pruned_or_parametrized(prune: str, path: Path) -> None:
    model = resadapt.inject_adapters(net(), "bn", 4, head="fc")
    up = model.bn.resadapt.default.up
    nn.init.normal_(up.weight)
    if prune == "prune":
        torch.nn.utils.prune.l1_unstructured(up, "weight", 0.5)
    elif prune == "weight_norm":
        torch.nn.utils.parametrizations.weight_norm(up)
    else:
        torch.nn.utils.parametrize.register_parametrization(up, "weight", nn.Tanh())
    for call in (
        lambda: resadapt.save_adapters(model, path),
        lambda: resadapt.save_adapters(model, path, verify=False),
        lambda: resadapt.adapter_state_dict(model),
    ):
        with pytest.raises(resadapt.AdapterKeyError, match=r"adapters of set 'default' .* 'adapters\.bn\.up\.weight'.*permanent"):
            call()
    assert not list(path.parent.iterdir())
    if prune == "prune":
        torch.nn.utils.prune.remove(up, "weight")
    else:
        torch.nn.utils.parametrize.remove_parametrizations(up, "weight")
    assert resadapt.save_adapters(model, path, rebuild=net).ok


def test_paths_as_bytes_and_endings_in_capitals(model: nn.Module, tmp_path: Path) -> None:
    for name, start in (("a.PT", b"PK"), ("b.PTH", b"PK"), ("c.SafeTensors", b"")):
        path = os.fsencode(tmp_path / name)
        assert resadapt.save_adapters(model, path).ok
        assert (tmp_path / name).read_bytes().startswith(start)
        assert resadapt.read_adapter_info(path).path == tmp_path / name
        assert resadapt.verify_adapters(model, path).ok
        assert resadapt.load_adapters(net(), path)
    assert (tmp_path / "c.SafeTensors").read_bytes()[8:9] == b"{"


def test_a_file_that_a_killed_save_left_behind_is_removed_by_the_next(model: nn.Module, tmp_path: Path) -> None:
    killer = """
        import os, signal, sys, resadapt
        from resadapt.proof import verify
        from torch import nn
        verify.read_adapter_file = lambda path: os.kill(os.getpid(), signal.SIGKILL)
        resadapt.save_adapters(resadapt.inject_adapters(nn.Sequential(nn.Conv2d(3, 4, 3)), "0", 2), sys.argv[1])
    """
    target = tmp_path / "set.pt"
    (tmp_path / ".resadapt-mine.tmp").write_text("of somebody else")
    for name in ("set.pt", "other.pt"):
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(killer), str(tmp_path / name)], check=False)
        assert done.returncode == -9
    left = set(tmp_path.iterdir())
    assert len(left) == 3
    resadapt.save_adapters(model, target)
    now = set(tmp_path.iterdir())
    assert len(now) == 3, "the one for this target is gone, the other target's and the strange one are not"
    assert target in now
    resadapt.save_adapters(model, tmp_path / "other.pt")
    assert set(tmp_path.iterdir()) == {target, tmp_path / "other.pt", tmp_path / ".resadapt-mine.tmp"}


def test_a_save_beside_another_one_leaves_its_temporary_file_alone(model: nn.Module, tmp_path: Path) -> None:
    """Two processes save to one place at a time: the later one must not take the other's file for one that was left behind."""
    from resadapt.files.atomic import atomic_write

    target = tmp_path / "set.pt"
    with atomic_write(target, b"first") as first:
        resadapt.save_adapters(model, target)
        assert first.exists()
    assert target.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [target]


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
    model = _two_sets()
    before = picture(model)

    def metric(m: Any) -> float:
        return _writes_everywhere(m) / 0

    with pytest.raises(ZeroDivisionError):
        resadapt.save_adapters(model, path, metric=metric)
    assert picture(model) == before


def test_verifying_changes_nothing_either(path: Path) -> None:
    model = _two_sets()
    resadapt.save_adapters(model, path)
    before = picture(model)
    with pytest.raises(resadapt.VerificationError, match=r"'new' is new.*is put back"):
        resadapt.verify_adapters(model, path, metric=_writes_everywhere)
    assert picture(model) == before


def test_a_metric_that_knows_the_live_model_leaves_it_as_it_was(path: Path) -> None:
    model = resadapt.inject_adapters(net(), "conv", 2, init="normal", head="fc").train()
    model(X).sum().backward()
    before, gradients = picture(model), [p.grad.clone() for p in resadapt.trainable_parameters(model)]

    def metric(_: object) -> float:
        model.requires_grad_(False).zero_grad()
        model.eval()
        return float(model(X).sum())

    assert resadapt.save_adapters(model, path, metric=metric).ok
    assert picture(model) == before
    assert all(torch.equal(p.grad, g) for p, g in zip(resadapt.trainable_parameters(model), gradients, strict=True))


def test_a_head_of_another_form_draws_nothing(path: Path) -> None:
    model = resadapt.inject_adapters(net(), "conv", 2, head={"fc": nn.Linear(4, 7)})
    state = torch.get_rng_state()
    resadapt.save_adapters(model, path)
    assert torch.equal(torch.get_rng_state(), state)
