"""The report page: what is on it, that it needs nothing beside it, and that nothing in it runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import report
import report_folders as folders
import torch
from av1partition.data.blocks import DATA_DIR, BlockSet, cut_blocks
from av1partition.data.study_layout import write_study_file
from av1partition.data.tasks import AB, SPECIALISTS, STAGE1
from av1partition.evaluation.html_report import ReportError, write_report
from report_page import Page


def test_training(tmp_path: Path) -> None:
    folders.training(tmp_path)
    page = Page(write_report(tmp_path))
    assert "accuracy" in page.text
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for figure in (
        metrics["macro_f1"],
        metrics["weighted_f1"],
        *(each["recall"] for each in metrics["per_class"].values()),
    ):
        assert f"{figure:.4f}" in page.text
    for said in (
        "2 of 3",
        "125,635",
        "124,096",
        "543.8 kB",
        "On 1,234 blocks",
        "a difference of 0.125",
        "AB",
        "kept: 0.5000",
    ):
        assert said in page.text
    assert len(page.all("svg")) == 3
    assert not page.all("nav")  # one section needs no table of contents


def test_three_outcomes_are_told_apart(tmp_path: Path) -> None:
    folders.training(tmp_path)
    page = Page(write_report(tmp_path))
    classes = [each["class"] for each in page.all("span") if "class" in each]
    assert classes == ["outcome passed", "outcome failed", "outcome not-checked"]
    assert re.search(r"file ✓ passed tensors ✗ failed recorded outputs \? not checked", page.text)


@pytest.mark.parametrize(
    ("trained", "why"),
    [("head", "only adapter files prove themselves"), ("adapters", "history.json has none")],
)
def test_without_proof_nothing_is_said_to_be_checked(
    trained: str, why: str, tmp_path: Path
) -> None:
    folders.training(tmp_path, AB, "head")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    folders.dump(metrics | {"trained": trained}, tmp_path / "metrics.json")
    page = Page(write_report(tmp_path))
    assert f"nothing of it was checked: {why}" in page.text
    assert "passed" not in page.text


def test_stage1(tmp_path: Path) -> None:
    folders.training(tmp_path, STAGE1, trained=None)
    assert "size of the file" not in Page(write_report(tmp_path)).text
    (tmp_path / "stage1.pt").write_bytes(bytes(2_345_678))
    text = Page(write_report(tmp_path)).text
    for said in ("threshold 0.440", "temperature 1.500", "size of the file 2.3 MB", "PARTITION"):
        assert said in text


def test_pipeline(all_blocks: dict[str, BlockSet], tmp_path: Path) -> None:
    folders.pipeline(tmp_path, all_blocks["val"].take(torch.arange(900)), "val")
    page = Page(write_report(tmp_path))
    result = json.loads((tmp_path / "pipeline.json").read_text())
    for task in SPECIALISTS:
        scores = result["specialists"][task.key]
        own, there = scores["on_true_inputs"], scores["on_what_reaches_it"]
        cells = [
            task.title, sum(each["support"] for each in own["per_class"].values()),
            f"{own['accuracy']:.4f}", f"{own['macro_f1']:.4f}",
            there["blocks"], there["strangers"], f"{there['accuracy']:.4f}", f"{there['of_its_own']['macro_f1']:.4f}",
            scores["own_blocks_that_never_arrive"],
        ]  # fmt: skip
        assert " ".join(map(str, cells)) in page.text
    for said in (f"{result['final']['macro_f1']:.4f}", "2,346", "1,234 a second", "HORZ_A"):
        assert said in page.text
    assert "stage2/adapters.pt" in page.text


def test_frames_of_a_pipeline_run(tiny_frames: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    folders.pipeline(folder, cut_blocks(tiny_frames)["val"], "val")
    page = Page(write_report(folder, dataset_dir=tiny_frames))
    true, predicted = page.all("img")
    assert "true partition" in true["alt"]
    assert "predicted partition" in predicted["alt"]
    assert (true["width"], true["height"]) == ("48", "32")
    right = json.loads((folder / "pipeline.json").read_text())["final"]["accuracy"]
    assert f"val-0, base_q_idx 80: 6 blocks, {right:.1%} of them right" in page.text


def test_frames_are_shared_by_the_runs(all_blocks: dict[str, BlockSet], tmp_path: Path) -> None:
    for split in ("val", "test"):
        (tmp_path / split).mkdir()
        folders.pipeline(tmp_path / split, all_blocks[split], split)
    assert [len(Page(write_report(tmp_path, frames=count)).all("img")) for count in (0, 1, 5)] == [
        0,
        4,
        8,
    ]


def test_why_no_frames_are_drawn(
    tiny_frames: Path, all_blocks: dict[str, BlockSet], tmp_path: Path
) -> None:
    folder, study = tmp_path / "run", tmp_path / "study"
    for each in (folder, study):
        each.mkdir()
    blocks = cut_blocks(tiny_frames)
    folders.pipeline(folder, blocks["val"], "val")
    for split in ("train", "val"):
        write_study_file(blocks[split], study / f"{split}.pt")

    def why(dataset: Path, runs: Path | None = None) -> str:
        page = Page(write_report(folder, dataset_dir=dataset, runs_dir=runs))
        found = re.search(r"No frames are drawn: [^.]*", page.text)
        assert len(page.all("img")) == (0 if found else 2)
        return found[0] if found else ""

    assert (
        "the study's layout does not say where"
        in Page(write_report(folder, dataset_dir=study)).text
    )
    assert "the predictions are of other blocks" in why(DATA_DIR)  # more of them
    folders.pipeline(folder, blocks["test"], "val")
    assert "the predictions are of other blocks" in why(tiny_frames)  # as many, with other labels
    folders.pipeline(folder, blocks["val"], "val")
    assert why(tiny_frames) == ""
    (tmp_path / "runs").mkdir()
    (folder / "predictions.npz").rename(tmp_path / "runs" / "predictions.npz")
    assert "there is no predictions" in why(tiny_frames)
    assert why(tiny_frames, tmp_path / "runs") == ""


def test_ablation(tmp_path: Path) -> None:
    folders.ablation(tmp_path)
    page = Page(write_report(tmp_path))
    for said in (
        "125,635",
        "v1",
        "frozen head",
        "more than 1 point",
        "✓ holds",
        "✗ fails",
        "95%",
        "+0.0220",
        "0.5140 0.0032",
    ):
        assert said in page.text
    # One seed has no deviation.
    assert re.search(r"frozen frozen head 125,635 1 0\.4700 - 0\.470", page.text)
    content = json.loads((tmp_path / "ablation.json").read_text())
    # Before the decision on test, and as older files were.
    folders.dump(
        {"validation": content["validation"], "test": {}, "differences": {}},
        tmp_path / "ablation.json",
    )
    page = Page(write_report(tmp_path))
    assert "test blocks" not in page.text
    assert len(page.all("svg")) == 1


def test_diagnosis(tmp_path: Path) -> None:
    row = {
        "seen": "stage1: layer1",
        "numbers": 256,
        "trees": 0.41,
        "network": 0.42,
        "trees-q": 0.43,
        "network-q": 0.44,
    }
    folders.dump(
        {"blocks": {"train": 1300, "val": 200}, "seed": 0, "rows": [row]},
        tmp_path / "diagnosis.json",
    )
    page = Page(write_report(tmp_path))
    assert "stage1: layer1 256 0.4100 0.4200 0.4300 0.4400" in page.text
    assert "1,300 blocks" in page.text


def test_mystery(tmp_path: Path) -> None:
    folders.mystery(tmp_path)
    page = Page(write_report(tmp_path))
    for said in (
        "the norms move",
        "0.4200 0.2000 -0.2200 passes cannot happen",
        "up to 1 pass",
        "Stage 2 on 300 blocks, measured on 200",
    ):
        assert said in page.text
    assert len(page.all("svg")) == 2


def test_a_folder_of_folders(all_blocks: dict[str, BlockSet], tmp_path: Path) -> None:
    folders.results(tmp_path, all_blocks)
    page = Page(write_report(tmp_path))
    links = [each["href"] for each in page.all("a")]
    headings = [each["id"] for each in page.all("h2")]
    assert links == [f"#{name}" for name in headings]
    titles = re.findall(r"<h2[^>]*>([^<]*)", page.source)
    # In the order of the study's commands; pipeline_test is none of them, notes holds nothing.
    assert titles == [
        "Training: stage1_study", "Lost F1: mystery", "Variants: ablation", "Training: stage2", "All stages: pipeline_val",
        "All stages: pipeline_test", "How it was made",
    ]  # fmt: skip
    for said in ("python mystery.py --epochs 1", "1,234", "2.14.1"):
        assert said in page.text


def test_the_same_files_give_the_same_page(all_blocks: dict[str, BlockSet], tmp_path: Path) -> None:
    folders.results(tmp_path, all_blocks)
    first = write_report(tmp_path, frames=1).read_bytes()
    assert write_report(tmp_path, frames=1).read_bytes() == first


@pytest.mark.parametrize(
    "name",
    [
        "<script>alert(1)</script>",
        '"><img src="x" onerror="alert(1)">',
        "$\\nothing{$ & co",
        "{{ 1 / 0 }}",
    ],
)
def test_everything_shown_is_escaped(name: str, tmp_path: Path) -> None:
    folders.ablation(tmp_path / name.replace("/", ""), name, name)
    page = Page(write_report(tmp_path / name.replace("/", "")))
    assert page.text.count(name) >= 6  # in tables and in plots
    assert not page.all("img")


def test_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders.mystery(tmp_path)
    report.main([str(tmp_path)])
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    report.main([str(tmp_path), "--output", str(tmp_path / "other.html")])
    assert (tmp_path / "other.html").read_bytes() == (tmp_path / "report.html").read_bytes()
    with pytest.raises(ReportError, match="is no folder"):
        report.main([str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="2"):
        report.main([str(tmp_path), "--frames", "-1"])
    assert "argument --frames: is -1, expected 0 or more" in capsys.readouterr().err
