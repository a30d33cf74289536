"""All stages together.

Against blocks followed one by one, and the analysis against cases made by hand.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import run_pipeline
import torch
from av1partition.data.blocks import BlockSet
from av1partition.data.inputs import with_quantizer
from av1partition.data.study_layout import read_study_file, write_study_file
from av1partition.data.tasks import AB, PARTITIONS, RECT, SPECIALISTS, STAGE2, Task
from av1partition.evaluation.cascade_analysis import FOLDED, analyse, fold
from av1partition.evaluation.html_report import write_report
from av1partition.evaluation.pipeline import Pipeline, Predictions, true_inputs
from av1partition.models.backbones import BackboneKind
from av1partition.models.cascade import Cascade, adapt
from av1partition.models.specialist_files import SpecialistFileError
from av1partition.models.stage1_files import load_stage1, save_stage1
from PIL import Image

from resadapt import BackboneMismatchError, load_adapters, save_adapters, set_active_adapters

Files = dict[Task, list[Path]]
Make = Callable[[BackboneKind], tuple[Path, Files]]


@pytest.fixture(scope="module")
def files(
    tmp_path_factory: pytest.TempPathFactory, stage1_file: Callable[[BackboneKind], Path]
) -> Make:
    """Adapter files of specialists with lively adapters and heads, which answer differently from block to block."""
    folder = tmp_path_factory.mktemp("specialists")

    def make(kind: BackboneKind) -> tuple[Path, Files]:
        stage1, made = stage1_file(kind), {}
        for task in SPECIALISTS:
            made[task] = [
                folder / f"{kind}-{task.key}{seed}.pt" for seed in range(3 if task is AB else 1)
            ]
            for seed, path in enumerate(made[task]):
                if not path.exists():
                    torch.manual_seed(seed)
                    # The fine one has heads that see the quantizer, and a set inside the front, one
                    # without a site there.
                    layers = (
                        {STAGE2: ["layer1.*", "layer3"], RECT: ["layer4"]}.get(task)
                        if kind == "fine"
                        else None
                    )
                    model = adapt(
                        Cascade(load_stage1(stage1)),
                        task,
                        layers=layers,
                        quantizer=kind == "fine" and task is not RECT,
                    )
                    with torch.no_grad():
                        for name, parameter in model.named_parameters():
                            if parameter.requires_grad:
                                parameter.copy_(
                                    torch.randn_like(parameter)
                                    * (1.0 if "specialists" in name else 0.1)
                                )
                        # Every answer should be somebody's.
                        *_, weight, bias = (
                            p for p in model.specialists[task.key].parameters() if p.requires_grad
                        )
                        logits = model.eval()(samples(200))[task.key]
                        weight /= logits.std(dim=0)[:, None]
                        bias.copy_((bias - logits.mean(dim=0)) / logits.std(dim=0))
                    save_adapters(model, path, verify=False)
        return stage1, made

    return make


def pipeline(made: tuple[Path, Files]) -> Pipeline:
    return Pipeline(*made, torch.device("cpu"))


def samples(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    luma = torch.rand(count, 1, 16, 16, generator=generator) * torch.rand(
        count, 1, 1, 1, generator=generator
    )
    return with_quantizer(luma, torch.randint(0, 256, (count,), generator=generator))


def median_threshold(whole: Pipeline, x: torch.Tensor) -> float:
    """Between the two middle probabilities, so that no block's rounding decides."""
    ordered = whole.run(x, 0.5).partition.sort().values
    return float(ordered[len(x) // 2 - 1 : len(x) // 2 + 1].mean())


@pytest.mark.parametrize("kind", ["plain", "attention", "fine"])
def test_one_pass_equals_stage_by_stage_bit_for_bit(kind: BackboneKind, files: Make) -> None:
    whole, x = pipeline(files(kind)), samples(1500)
    threshold = median_threshold(whole, x)
    ours, theirs = (whole.run(x, threshold, one_pass=one_pass) for one_pass in (True, False))
    assert torch.equal(ours.partition, theirs.partition)
    assert torch.equal(ours.kinds, theirs.kinds)
    for task in SPECIALISTS:
        assert torch.equal(ours.reached[task.key], theirs.reached[task.key])
        assert torch.equal(
            ours.specialists[task.key].nan_to_num(9), theirs.specialists[task.key].nan_to_num(9)
        )
        assert 10 < ours.reached[task.key].sum() < 1400, "the blocks go different ways"
    assert len(set(ours.kinds.tolist())) >= 5


def test_against_blocks_followed_one_by_one(files: Make) -> None:
    made = files("plain")
    whole, x = pipeline(made), samples(60)
    threshold = median_threshold(whole, x)
    got = whole.run(x, threshold)
    model = Cascade(load_stage1(made[0])).eval()
    for task, paths in made[1].items():
        for number, path in enumerate(paths):
            load_adapters(model, path, name=f"{task.key}-{number}")

    def ask(task: Task, block: torch.Tensor) -> torch.Tensor:
        answers = []
        for number in range(len(made[1][task])):
            set_active_adapters(model, f"{task.key}-{number}")
            answers.append(model(block)[task.key][0].softmax(0))
        return sum(answers[1:], answers[0]) / len(answers)

    with torch.no_grad():
        for i, block in enumerate(x):
            set_active_adapters(model, None)
            p = model(block[None])["stage1"].sigmoid().item()
            assert got.partition[i] == pytest.approx(p, abs=1e-6)
            if p < threshold:
                assert PARTITIONS[got.kinds[i]] == "NONE"
                continue
            split = ask(STAGE2, block[None])
            torch.testing.assert_close(got.specialists["stage2"][i], split)
            kind = STAGE2.classes[split.argmax()]
            if kind != "SPLIT":
                task = RECT if kind == "RECT" else AB
                which = ask(task, block[None])
                torch.testing.assert_close(got.specialists[task.key][i], which)
                kind = task.classes[which.argmax()]
            assert PARTITIONS[got.kinds[i]] == kind


def test_the_files_threshold_and_ones_own(files: Make, tmp_path: Path) -> None:
    stage1, made = files("plain")
    model = load_stage1(stage1)
    model.threshold = 1e-6
    save_stage1(model, tmp_path / "stage1.pt")
    whole = pipeline((tmp_path / "stage1.pt", made))
    assert whole.run(samples(40)).reached["stage2"].all()
    nobody = whole.run(samples(40), 0.999999)
    assert not nobody.reached["stage2"].any()
    assert not nobody.kinds.any()
    assert nobody.specialists["ab"].isnan().all()


def test_files_of_another_stage_are_refused_by_name(files: Make, tmp_path: Path) -> None:
    stage1, made = files("plain")
    for task, other in ((STAGE2, RECT), (RECT, AB), (AB, STAGE2)):
        with pytest.raises(
            SpecialistFileError,
            match=rf"head specialists\.{other.key}\.linear, expected that of {task.title}; pass",
        ):
            pipeline((stage1, {**made, task: made[other]}))
    done = subprocess.run(
        [sys.executable, run_pipeline.__file__, "--stage1-model", stage1, "--stage2-model", made[RECT][0], "--stage3-rect-model",
         made[STAGE2][0], "--stage3-ab-models", *made[AB], "--output-dir", tmp_path / "out"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("SpecialistFileError: "), "said in a line, without a traceback"
    assert not (tmp_path / "out").exists()


def test_specialists_of_another_stage1_are_refused(files: Make, tmp_path: Path) -> None:
    stage1, made = files("plain")
    model = load_stage1(stage1)
    with torch.no_grad():
        model.head.head[3].bias.add_(1)
    save_stage1(model, tmp_path / "stage1.pt")
    with pytest.raises(BackboneMismatchError, match=r"stage1\.head\.head\.3\.bias"):
        pipeline((tmp_path / "stage1.pt", made))


def by_hand() -> tuple[BlockSet, Predictions]:
    """Seven blocks: right, lost by each stage, a stranger at AB."""
    truth = ["NONE", "NONE", "SPLIT", "HORZ_4", "VERT", "HORZ_A", "VERT_4"]
    kinds = ["NONE", "SPLIT", "NONE", "HORZ", "HORZ", "HORZ_A", "HORZ_A"]
    blocks = BlockSet(
        torch.zeros(7, 1, 16, 16),
        torch.tensor([PARTITIONS.index(name) for name in truth]),
        torch.full((7,), 80),
    )
    nan = torch.nan
    stage2 = [[nan] * 3, [1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]]
    rect = [[nan] * 2] * 3 + [[1, 0], [1, 0], [nan] * 2, [1, 0]]
    ab = [[nan] * 4] * 5 + [[1, 0, 0, 0], [1, 0, 0, 0]]
    return blocks, Predictions(
        torch.tensor([0.1, 0.9, 0.2, 0.9, 0.9, 0.9, 0.9]),
        {"stage2": torch.tensor(stage2), "rect": torch.tensor(rect), "ab": torch.tensor(ab)},
        {
            "stage2": torch.tensor([0, 1, 0, 1, 1, 1, 1]).bool(),
            "rect": torch.tensor([0, 0, 0, 1, 1, 0, 0]).bool(),
            "ab": torch.tensor([0, 0, 0, 0, 0, 1, 1]).bool(),
        },
        torch.tensor([PARTITIONS.index(name) for name in kinds]),
    )


def test_analysis_by_hand() -> None:
    result = analyse(*by_hand())
    json.dumps(result, allow_nan=False)
    assert result["final"]["accuracy"] == pytest.approx(3 / 7), "NONE, HORZ_4 as HORZ, HORZ_A"
    assert result["final"]["classes"] == list(FOLDED)
    assert result["stage1"]["confusion_matrix"] == [[1, 1], [1, 4]]
    stage2 = result["specialists"]["stage2"]
    assert stage2["on_true_inputs"]["accuracy"] == pytest.approx(4 / 5), "VERT_4 was sent to AB"
    assert stage2["on_what_reaches_it"]["blocks"] == 5
    assert stage2["on_what_reaches_it"]["strangers"] == 1
    assert stage2["on_what_reaches_it"]["accuracy"] == pytest.approx(3 / 5)
    assert stage2["own_blocks_that_never_arrive"] == 1
    rect = result["specialists"]["rect"]
    assert rect["on_true_inputs"]["accuracy"] == pytest.approx(1 / 3)
    assert rect["on_what_reaches_it"]["of_its_own"]["accuracy"] == pytest.approx(1 / 2)
    assert rect["own_blocks_that_never_arrive"] == 1
    assert result["specialists"]["ab"]["on_what_reaches_it"]["strangers"] == 1
    ends = {
        (each["kind"], each["end"]): each["blocks"] for each in result["flow"] if each["blocks"]
    }
    assert ends == {
        ("NONE", "right"): 1,
        ("NONE", "lost by Stage 1"): 1,
        ("SPLIT", "lost by Stage 1"): 1,
        ("HORZ", "right"): 1,
        ("VERT", "lost by Stage 3"): 1,
        ("HORZ_A", "right"): 1,
        ("VERT", "lost by Stage 2"): 1,
    }


def test_folding() -> None:
    assert [FOLDED[k] for k in fold(torch.arange(10))] == [*PARTITIONS[:8], "HORZ", "VERT"]


@pytest.fixture
def flags(files: Make, tiny_dataset: Path, tmp_path: Path) -> list[str]:
    stage1, made = files("plain")
    models = [
        "--stage1-model",
        stage1,
        "--stage2-model",
        *made[STAGE2],
        "--stage3-rect-model",
        *made[RECT],
    ]
    where = [
        "--stage3-ab-models",
        *made[AB],
        "--dataset-dir",
        tiny_dataset,
        "--output-dir",
        tmp_path / "out",
        "--device",
        "cpu",
    ]
    return [str(value) for value in (*models, *where)]


def test_the_script(
    flags: list[str], tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_pipeline.main([*flags, "--stage1-threshold", "0.4"])
    output = tmp_path / "out"
    assert {path.name for path in output.iterdir()} == {
        "predictions.npz",
        "pipeline.json",
        "pipeline.md",
        "confusion_matrix.png",
        "flow.png",
    }
    result: dict[str, Any] = json.loads((output / "pipeline.json").read_text())
    blocks = read_study_file(tiny_dataset / "val.pt")
    with np.load(output / "predictions.npz") as arrays:
        assert arrays["index"].tolist() == list(range(200))
        assert arrays["true_kind"].tolist() == blocks.labels_stage0.tolist()
        folded = fold(blocks.labels_stage0).numpy()
        assert result["final"]["accuracy"] == pytest.approx((arrays["final_kind"] == folded).mean())
        assert (arrays["reaches_stage2"] == (arrays["stage1_probability"] >= 0.4)).all()
        for task in SPECIALISTS:
            asked = true_inputs(blocks)[task.key].numpy() | arrays[f"reaches_{task.key}"]
            assert (~np.isnan(arrays[f"{task.key}_probabilities"]).any(1) == asked).all()
            np.testing.assert_allclose(
                arrays[f"{task.key}_probabilities"][asked].sum(1), 1, rtol=1e-5
            )
    assert (result["threshold"], result["split"], result["blocks"]) == (0.4, "val", 200)
    assert len(result["files"]) == 6
    assert not any(Path(name).is_absolute() or ".." in name for name in result["files"]), (
        "where they lie is nobody's business"
    )
    assert min(result["blocks_a_second"].values()) > 0
    assert sum(each["blocks"] for each in result["flow"]) == 200
    for picture in ("confusion_matrix.png", "flow.png"):
        with Image.open(output / picture) as image:
            assert min(image.size) >= 400
    assert "stage by stage" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--stage1-threshold", "1.2"], "expected a probability"), (["--stage1-threshold", "nan"], "expected a probability"),
     (["--split", "all"], "invalid choice")],
)  # fmt: skip
def test_bad_flags_are_answered_first(
    more: list[str], message: str, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_pipeline.main([*flags, *more])
    assert message in capsys.readouterr().err


def test_data_without_blocks_of_a_specialist(
    flags: list[str], all_blocks: dict[str, BlockSet], tmp_path: Path
) -> None:
    whole = all_blocks["val"].take((all_blocks["val"].labels_stage0 == 0).nonzero().flatten()[:40])
    for split in ("train", "val"):
        write_study_file(whole, tmp_path / f"{split}.pt")
    run_pipeline.main(
        [
            *flags,
            "--dataset-dir",
            str(tmp_path),
            "--output-dir",
            str(tmp_path / "out"),
            "--device",
            "cpu",
        ]
    )
    assert "| Stage 3 AB | none |" in (tmp_path / "out" / "pipeline.md").read_text()
    page = write_report(tmp_path / "out", dataset_dir=tmp_path)
    assert "Stage 3 AB" in page.read_text()
