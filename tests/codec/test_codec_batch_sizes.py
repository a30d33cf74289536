"""Batches that BatchNorm cannot train on: refused in a line before the training, or left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mystery
import pytest
import torch
import train_stage1
import train_stage2
from av1partition.command_line import run
from av1partition.data.blocks import BlockSet
from av1partition.data.study_layout import write_study_file
from av1partition.data.tasks import STAGE2
from av1partition.models.backbones import BackboneKind
from av1partition.training.loop import BatchSizeError, full_batches
from torch.utils.data import TensorDataset

Make = Callable[[BackboneKind], Path]
REFUSED = (
    r"BatchSizeError: --batch-size is 1, but a BatchNorm in training needs two or more values a "
    r"channel, .*; pass --batch-size 2 or more$"
)
TRAINS_NORMS = {
    "whole network": ["--full-fine-tuning"],
    "from scratch": ["--from-scratch"],
    "own statistics": ["--use-adapters", "--adapter-norm", "affine+stats"],
    "series": ["--use-adapters", "--adapter-family", "series", "--adapter-options",
               "batch_norm=True"],
}  # fmt: skip
TRAINS_NONE = {
    "head": [],
    "frozen norms": ["--use-adapters"],
    "affine": ["--use-adapters", "--adapter-norm", "affine"],
    # Its maps are 4x4: sixteen values a channel.
    "series at large maps": [*TRAINS_NORMS["series"], "--adapter-layers", "layer1"],
}


@pytest.fixture
def few(all_blocks: dict[str, BlockSet], tmp_path: Path) -> Path:
    """Nine divided blocks of each split, three of a class, and nine that are not divided."""
    (tmp_path / "few").mkdir()
    for split in ("train", "val"):
        blocks = all_blocks[split]
        chosen = torch.cat(
            [
                *((blocks.labels(STAGE2) == k).nonzero().flatten()[:3] for k in range(3)),
                (blocks.labels(STAGE2) < 0).nonzero().flatten()[:9],
            ]
        )
        write_study_file(blocks.take(chosen), tmp_path / "few" / f"{split}.pt")
    return tmp_path / "few"


def train(data: Path, *flags: str, stage1: Path | None = None) -> Path:
    output = data.parent / "out"
    where = ["--dataset-dir", str(data), "--output-dir", str(output), "--epochs", "1"]
    where += ["--device", "cpu", *flags]
    if stage1 is None:
        run(lambda: train_stage1.main(where))
    else:
        run(lambda: train_stage2.main([*where, "--stage1-model", str(stage1)]))
    return output


@pytest.mark.parametrize("what", ["stage 1", *TRAINS_NORMS])
def test_batches_of_one_are_refused_before_the_training(
    what: str, few: Path, stage1_file: Make
) -> None:
    stage1 = None if what == "stage 1" else stage1_file("plain")
    with pytest.raises(SystemExit, match=REFUSED) as raised:
        train(few, "--batch-size", "1", *TRAINS_NORMS.get(what, []), stage1=stage1)
    assert "\n" not in str(raised.value)
    assert not any((few.parent / "out").iterdir())


@pytest.mark.parametrize("what", TRAINS_NONE)
def test_batches_of_one_will_do_without_batch_statistics(
    what: str, few: Path, stage1_file: Make
) -> None:
    output = train(few, "--batch-size", "1", *TRAINS_NONE[what], stage1=stage1_file("plain"))
    assert (output / "metrics.json").exists()


@pytest.mark.parametrize("what", TRAINS_NORMS)
def test_a_last_batch_of_one_is_left_out(what: str, few: Path, stage1_file: Make) -> None:
    output = train(few, "--batch-size", "8", *TRAINS_NORMS[what], stage1=stage1_file("plain"))
    assert (output / "metrics.json").exists()


def test_the_hand_made_loop_takes_full_batches_only(
    few: Path, stage1_file: Make, tmp_path: Path
) -> None:
    where = ["--dataset-dir", str(few), "--output-dir", str(tmp_path / "out")]
    where += ["--stage1-model", str(stage1_file("plain")), "--batch-size"]
    with pytest.raises(SystemExit, match=REFUSED):
        run(lambda: mystery.main([*where, "1"]))
    with pytest.raises(
        SystemExit,
        match="BatchSizeError: there are 9 blocks to train on, and a batch has 10; pass more",
    ):
        run(lambda: mystery.main([*where, "10"]))


def test_full_batches() -> None:
    data = TensorDataset(torch.arange(7), torch.arange(7))
    torch.manual_seed(0)
    batches = [x.tolist() for x, _ in full_batches(data, 3)]
    assert [len(batch) for batch in batches] == [3, 3]
    assert len({x for batch in batches for x in batch}) == 6
    with pytest.raises(BatchSizeError, match="there are 7 blocks"):
        full_batches(data, 8)
