"""Outputs on a probe: the user's or a generated one, recorded in the file and compared."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from support import SmallNet, small_net, small_resnet
from torch import Tensor, nn
from verifying import X, net, outcomes

import resadapt
from resadapt.base.inputs import describe, generate, guesses
from resadapt.base.undisturbed import outputs_of
from resadapt.proof.probe import Probe, ProbeRun, compare_with_record, record_probe


def test_a_failing_probe_leaves_a_graph_that_waits_for_its_backward_pass(path: Path) -> None:
    model = resadapt.inject_adapters(net(), "conv", 2, init="normal", head="fc").train()
    loss = model(X).square().sum()
    with pytest.raises(resadapt.AdapterError, match="cannot be called"):
        resadapt.save_adapters(model, path, probe=torch.zeros(1, 7))
    loss.backward()


def test_probes_of_ones_own(model: nn.Module, path: Path) -> None:
    assert outcomes(resadapt.save_adapters(model, path, probe=X))["outputs"] == "passed"
    assert "another input" in resadapt.verify_adapters(model, path)["recorded outputs"].detail
    assert outcomes(resadapt.verify_adapters(model, path, probe=X))["recorded outputs"] == "passed"
    assert outcomes(resadapt.verify_adapters(model, path, probe={"x": X}))["outputs"] == "passed"
    report = resadapt.save_adapters(model, path, probe=X * float("nan"))
    assert "contain NaN" in report["outputs"].detail
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
    assert "outputs differ in each run" in report["outputs"].detail


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
        assert not compare_with_record(
            kept, stored, {key: wrong(value) for key, value in outputs.items()}
        )[1]
    kept, stored = record({"a": torch.ones(2), "b": torch.ones(2)})
    for a, b in ((1.5, 1.25), (1.25, 1.5)):
        assert compare_with_record(
            kept, stored, {"a": torch.full((2,), a), "b": torch.full((2,), b)}
        ) == (0.5, False), "the largest"
    assert math.isnan(
        compare_with_record(kept, stored, {"a": torch.full((2,), math.nan), "b": torch.ones(2)})[0]
    )
    kept, stored = record({"output": torch.arange(10_000.0)})
    assert stored["probe.output"].tolist() == list(range(0, 10_000, 3))


def test_recorded_outputs_of_other_kinds_than_floats() -> None:
    for one, other in (
        (torch.tensor([1 + 0j]), torch.tensor([1 + 1000j])),
        (torch.tensor([2**60]), torch.tensor([2**60 + 7])),
        (
            torch.tensor([1j], dtype=torch.complex128).conj(),
            torch.tensor([1j], dtype=torch.complex128),
        ),
    ):
        kept, stored = record({"output": one})
        assert compare_with_record(kept, stored, {"output": one})[1]
        resolved = {"probe.output": one.resolve_conj()}
        assert compare_with_record(kept, resolved, {"output": one})[1]
        assert not compare_with_record(kept, stored, {"output": other})[1]
    kept, stored = record({"output": torch.ones(3)})
    assert not compare_with_record(
        kept, {"probe.output": torch.ones(0)}, {"output": torch.ones(3)}
    )[1]


def test_generated_probes_are_the_same_everywhere() -> None:
    values = generate({"shape": [2, 3], "dtype": "float64"})
    expected = [(i * 2654435761 % 2**32 // 2**16) / 2**15 - 1 for i in range(1, 7)]
    assert values.tolist() == [expected[:3], expected[3:]]
    long = generate({"shape": [2**20 + 5], "dtype": "float64"})
    assert long[-1] == ((2**20 + 5) * 2654435761 % 2**32 // 2**16) / 2**15 - 1, "made in pieces"
    form = describe([X, (X.double(), X[0])])
    made = generate(form)
    assert describe(made) == form
    assert (
        describe({"x": X})
        is describe(torch.zeros(2, dtype=torch.int64))
        is describe(["text"])
        is describe(None)
        is None
    )
    assert describe(torch.zeros(1).expand(2**26 + 1)) is None, "larger than what would be made"
    assert guesses(small_resnet().double().modules())[0] == {
        "shape": [2, 3, 64, 64],
        "dtype": "float64",
    }
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
def test_forms_from_a_file_are_checked_as_a_whole_before_memory_is_taken(
    form: Any, message: str
) -> None:
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
    model = resadapt.inject_adapters(
        Two(), "one", 2, example_input=(torch.zeros(3, 2, 2), torch.zeros(1))
    )
    assert outcomes(resadapt.save_adapters(model, path))["outputs"] == "passed"
    probe = resadapt.read_adapter_info(path).probe
    assert probe is not None
    assert list(probe.outputs) == ["output.both.0"]
    torch.manual_seed(0)
    assert outcomes(resadapt.verify_adapters(Two(), path))["recorded outputs"] == "passed"
    torch.manual_seed(0)
    loaded = resadapt.load_adapters(Two(), path)
    assert outcomes(resadapt.save_adapters(loaded, path))["outputs"] == "passed", (
        "a loaded set has its example too"
    )


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
        (
            lambda y: torch.quantize_per_tensor(y, 0.1, 0, torch.qint8),
            ["output.part0", "output.part1"],
        ),
        (
            lambda y: {"a": [y, (y > 0, y.long())], "b": "text"},
            ["output.a.0", "output.a.1.0", "output.a.1.1"],
        ),
        (lambda y: Output(y, Output(y.half())), ["output.logits", "output.extra.logits"]),
        (lambda y: y.to(torch.float8_e4m3fn), ["output"]),
    ],
)
def test_outputs_of_every_kind_are_compared(
    what: Any, places: list[str], suffix: str, tmp_path: Path
) -> None:
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
    assert not resadapt.verify_adapters(returns(what), path, probe=X).ok, (
        "a plain backbone has only the outputs"
    )
