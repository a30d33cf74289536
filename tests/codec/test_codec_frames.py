"""Partitions drawn on frames: the lines of each kind, where blocks lie, and the drawing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from av1partition.data.blocks import SPLITS, BlockSet, DatasetError, cut_blocks
from av1partition.data.positions import Positions, block_positions
from av1partition.data.tasks import PARTITIONS
from av1partition.evaluation.frames import Segment, draw_partitions, partition_lines, webp
from av1partition.evaluation.report_pipeline import sample_frames
from matplotlib.collections import LineCollection
from PIL import Image

# From the figure of the ten partitions in the AV1 specification; x to the right, y downwards.
ACROSS, DOWN = ((0, 0.5), (1, 0.5)), ((0.5, 0), (0.5, 1))
LINES: dict[str, list[Segment]] = {
    "NONE": [],
    "HORZ": [ACROSS],
    "VERT": [DOWN],
    "SPLIT": [ACROSS, DOWN],
    "HORZ_A": [ACROSS, ((0.5, 0), (0.5, 0.5))],  # two squares above
    "HORZ_B": [ACROSS, ((0.5, 0.5), (0.5, 1))],  # two squares below
    "VERT_A": [DOWN, ((0, 0.5), (0.5, 0.5))],  # two squares on the left
    "VERT_B": [DOWN, ((0.5, 0.5), (1, 0.5))],  # two squares on the right
    "HORZ_4": [((0, 0.25), (1, 0.25)), ((0, 0.5), (1, 0.5)), ((0, 0.75), (1, 0.75))],
    "VERT_4": [((0.25, 0), (0.25, 1)), ((0.5, 0), (0.5, 1)), ((0.75, 0), (0.75, 1))],
}


@pytest.mark.parametrize("kind", range(10))
def test_the_lines_of_each_partition(kind: int) -> None:
    assert sorted(partition_lines(kind)) == sorted(LINES[PARTITIONS[kind]])


def test_positions_are_those_of_the_blocks(
    tiny_frames: Path, all_blocks: dict[str, BlockSet]
) -> None:
    for blocks, positions in (
        (cut_blocks(tiny_frames), block_positions(tiny_frames)),
        (all_blocks, block_positions()),
    ):
        for split in SPLITS:
            where = positions[split]
            assert len(where) == len(blocks[split])
            assert torch.from_numpy(where.labels).equal(blocks[split].labels_stage0)
            assert torch.from_numpy(where.base_q_idx).equal(blocks[split].qps)
            for number in np.linspace(0, len(where) - 1, 6).astype(int):
                luma = where.luma(int(where.frame[number]))
                row, col = int(where.row[number]), int(where.col[number])
                cut = torch.from_numpy(luma[row : row + 16, col : col + 16].copy()).float() / 255
                assert cut.equal(blocks[split].samples[number, 0])


def test_a_missing_frame_is_said(tiny_frames: Path) -> None:
    where = block_positions(tiny_frames)["val"]
    (tiny_frames / "frames" / "val-0.png").unlink()
    with pytest.raises(DatasetError, match=r"val-0\.png: cannot read the frame"):
        where.luma(int(where.frame[0]))


def test_drawing(tmp_path: Path) -> None:
    luma = np.full((32, 48), 128, dtype=np.uint8)
    nodes, kinds = np.array([[0, 16], [16, 0]]), np.array([4, 0])
    path = tmp_path / "frame.png"
    figure = draw_partitions(luma, nodes, kinds, np.array([False, True]), path=path, scale=4)
    (lines,) = (each for each in figure.axes[0].collections if isinstance(each, LineCollection))
    # HORZ_A at row 0, col 16: across, and down in the upper half.
    assert [[tuple(point) for point in segment] for segment in lines.get_segments()] == [
        [(16, 8), (32, 8)],
        [(24, 0), (24, 8)],
    ]
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"), dtype=int)
    assert pixels.shape == (128, 192, 3)  # tight: the frame and nothing round it
    red, green, blue = pixels[96, 32]
    assert red > green + 40  # the middle of the marked block
    assert red > blue + 20
    assert np.ptp(pixels[120, 170]) == 0  # nothing drawn there: grey
    red, green, blue = pixels[32, 80]
    assert min(red, green) > blue + 60  # a line, yellow
    assert webp(figure)[8:12] == b"WEBP"


def test_as_many_kinds_as_blocks() -> None:
    with pytest.raises(ValueError, match="2 blocks, 1 kinds, no marks; expected as many of each"):
        draw_partitions(np.zeros((16, 32), np.uint8), np.zeros((2, 2), int), np.zeros(1, int))
    with pytest.raises(ValueError, match="1 blocks, 1 kinds, 2 marks; expected as many of each"):
        draw_partitions(
            np.zeros((16, 32), np.uint8), np.zeros((1, 2), int), np.zeros(1, int), np.zeros(2, bool)
        )


def test_frames_are_chosen_by_their_blocks() -> None:
    """At each of the quantizers, from the finest to the coarsest, the fullest frame that is not shown yet."""
    rows = [(80, 0, 5), (80, 1, 9), (128, 1, 8), (128, 2, 7), (172, 2, 1), (220, 1, 6), (220, 0, 4)]
    frame = np.concatenate([np.full(count, number) for _, number, count in rows])
    quantizer = np.concatenate([np.full(count, q) for q, _, count in rows])
    zero = np.zeros(len(frame), int)
    where = Positions([{}, {}, {}], frame, quantizer, zero, zero, zero, Path())
    assert sample_frames(where, 0) == []
    assert sample_frames(where, 1) == [(1, 80)]
    assert sample_frames(where, 2) == [(1, 80), (0, 220)]
    assert sample_frames(where, 3) == [(1, 80), (2, 172), (0, 220)]
    assert sample_frames(where, 9) == [(1, 80), (2, 128), (0, 220)]
