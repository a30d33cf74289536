"""What a report refuses.

Damaged, incomplete and contradictory files, by their names; and the page is then as it was.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import report_folders as folders
from av1partition.data.blocks import cut_blocks
from av1partition.evaluation.html_report import ReportError, write_report


def damage(**changes: object) -> Callable[[Path], None]:
    """Changes entries of ``metrics.json``; None takes one out."""

    def change(folder: Path) -> None:
        content = json.loads((folder / "metrics.json").read_text()) | changes
        folders.dump(
            {key: value for key, value in content.items() if value is not None},
            folder / "metrics.json",
        )

    return change


def history(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "history.json").write_text(
        (folder / "history.json").read_text().replace(*text.split(" => "))
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "history.json").unlink(), r"history\.json: is missing, the run is not finished"),
        (lambda folder: (folder / "metrics.json").unlink(), r"metrics\.json: is missing, the run is not finished"),
        (lambda folder: (folder / "metrics.json").write_text('{"accu'), r"metrics\.json: cannot be read as JSON .*training script"),
        (lambda folder: (folder / "metrics.json").write_bytes(b"\xff\xfe"), r"metrics\.json: cannot be read as JSON"),
        (lambda folder: (folder / "metrics.json").write_text("[1]"), r"metrics\.json: is not what it should be"),
        (lambda folder: (folder / "history.json").write_text("[]"), r"history\.json: is not what it should be"),
        (history('"macro_f1": 0.5 => "macro_f1": NaN'), r"history\.json: cannot be read as JSON \(NaN is no number\)"),
        (history('"passed" => "certainly"'), r"history\.json: is not what it should be \(outcome 'certainly', expected one of"),
        (history('"val_loss" => "lost"'), r"history\.json: lacks 'val_loss'; write it again with its training script"),
        (damage(macro_f1=None), r"metrics\.json: lacks 'macro_f1'"),
        (damage(accuracy="high"), r"metrics\.json: is not what it should be"),
        (damage(best_epoch=3), r"metrics\.json: .*it is of epoch 3, but the best of history\.json is 2"),
        (lambda folder: folders.dump({}, folder / "pipeline.json"), r"pipeline\.json: lacks 'final'.*run_pipeline\.py"),
        (lambda folder: folders.dump({}, folder / "ablation.json"), r"ablation\.json: lacks 'validation'"),
        (lambda folder: folders.dump({"blocks": 3}, folder / "mystery.json"), r"mystery\.json: lacks 'cases'"),
        (lambda folder: folders.dump({}, folder / "study.json"), r"study\.json: lacks 'commands'"),
    ],
)  # fmt: skip
def test_what_is_damaged_is_refused_and_the_page_stays(
    change: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    folders.training(tmp_path)
    before = write_report(tmp_path).read_bytes()
    change(tmp_path)
    with pytest.raises(ReportError, match=message):
        write_report(tmp_path)
    assert [path.read_bytes() for path in tmp_path.glob("report*")] == [before]


def test_predictions_must_be_of_the_run(tiny_frames: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    folders.pipeline(folder, cut_blocks(tiny_frames)["val"], "val")
    file = folder / "predictions.npz"
    with np.load(file) as arrays:
        content = dict(arrays)
    wrong = {"final_kind": np.full(6, 7), "true_kind": np.zeros(6, int)}
    np.savez(file, **content | wrong)
    with pytest.raises(
        ReportError,
        match=r"predictions\.npz: 6 blocks with accuracy 0\.0000 and another confusion matrix .*two runs",
    ):
        write_report(folder, dataset_dir=tiny_frames)
    for damaged in (b"", b"PK nothing", file.read_bytes()[:300]):
        file.write_bytes(damaged)
        with pytest.raises(
            ReportError,
            match=r"predictions\.npz: cannot be read as predictions .*run run_pipeline\.py again",
        ):
            write_report(folder, dataset_dir=tiny_frames)
    assert not list(folder.glob("report*"))


def test_nothing_to_show(tmp_path: Path) -> None:
    with pytest.raises(
        ReportError,
        match=r"nothing to show, looked for history\.json with metrics\.json, pipeline\.json, .* in its sub-folders",
    ):
        write_report(tmp_path)
    with pytest.raises(ReportError, match="none: is no folder; pass the folder of a run"):
        write_report(tmp_path / "none")
