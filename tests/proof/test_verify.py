"""Saving proves itself, and a failure of any kind leaves the previous file."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from support import picture, private, small_net, small_resnet
from torch import Tensor, nn
from verifying import LINES, X, net, outcomes

import resadapt
from resadapt.adapters import PooledAdapter


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
    with pytest.raises(resadapt.AdapterError, match="Load the file first, or remove metric="):
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
    fixed = resadapt.inject_adapters(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 30 * 30, 2)), "0", 2
    )
    report = resadapt.save_adapters(fixed, path)
    assert "does not accept the generated input" in report["outputs"].detail
    assert outcomes(resadapt.save_adapters(fixed, path, probe=X))["outputs"] == "passed"


def test_what_the_file_cannot_carry_is_found_out(
    model: nn.Module, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A family whose function depends on something that is not in the file: the old way to lose
    half an F1.
    """
    resadapt.save_adapters(model, path)
    saved = path.read_bytes()
    scale = [2.0]
    forward = PooledAdapter.forward
    monkeypatch.setattr(
        PooledAdapter, "forward", lambda self, x: forward(self, x) * getattr(self, "scale", 1.0)
    )
    model.bn.resadapt.default.scale = scale[0]
    with pytest.raises(
        resadapt.VerificationError, match=r"outputs +failed +live and reloaded model differ"
    ):
        resadapt.save_adapters(model, path)
    with pytest.raises(resadapt.VerificationError, match=r"metric +failed"):
        resadapt.save_adapters(model, path, metric=lambda m: m(X).sum())
    assert path.read_bytes() == saved
    assert [p.name for p in path.parent.iterdir()] == ["set.pt"]


def test_a_tensor_that_comes_back_otherwise(
    model: nn.Module, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = resadapt.proof.compare.load_file_content

    def careless(clean: nn.Module, *args: Any) -> None:
        load(clean, *args)
        with torch.no_grad():
            bias = private(clean, "fc").bias
            bias[0] = torch.nextafter(bias[0], torch.tensor(math.inf))

    monkeypatch.setattr(resadapt.proof.compare, "load_file_content", careless)
    with pytest.raises(
        resadapt.VerificationError, match=r"tensors +failed +differ: 'head\.fc\.bias'"
    ):
        resadapt.save_adapters(model, path)
    assert not list(path.parent.iterdir())


def test_verifying_another_models_file(model: nn.Module, path: Path) -> None:
    resadapt.save_adapters(model, path)
    assert resadapt.verify_adapters(model, path, metric=lambda m: m(X).sum()).ok
    with torch.no_grad():
        private(model, "fc").bias.add_(1)
    report = resadapt.verify_adapters(model, path, metric=lambda m: m(X).sum())
    assert not report.ok
    assert (
        outcomes(report)["tensors"],
        outcomes(report)["outputs"],
        outcomes(report)["metric"],
    ) == ("failed",) * 3
    assert outcomes(report)["recorded outputs"] == "passed"
    for name in ("default", "other"):
        other = resadapt.inject_adapters(net(), "conv", 2, name=name)
        report = resadapt.verify_adapters(other, path)
        assert not report.ok
        assert (
            f"set '{name}' differs from the file's set in 'sites', 'head'"
            in report["tensors"].detail
        )


def test_verifying_under_another_name(model: nn.Module, path: Path) -> None:
    resadapt.save_adapters(model, path)
    renamed = resadapt.load_adapters(net(), path, name="renamed")
    assert outcomes(resadapt.verify_adapters(renamed, path))["tensors"] == "passed"


def test_a_model_that_cannot_be_copied(path: Path) -> None:
    model = resadapt.inject_adapters(net(), "bn", 2)
    model.cache = torch.zeros(1, requires_grad=True) * 2  # deepcopy takes leaves only
    with pytest.raises(
        resadapt.VerificationError,
        match=r"reconstruction +failed .*cannot be copied.*: pass rebuild=",
    ) as caught:
        resadapt.save_adapters(model, path)
    assert outcomes(caught.value.report) == {
        **dict.fromkeys(LINES, "not checked"),
        "reconstruction": "failed",
    }
    assert not list(path.parent.iterdir())
    assert not resadapt.save_adapters(model, path, verify=False).ok
    assert resadapt.save_adapters(model, path, rebuild=net).ok


def test_a_reloaded_model_that_fails_alone_is_a_failure(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = resadapt.inject_adapters(small_net(), "c2", 2)
    load = resadapt.proof.compare.load_file_content

    def broken(clean: Any, *args: Any) -> None:
        load(clean, *args)
        clean.bn.eps = float("nan")

    monkeypatch.setattr(resadapt.proof.compare, "load_file_content", broken)
    with pytest.raises(
        resadapt.VerificationError,
        match=r"outputs +failed +reloaded model: the outputs .* contain NaN",
    ):
        resadapt.save_adapters(model, path)


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
        with pytest.raises(
            resadapt.AdapterKeyError,
            match=r"adapters of set 'default' .* 'adapters\.bn\.up\.weight'.*permanent",
        ):
            call()
    assert not list(path.parent.iterdir())
    if prune == "prune":
        torch.nn.utils.prune.remove(up, "weight")
    else:
        torch.nn.utils.parametrize.remove_parametrizations(up, "weight")
    assert resadapt.save_adapters(model, path, rebuild=net).ok


def test_tensors_that_were_added_to_an_adapter(path: Path) -> None:
    """As tools do that count operations."""
    model = resadapt.inject_adapters(net(), "bn", 4, head="fc", norm="affine")
    adapter = model.bn.resadapt.default
    for module in (adapter, adapter.up):
        module.register_buffer("total_ops", torch.zeros(1))
    for call in (
        lambda: resadapt.save_adapters(model, path),
        lambda: resadapt.adapter_state_dict(model),
    ):
        with pytest.raises(
            resadapt.AdapterKeyError,
            match=r"Tensors were added to the adapters of set 'default' after the injection: "
            r"'adapters\.bn\.total_ops', 'adapters\.bn\.up\.total_ops'\. An adapter file cannot",
        ):
            call()
    for module in (adapter, adapter.up):
        del module.total_ops
    private(model, "bn").register_buffer("total_ops", torch.zeros(1))
    with pytest.raises(
        resadapt.AdapterKeyError,
        match=r"'norms\.bn\.total_ops' is unexpected.*If a tool added them to a module",
    ):
        resadapt.save_adapters(model, path)
    del private(model, "bn").total_ops
    assert not list(path.parent.iterdir())
    assert resadapt.save_adapters(model, path, rebuild=net).ok


def test_a_head_of_another_form_draws_nothing(path: Path) -> None:
    model = resadapt.inject_adapters(net(), "conv", 2, head={"fc": nn.Linear(4, 7)})
    state = torch.get_rng_state()
    resadapt.save_adapters(model, path)
    assert torch.equal(torch.get_rng_state(), state)
