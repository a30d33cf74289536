"""The study as a list of commands.

Each can be read by its script, is run once, and leaves its results.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import study
import train_stage1


def test_every_command_can_be_read() -> None:
    names = [step.name for step in study.steps()]
    assert len(set(names)) == len(names)
    for step in study.steps():
        if parse := getattr(sys.modules[step.main.__module__], "parse_options", None):
            parse([part.format(runs="runs with blanks", jobs=2) for part in step.arguments.split()])


def test_steps_run_once_and_leave_their_results(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def steps() -> Iterator[study.Step]:
        flags = f"--dataset-dir {tiny_dataset} --epochs 1 --device cpu --output-dir {{runs}}/first"
        yield study.Step("first", train_stage1.main, flags, "first/metrics.json", "first")

    monkeypatch.setattr(study, "steps", steps)
    where = ["--runs-dir", str(tmp_path / "my runs"), "--results-dir", str(tmp_path / "results")]
    study.main(where)
    kept = {path.name for path in (tmp_path / "results" / "first").iterdir()}
    assert kept == {"metrics.json", "history.json", "learning_curves.png", "confusion_matrix.png"}
    made = json.loads((tmp_path / "results" / "study.json").read_text())
    assert made["commands"]["first"].startswith("python train_stage1.py --dataset-dir")
    assert str(tmp_path) not in made["commands"]["first"].replace(str(tiny_dataset), "")
    assert made["seconds"]["first"] >= 0
    before = (tmp_path / "my runs" / "first" / "metrics.json").stat().st_mtime_ns
    study.main(where)
    assert (tmp_path / "my runs" / "first" / "metrics.json").stat().st_mtime_ns == before
    assert json.loads((tmp_path / "results" / "study.json").read_text()) == made
