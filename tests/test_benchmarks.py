"""The committed tables are those of their figures, and all benchmarks run."""

from __future__ import annotations

import json
from pathlib import Path

import files
import pytest
import reuse
import training


@pytest.mark.parametrize("module", [files, reuse, training])
def test_tables_are_those_of_the_figures(module: object) -> None:
    name = Path(str(module.__file__)).stem  # type: ignore[attr-defined]
    result = json.loads((training.RESULTS / f"{name}.json").read_text())
    assert (training.RESULTS / f"{name}.md").read_text() == module.table(result)  # type: ignore[attr-defined]


def test_a_short_round_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "ROUNDS", 1)
    assert next(iter(files.measure(tmp_path))) == "torch.save of the whole model"
    monkeypatch.setattr(reuse, "SETS", (1, 2))
    assert list(reuse.sets(2, 32, 1)) == ["1", "2"]
    assert all(seconds > 0 for seconds in reuse.steps(2, 32, 1).values())
    monkeypatch.delitem(training.WAYS, "PEFT LoRA r=8")  # of the clients extra
    found = training.measure("resnet18", 2, 32, 1)
    assert list(found) == list(training.WAYS)
    assert found["optimized"]["bytes_saved"] <= found["optimized, exact"]["bytes_saved"] < found["resadapt"]["bytes_saved"]
    assert all(each["step_s"] > 0 for each in found.values())
