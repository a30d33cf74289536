"""Where blocks lie.

Of each block of a split its frame, place and quantizer, in the order of `cut_blocks`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from av1partition.data.blocks import DATA_DIR, SPLITS, read_luma, read_table


@dataclass(frozen=True)
class Positions:
    """Of N blocks, where they lie. The arrays are int64 of shape [N].

    Attributes:
        frames: The manifest's entries of all frames.
        frame: The number of a block's frame among them.
        base_q_idx: What the block was coded at.
        row: Of its upper edge, in pixels.
        col: Of its left edge.
        labels: The AV1 partition ids, by which a caller can tell that two lists are of the same
            blocks.
        root: The data folder.
    """

    frames: list[dict[str, Any]]
    frame: npt.NDArray[np.int64]
    base_q_idx: npt.NDArray[np.int64]
    row: npt.NDArray[np.int64]
    col: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    root: Path

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self.frame)

    def on(self, frame: int, base_q_idx: int) -> npt.NDArray[np.int64]:
        """The numbers of the blocks of one frame at one quantizer."""
        return np.flatnonzero((self.frame == frame) & (self.base_q_idx == base_q_idx))

    def nodes(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Row and col of chosen blocks, [n, 2]."""
        return np.stack([self.row[index], self.col[index]], axis=1)

    def luma(self, frame: int) -> npt.NDArray[np.uint8]:
        """The pixels of a frame, [height, width]."""
        return read_luma(self.root, self.frames[frame])


def block_positions(data_dir: str | Path = DATA_DIR) -> dict[str, Positions]:
    """Where the blocks of each split lie; no frame is read.

    Args:
        data_dir: As `cut_blocks` takes it.

    Returns:
        For each split the positions, in the order of its blocks.

    Raises:
        DatasetError: A file is missing, damaged, or disagrees with the manifest.

    Example:
        >>> where = block_positions()["val"]
        >>> where.frames[where.frame[0]]["name"], int(where.row[0]), int(where.col[0])
        ('skimage-astronaut-0', 0, 0)
    """
    root = Path(data_dir)
    table = read_table(root)
    positions = {}
    for number, split in enumerate(SPLITS):
        frame, base_q_idx, row, col, labels = table.nodes[table.splits == number].T
        positions[split] = Positions(table.frames, frame, base_q_idx, row, col, labels, root)
    return positions
