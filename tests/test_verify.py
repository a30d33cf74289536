"""Saving proves itself, and a failure of any kind leaves the previous file."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import images, picture, small_resnet, train
from torch import Tensor, nn

import resadapt
from resadapt.adapters import PooledAdapter
from resadapt.base.quiet import describe, generate
from resadapt.proof.probe import default_form, farthest, outputs_of, record_probe

X = images()


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


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "set.pt"


def outcomes(report: resadapt.VerificationReport) -> dict[str, str]:
    return {check.name: check.outcome for check in report.checks}


def test_a_full_proof(model: nn.Module, path: Path) -> None:
    before = picture(model)
    report = resadapt.save_adapters(model, path, metric=lambda m: m(X).mean())
    assert set(outcomes(report).values()) == {"passed"}
    assert report.ok
    assert report.path == path
    assert report.metric_difference == 0.0
    assert report.metric_live == report.metric_reloaded == model.eval()(X).mean().item()
    model.train()
    model._forward_pre_hooks.clear()
    assert {k: v for k, v in picture(model).items() if k} == {k: v for k, v in before.items() if k}
    assert "equal bit for bit" in str(report)


def test_what_was_not_checked_says_so(model: nn.Module, path: Path) -> None:
    report = resadapt.save_adapters(model, path)
    assert outcomes(report)["metric"] == "not checked"
    assert report.metric_difference is None
    report = resadapt.save_adapters(model, path, verify=False)
    assert set(outcomes(report).values()) == {"not checked"}
    assert not report.ok
    plain = resadapt.verify_adapters(net(), path)
    with pytest.raises(resadapt.VerificationError, match="Load the file first, or leave out metric="):
        resadapt.verify_adapters(net(), path, metric=lambda m: 1.0)
    assert outcomes(plain) == {
        "file": "passed",
        "backbone": "passed",
        "tensors": "not checked",
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
        (lambda m: float("nan"), 10.0, False),
        (lambda m: float("inf"), 10.0, False),
        (lambda m: torch.rand(()).item(), 0.0, True),  # the same random state for both
    ],
)
def test_metrics(model: nn.Module, path: Path, metric: Callable[[nn.Module], float], tolerance: float, ok: bool) -> None:
    if ok:
        assert resadapt.save_adapters(model, path, metric=metric, tolerance=tolerance).ok
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
    with pytest.raises(resadapt.VerificationError, match="give a finite number"):
        resadapt.save_adapters(model, path, tolerance=tolerance)


def test_a_metric_that_is_none(model: nn.Module, path: Path) -> None:
    for value in (None, "much", torch.zeros(2)):
        with pytest.raises(resadapt.VerificationError, match="not a number"):
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


@pytest.mark.parametrize("metric", [_train_in_metric, _drift_in_metric])
def test_a_metric_that_changes_the_model_is_found_out(model: nn.Module, path: Path, metric: Callable[[nn.Module], float]) -> None:
    with pytest.raises(resadapt.VerificationError, match="changed the live model"):
        resadapt.save_adapters(model, path, metric=metric)
    assert not list(path.parent.iterdir())


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
    restore = resadapt.proof.compare.restore

    def careless(clean: nn.Module, *args: Any) -> None:
        restore(clean, *args)
        with torch.no_grad():
            clean.fc.bias[0] = torch.nextafter(clean.fc.bias[0], torch.tensor(math.inf))

    monkeypatch.setattr(resadapt.proof.compare, "restore", careless)
    with pytest.raises(resadapt.VerificationError, match=r"tensors +failed +differ: head\.fc\.bias"):
        resadapt.save_adapters(model, path)
    assert not list(path.parent.iterdir())


def test_verifying_another_models_file(model: nn.Module, path: Path) -> None:
    resadapt.save_adapters(model, path)
    assert resadapt.verify_adapters(model, path, metric=lambda m: m(X).sum()).ok
    with torch.no_grad():
        model.fc.bias.add_(1)
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
    with pytest.raises(resadapt.VerificationError, match="NaN, which proves nothing"):
        resadapt.save_adapters(model, path, probe=X * float("nan"))


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


def test_recorded_outputs_find_other_weights(model: nn.Module, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs from another machine may differ in rounding, not in more."""
    outputs = outputs_of(model, X)
    record, stored = record_probe("given", None, X, outputs)
    assert farthest(record, stored, outputs) == (0.0, True)
    rounding = {key: value * (1 + 1e-6) for key, value in outputs.items()}
    difference, ok = farthest(record, stored, rounding)
    assert ok
    assert 0 < difference < 1e-5
    assert not farthest(record, stored, {key: value * 1.01 for key, value in outputs.items()})[1]
    assert not farthest(record, stored, {key: value * math.nan for key, value in outputs.items()})[1]
    assert not farthest(record, stored, {key: value[:1] for key, value in outputs.items()})[1]
    long = {"output": torch.arange(10_000.0)}
    record, stored = record_probe("given", None, X, long)
    assert stored["probe.output"].tolist() == list(range(0, 10_000, 3))


def test_generated_probes_are_the_same_everywhere() -> None:
    values = generate({"shape": [2, 3], "dtype": "float64"})
    expected = [(i * 2654435761 % 2**32 // 2**16) / 2**15 - 1 for i in range(1, 7)]
    assert values.tolist() == [expected[:3], expected[3:]]
    form = describe([X, (X.double(), X[0])])
    made = generate(form)
    assert describe(made) == form
    assert describe({"x": X}) is describe(torch.zeros(2, dtype=torch.int64)) is describe(["text"]) is describe(None) is None
    for wrong in ({"shape": [-1], "dtype": "float32"}, {"shape": [1], "dtype": "int64"}, {"shape": [True], "dtype": "nope"}, 3):
        with pytest.raises(ValueError, match="not the form"):
            generate(wrong)
    with pytest.raises(ValueError, match="elements"):
        generate({"shape": [10**6, 10**6], "dtype": "float32"})
    assert default_form(small_resnet().double()) == {"shape": [2, 3, 64, 64], "dtype": "float64"}


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
    with pytest.raises(resadapt.VerificationError, match=r"cannot be copied.*verify=False"):
        resadapt.save_adapters(model, path)
    resadapt.save_adapters(model, path, verify=False)


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
