"""The committed tables are those of their figures, and all benchmarks run."""

from __future__ import annotations

import json
from pathlib import Path

import files
import growth
import pytest
import reuse
import training
import variants
import ways
from measuring import RESULTS, alone


@pytest.mark.parametrize("module", [files, growth, reuse, training, variants])
def test_tables_are_those_of_the_figures(module: object) -> None:
    name = Path(str(module.__file__)).stem  # type: ignore[attr-defined]
    result = json.loads((RESULTS / f"{name}.json").read_text())
    assert (RESULTS / f"{name}.md").read_text() == module.table(result)  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _without_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(ways.WAYS, ways.PEFT)  # of the clients extra


def test_a_short_round_of_training() -> None:
    setting = training.Setting("ResNet-18", 2, 3, 32)
    found = training.measure(setting, 1, peaks=False)
    assert list(found) == list(ways.WAYS)
    saved = {way: row["bytes_saved"] for way, row in found.items()}
    assert (
        saved[ways.OPTIMIZED]
        <= saved["optimized, exact"]
        < saved["resadapt, checkpointed"]
        < saved[ways.PLAIN]
        < saved[ways.FULL]
    )
    assert all(each["step_s"] > 0 for each in found.values())
    assert alone(training.peak, setting, ways.FULL) > saved[ways.FULL]


def test_a_short_round_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "ROUNDS", 1)
    assert next(iter(files.measure(tmp_path))) == "torch.save of the whole model"
    monkeypatch.setattr(reuse, "SETS", (1, 2))
    assert list(reuse.sets(2, 32, 1)) == ["1", "2"]
    assert all(seconds > 0 for seconds in reuse.steps(2, 32, 1).values())
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
