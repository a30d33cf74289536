"""The committed tables are those of their figures, and all benchmarks run."""

from __future__ import annotations

import json
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import backbones
import files
import growth
import inference
import pytest
import reuse
import sweep
import torch
import training
import variants
import ways
from measuring import RESULTS, alone
from torch import nn

from resadapt import inject_adapters, set_active_adapters


@pytest.mark.parametrize("module", [files, growth, inference, reuse, sweep, training, variants])
def test_tables_are_those_of_the_figures(module: object) -> None:
    name = Path(str(module.__file__)).stem  # type: ignore[attr-defined]
    result = json.loads((RESULTS / f"{name}.json").read_text())
    assert (RESULTS / f"{name}.md").read_text() == module.table(result)  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _without_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(ways.WAYS, ways.PEFT)  # of the clients extra


def test_a_short_round_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    for way in ("by hand", ways.MEMSAVE):
        monkeypatch.delitem(ways.WAYS, way, raising=False)
    setting = training.Setting("ResNet-18", 2, 3, 32)
    for ways_found in training.measure(setting, 1, peaks=False).values():
        assert list(ways_found) == list(ways.WAYS)
        saved = {way: row["bytes_saved"] for way, row in ways_found.items()}
        assert saved[ways.OPTIMIZED] <= saved["optimized, exact"] < saved[ways.PLAIN]
        assert saved["resadapt, checkpointed"] < saved[ways.PLAIN] < saved[ways.FULL]
        assert all(each["step_s"] > 0 for each in ways_found.values())
    assert alone(training.peak, setting, ways.FULL, "float32") > 2**20


def test_a_short_round_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "ROUNDS", 1)
    assert next(iter(files.measure(tmp_path))) == "torch.save of the whole model"
    monkeypatch.setattr(reuse, "SETS", (1, 2))
    assert list(reuse.sets(2, 32, 1)) == ["1", "2"]
    for steps in reuse.steps(2, 32, 1).values():
        assert all(seconds > 0 for seconds in steps.values())
    assert list(inference.measure(1, 2, 32))[-1] == inference.BOUND
    found = inference.rounding("resnet18", inference.STATISTICS[1], 32)
    assert all(0 < found[precision] < 0.2 for precision in inference.HALF)  # type: ignore[operator]
    assert list(growth.with_depth((18,), 32, 1)) == ["18"]
    by_batch = growth.with_batch((2, 4), 32)
    assert all(by_batch["4"][way] > by_batch["2"][way] for way in by_batch["2"])
    by_sets = growth.with_sets((1, 2), 32, 1)
    assert by_sets["2"]["bytes"] > by_sets["1"]["bytes"]


def test_a_short_round_of_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        variants, "FAMILIES", {name: variants.FAMILIES[name] for name in ("lora, DoRA", "ssf")}
    )
    found = variants.measure(1, 2, 32)
    assert found.pop("full")["step_s"] > 0
    for part, rows in found.items():
        for name, row in rows.items():
            assert row["adapters"] <= 0.0125 * 11_181_642, (part, name)
            assert row["optimized_bytes_saved"] <= row["bytes_saved"], (part, name)


SMALL = "torchvision/resnet18"


def test_a_sweep_over_one_model() -> None:
    row = sweep.in_a_process(SMALL)
    assert list(row["steps"]) == list(sweep.STEPS)
    assert all(isinstance(seconds, float) for seconds in row["steps"].values()), row
    assert (row["example"], row["sites"], row["warnings"]) == ("not needed", 4, [])


def test_a_model_that_cannot_be_built_is_a_row_too() -> None:
    assert sweep.in_a_process("torchvision/none")["error"] == "KeyError: 'torchvision/none'"


def _moves_a_weight(model: Any, *_: object, **__: object) -> Any:
    model.get_submodule("layer1.0.conv1").weight.data.mul_(2)
    return model


def _another(model: Any) -> Any:
    return _moves_a_weight(deepcopy(model))


def _raises(*_: object, **__: object) -> None:
    raise ValueError("an error\n  in | lines")


@pytest.mark.parametrize(
    ("call", "put", "step", "message"),
    [
        ("load_adapters", lambda model, _: model, "reload", "outputs differ by "),
        (
            "inference_copy",
            lambda model: _moves_a_weight(deepcopy(model)),
            "copy",
            "outputs differ by",
        ),
        ("optimize_backbone", _moves_a_weight, "optimize", "outputs differ by "),
        (
            "remove_adapters",
            lambda model: None,
            "remove",
            "not as before, such as flag conv1",
        ),
        ("fold_adapters", _raises, "fold", "ValueError: an error in / lines"),
        ("check_backbone", _raises, "train", "ValueError: an error in / lines"),
    ],
)
def test_a_sweep_tells_what_is_wrong(
    call: str, put: Any, step: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, call, put)
    found = sweep.sweep(SMALL)["steps"][step]
    assert message in found, found


def test_a_sweep_finds_adapters_of_another_dimension() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)
            self.last = nn.Identity()
            self.channels = -1

        def forward(self, x: Any) -> Any:
            return self.last(self.conv(x).movedim(1, self.channels))

    inputs = torch.rand(2, 3, 16, 16)
    for dim, wrong in ((-1, []), (1, ["last gives (2, 16, 16, 8), taken as [N, 8, *, *]"])):
        model = Turned()
        model.channels = dim
        inject_adapters(model, "last", 2, family="bottleneck", example_input=inputs)
        set_active_adapters(model, None)  # an adapter would notice it first
        model.channels = -1
        assert sweep._wrong_channels(model, inputs) == wrong


def test_a_sweep_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (sweep, sys.modules["measuring"]):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    names = list(backbones.CASES)[:3]
    good = {"steps": dict.fromkeys(sweep.STEPS, 1.0), "warnings": [], "example": "not needed"}
    bad = {"steps": {"inject": "Error: no"}, "warnings": ["slow"], "seconds": 2}
    measured: list[str] = []

    def measure(name: str) -> dict[str, Any]:
        measured.append(name)
        if measured == names[:2]:
            raise KeyboardInterrupt
        return bad if name == names[2] else good

    with pytest.raises(KeyboardInterrupt):
        sweep.collect(names, "", measure)
    sweep.collect(names, "", measure)
    assert measured == [names[0], names[1], names[1], names[2]]
    sweep.collect(names, names[0], measure)
    assert measured[4:] == names[:1]
    text = (tmp_path / "sweep.md").read_text()
    assert text.startswith("2 of 3 models pass every step, 2 without `example_input`.")
    assert f"- {names[2]}, inject: Error: no\n- {names[2]}, warning: slow\n" in text
    monkeypatch.setattr(sweep, "versions", lambda: {"torch": "newer"})
    sweep.collect(names[:1], "", measure)
    assert measured[5:] == names[:1]
    assert list(json.loads((tmp_path / "sweep.json").read_text())["rows"]) == names[:1]
