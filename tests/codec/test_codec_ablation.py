"""The table of variants: trees, intervals, and real short runs of the whole comparison."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import ablation
import families
import pytest
import torch
from av1partition.data.blocks import BlockSet, DatasetError
from av1partition.data.inputs import with_quantizer
from av1partition.data.study_layout import read_study_file, write_study_file
from av1partition.data.tasks import STAGE2
from av1partition.evaluation.comparison import choose, decide, summary, table
from av1partition.evaluation.spread import over_seeds, paired_difference
from av1partition.models.backbones import BackboneKind
from av1partition.training.state import TrainingStateError
from av1partition.training.trees import block_numbers, fit_trees, tree_probabilities
from av1partition.training.variants import VARIANTS, Variant
from scipy import stats

import resadapt


def test_block_numbers_by_hand() -> None:
    torch.manual_seed(0)
    inputs = with_quantizer(torch.rand(3, 1, 16, 16), torch.tensor([7, 80, 255]))
    numbers = block_numbers(inputs, quantizer=True)
    assert numbers.shape == (3, 23)
    for block, found in zip(inputs[:, 0].tolist(), numbers, strict=True):
        expected = []
        for top, left, size in ((0, 0, 16), (0, 0, 8), (0, 8, 8), (8, 0, 8), (8, 8, 8)):
            part = [row[left : left + size] for row in block[top : top + size]]
            flat = [value for row in part for value in row]
            mean = sum(flat) / len(flat)
            expected += [mean, (sum((value - mean) ** 2 for value in flat) / len(flat)) ** 0.5]
            down = [abs(part[i + 1][j] - part[i][j]) for i in range(size - 1) for j in range(size)]
            across = [
                abs(part[i][j + 1] - part[i][j]) for i in range(size) for j in range(size - 1)
            ]
            expected += [sum(down) / len(down), sum(across) / len(across)]
        expected += [sum(abs(block[8][j] - block[7][j]) for j in range(16)) / 16]
        expected += [sum(abs(block[i][8] - block[i][7]) for i in range(16)) / 16]
        assert found[:22] == pytest.approx(expected, abs=1e-6)
    assert numbers[:, 22].tolist() == [7, 80, 255]
    assert (block_numbers(inputs, quantizer=False) == numbers[:, :22]).all()


def test_trees_are_the_same_for_the_same_seed(all_blocks: dict[str, BlockSet]) -> None:
    data = all_blocks["val"].take(torch.arange(4000)).data(STAGE2)
    several = [
        tree_probabilities(
            fit_trees(data, quantizer=True, seed=seed), data.tensors[0][:50], quantizer=True
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(several[0], several[1])
    torch.testing.assert_close(several[0].sum(dim=1), torch.ones(50))


def test_seeds_of_trees_differ_with_few_blocks_too(all_blocks: dict[str, BlockSet]) -> None:
    few = all_blocks["train"].of(STAGE2)
    few = few.take(torch.randperm(len(few), generator=torch.Generator().manual_seed(0))[:400])
    one, two = (
        tree_probabilities(
            fit_trees(few.data(STAGE2), quantizer=True, seed=s), few.inputs(), quantizer=True
        )
        for s in (0, 1)
    )
    assert not torch.equal(one, two)


def test_paired_difference_against_scipy() -> None:
    ours, theirs = [0.52, 0.55, 0.54, 0.50, 0.57], [0.50, 0.51, 0.52, 0.51, 0.50]
    found = paired_difference(ours, theirs)
    interval = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high))
    assert over_seeds(ours)["deviation"] == pytest.approx(stats.tstd(ours))
    assert over_seeds([0.5]) == {"mean": 0.5, "deviation": 0.0, "values": [0.5]}
    with pytest.raises(ValueError, match="1 and 1 values, expected the same number, at least two"):
        paired_difference([1.0], [1.0])


def test_one_quantizer(all_blocks: dict[str, BlockSet]) -> None:
    val = all_blocks["val"]
    assert set(val.coded_at(128).qps.tolist()) == {128}
    assert val.coded_at(None) is val
    with pytest.raises(
        DatasetError, match=r"no block was coded at base_q_idx 90; there are \[80, 128, 172, 220\]"
    ):
        val.coded_at(90)


def test_variants_have_names_of_their_own_and_valid_flags() -> None:
    assert len({variant.name for variant in VARIANTS}) == len(VARIANTS)
    for variant in VARIANTS:
        if not variant.trees:
            ablation.train_stage2.parse_options(["--stage1-model", "none", *variant.arguments])


SHORT = (
    Variant("frozen", "frozen head", "study", "stage1_study", "--epochs 2 --lr-head 1e-2"),
    Variant("v1", "adapters", "study", "stage1_study", "--epochs 1 --use-adapters"),
    Variant("per-q", "a set for each quantizer", "quantizer", "stage1_study",
            "--epochs 1 --use-adapters --adapter-layers layer4", quantizers=(80, 220)),
    Variant("trees-q", "trees", "floor", "", "--quantizer", trees=True),
    Variant("kinds-v1", "the fine backbone", "beyond", "stage1_kinds", "--epochs 1 --use-adapters --quantizer"),
)  # fmt: skip


@pytest.fixture(scope="module")
def study(
    tmp_path_factory: pytest.TempPathFactory,
    all_blocks: dict[str, BlockSet],
    stage1_file: Callable[[BackboneKind], Path],
) -> Path:
    """A folder with a small data set of two quantizers, and with Stage 1 runs."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "dataset").mkdir()
    for split, blocks in all_blocks.items():
        two = blocks.take((blocks.qps == 80) | (blocks.qps == 220))
        write_study_file(
            two.take(torch.randperm(len(two), generator=torch.Generator().manual_seed(0))[:300]),
            folder / "dataset" / f"{split}.pt",
        )
    for name, kind in (("stage1_study", "plain"), ("stage1_kinds", "fine")):
        (folder / name).mkdir()
        (folder / name / "stage1.pt").write_bytes(stage1_file(kind).read_bytes())  # type: ignore[arg-type]
    return folder


def arguments(study: Path, *more: str) -> list[str]:
    return [
        "--runs-dir",
        str(study),
        "--dataset-dir",
        str(study / "dataset"),
        "--device",
        "cpu",
        *more,
    ]


def test_the_whole_comparison(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ablation, "VARIANTS", SHORT)
    monkeypatch.setattr(ablation, "FINAL_SEEDS", (0, 1))
    names = [variant.name for variant in SHORT]
    ablation.main(arguments(study))
    first = json.loads((study / "ablation" / "ablation.json").read_text())
    assert list(first["validation"]) == names
    assert not first["test"], "the test pictures are for the end"
    assert not list((study / "ablation").glob("**/test.json"))
    stamps = {path: path.stat().st_mtime_ns for path in study.glob("ablation/**/metrics.json")}
    ablation.main(arguments(study, "--final"))
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps, (
        "what is finished is not trained again"
    )
    result = json.loads((study / "ablation" / "ablation.json").read_text())
    assert set(result["test"]) == {"frozen", "v1", "trees-q", "kinds-v1"}
    assert all(len(each["macro_f1"]["values"]) == 2 for each in result["test"].values())
    ours, theirs = (result["test"][name]["macro_f1"]["values"] for name in ("v1", "frozen"))
    expected = {"chosen": "v1", "rival": "frozen", **paired_difference(ours, theirs)}
    assert result["differences"]["study"] == expected
    assert result["validation"]["per-q"]["parameters"] == 2 * (2 * 512 * 64 + 64 + 512 + 1539)
    assert [verdict["expected"][:20] for verdict in result["verdicts"]] == [
        "adapters of the stud", "every class of v1 wi", "F1 after the reload ", "beyond the study (ki",
    ]  # fmt: skip
    assert result["verdicts"][2] == {
        "expected": "F1 after the reload within 1%", "found": "the largest difference is 0", "holds": True,
    }  # fmt: skip
    assert "v1 against frozen on the test blocks" in capsys.readouterr().out
    assert (study / "ablation" / "ablation.png").read_bytes().startswith(b"\x89PNG")


def test_families_at_the_best_of_three_rates(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    every = {method.name: method for method in families.methods()}
    assert len(every) == len(list(families.methods()))
    full = list(families.methods(None))
    short = [replace(every[name], flags=every[name].flags.replace("--epochs 20", "--epochs 1").replace("--epochs 4", "--epochs 1"))
             for name in ("frozen", "fine-tuning", "stats", "dora-4")]  # fmt: skip
    monkeypatch.setattr(families, "methods", lambda blocks=1: iter(short))
    monkeypatch.setattr(families, "SEEDS", (0, 1))
    monkeypatch.setattr(families, "FINALISTS", 1)
    families.main(arguments(study))
    found = json.loads((study / "families" / "families.json").read_text())
    result = found["some"]
    assert list(result) == [method.name for method in short]
    best = max(("stats", "dora-4"), key=lambda name: result[name]["val"]["mean"])
    assert set(found["all"]) == {"frozen", "fine-tuning", best}
    for part, rows in (("", result), ("all", found["all"])):
        for name, row in rows.items():
            assert (
                row["rates"][row["rate"]] == max(row["rates"].values()) == row["val"]["values"][0]
            )
            made = json.loads(
                (
                    study / "families" / part / name / row["rate"] / "seed1" / "metrics.json"
                ).read_text()
            )
            assert made["macro_f1"] == row["val"]["values"][1]
            assert made["parameters"]["trainable"] == row["parameters"]
    assert "--blocks" in every["dora-4"].flags
    assert "--blocks" not in next(method.flags for method in full if method.name == "dora-4")
    assert 0.8 < (result["dora-4"]["parameters"] - 1539) / (families.BACKBONE * 4 // 100) <= 1
    assert result["fine-tuning"]["parameters"] == families.BACKBONE + 1539
    table = families.table(found)
    assert table in capsys.readouterr().out
    ratio = result["dora-4"]["test"]["mean"] / result["fine-tuning"]["test"]["mean"]
    line = next(line for line in table.splitlines() if line.startswith("| dora"))
    assert line.endswith(f"| {ratio:.1%} |")
    stamps = {
        path: path.stat().st_mtime_ns
        for path in study.glob("families/**/*.json")
        if path.parent.name != "families"
    }
    families.main(arguments(study))
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps, (
        "what is finished is not done again"
    )


def test_two_processes_train_what_one_does(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "VARIANTS", SHORT[:2])
    for jobs in (1, 2):
        runs = tmp_path / str(jobs)
        runs.mkdir()
        (runs / "stage1_study").symlink_to(study / "stage1_study")
        ablation.main(
            [
                "--runs-dir",
                str(runs),
                *arguments(study, "--seeds", "5", "6", "--jobs", str(jobs))[2:],
            ]
        )
    one, two = (
        json.loads((tmp_path / name / "ablation" / "ablation.json").read_text()) for name in "12"
    )
    assert one == two
    assert len(one["validation"]["v1"]["macro_f1"]["values"]) == 2
    with pytest.raises(SystemExit):
        ablation.parse_options(["--jobs", "0"])


def test_scores_of_other_data_are_refused(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation, "VARIANTS", SHORT[3:4])
    ablation.main(["--runs-dir", str(tmp_path), *arguments(study)[2:]])
    other = tmp_path / "dataset"
    other.mkdir()
    for split in ("train", "val"):
        blocks = read_study_file(study / "dataset" / f"{split}.pt")
        write_study_file(blocks.take(torch.arange(200)), other / f"{split}.pt")
    before = (tmp_path / "ablation" / "ablation.json").read_bytes()
    with pytest.raises(
        TrainingStateError,
        match=r"val\.json: was made with other data; delete .*seed0, or choose another --runs-dir",
    ):
        ablation.main(["--runs-dir", str(tmp_path), "--dataset-dir", str(other), "--seeds", "1"])
    assert (tmp_path / "ablation" / "ablation.json").read_bytes() == before
    assert not (tmp_path / "ablation" / "trees-q" / "seed1").exists()


def test_an_error_does_not_wait_for_all_that_is_left(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []

    def work(job: ablation.Job, split: str) -> None:
        if job.seed == 0:
            raise DatasetError("no")
        time.sleep(0.1)
        done.append(job.seed)

    monkeypatch.setattr(ablation, "work", work)
    monkeypatch.setattr(
        ablation, "ProcessPoolExecutor", lambda jobs, *_, **__: ThreadPoolExecutor(jobs)
    )
    where = ["--runs-dir", str(tmp_path), *arguments(study)[2:]]
    with pytest.raises(DatasetError, match="no"):
        ablation.main([*where, "--jobs", "2", "--only", "trees", "--seeds", *map(str, range(30))])
    assert len(done) < 10


def test_no_worker_outlives_its_parent() -> None:
    script = (
        "import ablation, time; from concurrent.futures import ProcessPoolExecutor; from "
        "multiprocessing import get_context\npool = ProcessPoolExecutor(1, get_context('spawn'), "
        "initializer=ablation._start_worker)\npool.submit(time.sleep, 0).result(); "
        "pool.submit(time.sleep, 600); print('works', flush=True); time.sleep(600)"
    )
    folder = str(Path(ablation.__file__).parent)
    path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path},
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"works\n"
        parent.kill()
        # Its end is the end of all who could write: the worker too.
        assert select.select([parent.stdout], [], [], 60)[0]
        assert parent.stdout.read() == b""


def scored(f1: float, per_class: float, reload_difference: float | None) -> dict[str, object]:
    classes = {name: {"f1": per_class} for name in STAGE2.classes}
    return {
        "macro_f1": f1,
        "per_class": classes,
        "parameters": 5,
        "reload_difference": reload_difference,
    }


def test_verdicts_follow_the_figures() -> None:
    def test_of(ours: float, weakest: float, reload: float) -> dict[str, object]:
        networks = {
            name: summary({}, [scored(ours + s, weakest, reload) for s in (0, 0.002)])
            for name in ("v1", "k")
        }
        rivals = {
            name: summary({}, [scored(0.5 + s, 0.5, None) for s in (0, 0.001)])
            for name in ("frozen", "trees-q")
        }
        return networks | rivals

    chosen = {"study": "v1", "beyond": "k"}
    holds = [
        [each["holds"] for each in decide(test_of(*figures), chosen)[1]]
        for figures in ((0.53, 0.5, 0), (0.516, 0.4, 0.02))
    ]
    assert holds == [[True, True, True, True], [True, False, False, False]]
    differences, verdicts = decide(test_of(0.53, 0.5, 0), chosen)
    assert differences["study"] == {
        "chosen": "v1", "rival": "frozen", **paired_difference((0.53, 0.532), (0.5, 0.501)),
    }  # fmt: skip
    assert verdicts[0]["found"].startswith("+3.05 points (95% interval ")
    text = table({"validation": {}, "test": {}, "differences": differences, "verdicts": verdicts})
    assert "k against trees-q on the test blocks: +3.05 points" in text
    assert text.count("| holds |") == 4


def test_the_choice_is_by_the_first_seed_and_of_adapters() -> None:
    def one(group: str, flags: str, f1: float) -> dict[str, object]:
        return {"group": group, "flags": flags, "macro_f1": {"values": [f1, 0.9]}}

    validation = {
        "head": one("study", "", 0.9),
        "a": one("study", "--use-adapters", 0.4),
        "b": one("study", "--use-adapters", 0.5),
        "c": one("beyond", "--use-adapters", 0.6),
    }
    assert choose(validation, "study") == "b"
    assert choose(validation, "beyond") == "c"
    with pytest.raises(SystemExit, match="no adapter variant of the group 'floor' has been scored"):
        choose(validation, "floor")


def test_jobs_go_through_submitit(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setattr(ablation, "VARIANTS", SHORT[:1])
    # A job starts a process of its own, which must find the scripts and this resadapt.
    paths = [Path(ablation.__file__).parent, Path(resadapt.__file__).parents[1]]
    monkeypatch.setenv("PYTHONPATH", ":".join(map(str, paths)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ablation.main(arguments(study, "--engine", "local", "--seeds", "3"))
    assert (study / "ablation" / "frozen" / "seed3" / "metrics.json").exists()
    assert list((study / "jobs").glob("*_result.pkl"))
