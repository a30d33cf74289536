"""The committed results.

Tables say what the figures beside them say, verdicts follow from them, and every part was made.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import ablation
import diagnosis
import families
import mystery
import pytest
import run_pipeline
import study
from av1partition.data.blocks import DATA_DIR
from av1partition.evaluation.comparison import choose, decide, table
from av1partition.training.variants import VARIANTS

RESULTS = Path(study.__file__).parent / "results"
PIPELINES = ("pipeline_val", "pipeline_robust_val", "pipeline_test")


def read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def test_tables_are_those_of_the_figures() -> None:
    tables = {
        "ablation/ablation": table(read("ablation/ablation.json")),
        "diagnosis/diagnosis": diagnosis.table(read("diagnosis/diagnosis.json")["rows"]),
        "families/families": families.table(read("families/families.json")),
        "mystery/mystery": mystery.table(read("mystery/mystery.json")["cases"]),
        **{
            f"{name}/pipeline": run_pipeline.table(read(f"{name}/pipeline.json"))
            for name in PIPELINES
        },
    }
    for name, expected in tables.items():
        assert (RESULTS / f"{name}.md").read_text() == expected + "\n"


def test_verdicts_follow_from_the_figures() -> None:
    result = read("ablation/ablation.json")
    chosen = {group: choose(result["validation"], group) for group in ("study", "beyond")}
    differences, verdicts = decide(result["test"], chosen)
    assert (differences, verdicts) == (result["differences"], result["verdicts"])
    for name in (*chosen.values(), "frozen", "trees-q"):
        assert len(result["test"][name]["macro_f1"]["values"]) == len(ablation.FINAL_SEEDS)


def test_every_variant_and_every_part_was_made_with_the_flags_of_now() -> None:
    validation = read("ablation/ablation.json")["validation"]
    assert {name: each["flags"] for name, each in validation.items()} == {
        each.name: each.flags for each in VARIANTS
    }
    found = read("families/families.json")
    assert {name: each["flags"] for name, each in found["some"].items()} == {
        each.name: each.flags for each in families.methods()
    }
    assert set(found["all"]) == set(families.finalists(found["some"]))
    for each in (*found["some"].values(), *found["all"].values()):
        assert set(each["rates"]) in ({*families.RATES}, {each["rate"]})
        assert each["val"]["values"][0] == max(each["rates"].values()), (
            "the rate is the best of the first seed"
        )
        assert len(each["val"]["values"]) == len(each["test"]["values"]) == len(families.SEEDS)
    made = read("study.json")
    assert list(made["commands"]) == [step.name for step in study.steps()]
    assert set(made["commands"]) == set(made["seconds"])
    for step in study.steps():
        assert step.arguments.format(runs="runs/study", jobs=2) in made["commands"][step.name]
        assert list((RESULTS / step.name).iterdir())
    assert (RESULTS / "report.html").exists()


def test_every_kept_epoch_gave_itself_back() -> None:
    kept = [
        record
        for path in RESULTS.glob("*/history.json")
        for record in read(str(path))
        if "proof" in record
    ]
    assert len(kept) > 5
    for record in kept:
        assert record["proof"]["macro_f1_difference"] == 0
        assert (
            record["proof"]["checks"]["tensors"] == record["proof"]["checks"]["outputs"] == "passed"
        )


@pytest.mark.parametrize("name", PIPELINES)
def test_every_block_ends_somewhere(name: str) -> None:
    result = read(f"{name}/pipeline.json")
    assert sum(each["blocks"] for each in result["flow"]) == result["blocks"]
    right = sum(each["blocks"] for each in result["flow"] if each["end"] == "right")
    assert right / result["blocks"] == pytest.approx(result["final"]["accuracy"])


def test_the_kinds_of_other_encoders_are_those_of_the_finding() -> None:
    script = (DATA_DIR.parents[2] / "findings" / "partition_kinds.sh").read_text()
    _, *found = (line.split() for line in re.findall(r"^#   (\S.*)$", script, re.MULTILINE))
    readme = (DATA_DIR / "README.md").read_text()
    rows = [
        f"| {name} {version} {speed} | {' | '.join(shares)} |"
        for name, version, speed, _, *shares in found
    ]
    assert len(rows) == 17
    assert "|---|---|---|---|---|---|\n" + "\n".join(rows) + "\n\n" in readme
