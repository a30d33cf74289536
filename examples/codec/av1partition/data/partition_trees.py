"""The partition of each 16x16 node, from the size of the block over each 4x4 cell of a frame."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from av1partition.data.blocks import BLOCK, DatasetError
from av1partition.data.tasks import PARTITIONS

SUPERBLOCK = 64
CELL = 4
NONE, HORZ, VERT, SPLIT, HORZ_A, HORZ_B, VERT_A, VERT_B, HORZ_4, VERT_4 = range(len(PARTITIONS))

# The blocks of each undivided kind: row, column, height and width in quarters of the node's side.
BLOCKS = {
    NONE: [(0, 0, 4, 4)],
    HORZ: [(0, 0, 2, 4), (2, 0, 2, 4)],
    VERT: [(0, 0, 4, 2), (0, 2, 4, 2)],
    HORZ_A: [(0, 0, 2, 2), (0, 2, 2, 2), (2, 0, 2, 4)],
    HORZ_B: [(0, 0, 2, 4), (2, 0, 2, 2), (2, 2, 2, 2)],
    VERT_A: [(0, 0, 2, 2), (2, 0, 2, 2), (0, 2, 4, 2)],
    VERT_B: [(0, 0, 4, 2), (0, 2, 2, 2), (2, 2, 2, 2)],
    HORZ_4: [(k, 0, 1, 4) for k in range(4)],
    VERT_4: [(0, k, 4, 1) for k in range(4)],
}
# An 8x8 node has no other kinds: its quarters would be smaller than a cell. Its SPLIT, of four 4x4
# blocks, is undivided.
BLOCKS_OF_8 = {kind: BLOCKS[kind] for kind in (NONE, HORZ, VERT)} | {
    SPLIT: [(r, c, 2, 2) for r in (0, 2) for c in (0, 2)]
}


def labels_of_nodes(sizes: npt.NDArray[np.uint8]) -> list[tuple[int, int, int]]:
    """Derive the partition of every 16x16 node of a frame.

    Args:
        sizes: For each 4x4 cell the height and width in pixels of the block that covers it, [rows,
            columns, 2]. The frame is made of whole superblocks of 64x64.

    Returns:
        Row, column (in pixels) and AV1 partition id of each node, superblock by superblock. A 16x16
        block that is part of an AB partition of 32x32 is no node.

    Raises:
        DatasetError: The map is not one of a legal partition tree.

    Example:
        >>> # A 64x64 superblock of four 32x32 blocks, of which the first is split once more.
        >>> sizes = np.full((16, 16, 2), 32, dtype=np.uint8)
        >>> sizes[:8, :8] = 16
        >>> labels_of_nodes(sizes)
        [(0, 0, 0), (0, 16, 0), (16, 0, 0), (16, 16, 0)]
    """
    if (
        sizes.ndim != 3
        or sizes.shape[2] != 2
        or any(side * CELL % SUPERBLOCK for side in sizes.shape[:2])
    ):
        raise DatasetError(
            f"the size map is {list(sizes.shape)}, expected [rows, columns, 2] of whole "
            f"{SUPERBLOCK}x{SUPERBLOCK}"
        )
    height, width = (side * CELL for side in sizes.shape[:2])
    corners = (
        (row, col) for row in range(0, height, SUPERBLOCK) for col in range(0, width, SUPERBLOCK)
    )
    return [node for row, col in corners for node in _walk(sizes, row, col, SUPERBLOCK)]


def _walk(
    sizes: npt.NDArray[np.uint8], row: int, col: int, side: int
) -> Iterator[tuple[int, int, int]]:
    """Visit a node and what is below it, down to 8x8 so that all of the map is checked."""
    here = sizes[row // CELL : (row + side) // CELL, col // CELL : (col + side) // CELL]
    # A kind's blocks, at their places in an aligned node, give a map that no other kind or tree
    # gives.
    label = _KIND_OF_MAP[side].get(here.tobytes(), SPLIT if side > 8 else None)
    if label is None:
        raise DatasetError(
            f"row {row}, column {col}: block sizes {here.reshape(-1, 2).tolist()} (height, width "
            "of each 4x4 cell) are no legal partition; was the stream coded with superblocks of "
            "64x64?"
        )
    if side == BLOCK:
        yield row, col, label
    if label == SPLIT and side > 8:
        half = side // 2
        for below in ((row, col), (row, col + half), (row + half, col), (row + half, col + half)):
            yield from _walk(sizes, *below, half)


def _draw(side: int, blocks: list[tuple[int, int, int, int]]) -> bytes:
    """The size map of a node with these blocks."""
    here = np.zeros((side // CELL, side // CELL, 2), dtype=np.uint8)
    for block in blocks:
        row, col, height, width = (quarters * side // 4 for quarters in block)
        here[row // CELL : (row + height) // CELL, col // CELL : (col + width) // CELL] = (
            height,
            width,
        )
    return here.tobytes()


_KIND_OF_MAP = {
    side: {
        _draw(side, blocks): kind for kind, blocks in (BLOCKS if side > 8 else BLOCKS_OF_8).items()
    }
    for side in (64, 32, 16, 8)
}
