"""Partitions from block sizes.

Drawn by hand, drawn at random, and as libaom's inspect printed them.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from av1partition.data.blocks import DatasetError
from av1partition.data.libaom import read_inspection
from av1partition.data.partition_trees import labels_of_nodes
from av1partition.data.tasks import PARTITIONS
from hypothesis import given, settings
from hypothesis import strategies as st

Sizes = npt.NDArray[np.uint8]
Tree = tuple[str, list[Any]]
# One letter per block, in quarters of the node's side.
DRAWN = {
    "NONE": "AAAA AAAA AAAA AAAA",
    "HORZ": "AAAA AAAA BBBB BBBB",
    "VERT": "AABB AABB AABB AABB",
    "SPLIT": "AABB AABB CCDD CCDD",
    "HORZ_A": "AABB AABB CCCC CCCC",
    "HORZ_B": "AAAA AAAA BBCC BBCC",
    "VERT_A": "AACC AACC BBCC BBCC",
    "VERT_B": "AABB AABB AACC AACC",
    "HORZ_4": "AAAA BBBB CCCC DDDD",
    "VERT_4": "ABCD ABCD ABCD ABCD",
}
KINDS_OF_8 = ["NONE", "HORZ", "VERT", "SPLIT"]
# Of a 128x64 piece of the frame skimage-camera-0, from row 256 and column 128, coded at cq level 32
# by aomenc 3.6.0.
RECORDED = gzip.decompress((Path(__file__).parent / "inspect_camera_cq32.json.gz").read_bytes())


def drawn_blocks(kind: str) -> set[tuple[int, int, int, int]]:
    """Row, column, height and width of each letter's rectangle, in quarters."""
    rows = DRAWN[kind].split()
    blocks = set()
    for letter in set("".join(rows)):
        cells = [(r, c) for r in range(4) for c in range(4) if rows[r][c] == letter]
        (top, left), (bottom, right) = min(cells), max(cells)
        blocks.add((top, left, bottom - top + 1, right - left + 1))
    return blocks


def paint(sizes: Sizes, row: int, col: int, side: int, tree: Tree) -> None:
    """Draw a tree's blocks into the map, all in pixels."""
    kind, below = tree
    if below:
        for k, child in enumerate(below):
            paint(sizes, row + k // 2 * side // 2, col + k % 2 * side // 2, side // 2, child)
        return
    for block in drawn_blocks(kind):
        r, c, height, width = (quarters * side // 4 for quarters in block)
        for y in range(row + r, row + r + height, 4):
            for x in range(col + c, col + c + width, 4):
                sizes[y // 4, x // 4] = height, width


def nodes_of(row: int, col: int, side: int, tree: Tree) -> set[tuple[int, int, int]]:
    kind, below = tree
    if side == 16:
        return {(row, col, PARTITIONS.index(kind))}
    return {node for k, child in enumerate(below)
            for node in nodes_of(row + k // 2 * side // 2, col + k % 2 * side // 2, side // 2, child)}  # fmt: skip


def slow_nodes(sizes: Sizes) -> set[tuple[int, int, int]]:
    """Another way.

    List the blocks, then ask of every aligned area whether a block crosses its lines.
    """
    rows, cols = sizes.shape[:2]
    seen = np.zeros((rows, cols), dtype=bool)
    blocks = []
    for r in range(rows):
        for c in range(cols):
            if not seen[r, c]:
                h, w = (int(side) for side in sizes[r, c])
                assert not seen[r : r + h // 4, c : c + w // 4].any()
                assert (sizes[r : r + h // 4, c : c + w // 4] == (h, w)).all()
                seen[r : r + h // 4, c : c + w // 4] = True
                blocks.append((4 * r, 4 * c, h, w))

    def fits(side: int, block: tuple[int, int, int, int]) -> bool:
        r, c, h, w = block
        return r // side == (r + h - 1) // side and c // side == (c + w - 1) // side

    def inside(row: int, col: int, side: int) -> list[tuple[int, int, int, int]]:
        row, col = row // side * side, col // side * side
        return [
            (r, c, h, w)
            for r, c, h, w in blocks
            if row < r + h and r < row + side and col < c + w and c < col + side
        ]

    nodes = set()
    for row in range(0, 4 * rows, 16):
        for col in range(0, 4 * cols, 16):
            if not all(
                fits(side // 2, block) for side in (64, 32) for block in inside(row, col, side)
            ):
                continue
            here = inside(row, col, 16)
            shape = {((r - row) / 4, (c - col) / 4, h / 4, w / 4) for r, c, h, w in here}
            kinds = {kind for kind in PARTITIONS if kind != "SPLIT" and shape == drawn_blocks(kind)}
            kinds |= {"SPLIT"} if all(fits(8, block) for block in here) else set()
            (kind,) = kinds
            nodes.add((row, col, PARTITIONS.index(kind)))
    return nodes


LEAF_32: Tree = ("NONE", [])


@pytest.mark.parametrize("kind", PARTITIONS)
@pytest.mark.parametrize("place", range(4))
def test_each_kind_as_drawn(kind: str, place: int) -> None:
    quads: list[Tree] = [("NONE", [])] * 4
    quads[place] = (kind, [("NONE", [])] * 4 if kind == "SPLIT" else [])
    sizes = np.zeros((16, 16, 2), dtype=np.uint8)
    paint(sizes, 0, 0, 64, ("SPLIT", [LEAF_32, ("SPLIT", quads), LEAF_32, LEAF_32]))
    expected = {(16 * (k // 2), 32 + 16 * (k % 2), 0) for k in range(4) if k != place}
    expected.add((16 * (place // 2), 32 + 16 * (place % 2), PARTITIONS.index(kind)))
    assert set(labels_of_nodes(sizes)) == expected


@pytest.mark.parametrize("kind", [kind for kind in PARTITIONS if kind != "SPLIT"])
@pytest.mark.parametrize("side", [64, 32])
def test_parts_of_larger_partitions_are_no_nodes(kind: str, side: int) -> None:
    """HORZ_A of 32x32 has two 16x16 blocks, which were never asked whether to divide."""
    sizes = np.zeros((16, 16, 2), dtype=np.uint8)
    paint(
        sizes,
        0,
        0,
        64,
        (kind, []) if side == 64 else ("SPLIT", [LEAF_32, LEAF_32, (kind, []), LEAF_32]),
    )
    assert labels_of_nodes(sizes) == []


@st.composite
def trees(draw: st.DrawFn, side: int = 64) -> Tree:
    kind = draw(st.sampled_from(PARTITIONS if side > 8 else KINDS_OF_8))
    return kind, [draw(trees(side // 2)) for _ in range(4)] if kind == "SPLIT" and side > 8 else []


@given(st.lists(trees(), min_size=1, max_size=3), st.booleans())
@settings(max_examples=100, deadline=None)
def test_random_trees_are_recovered(superblocks: list[Tree], upright: bool) -> None:
    sizes = np.zeros(
        (16 * len(superblocks), 16, 2) if upright else (16, 16 * len(superblocks), 2),
        dtype=np.uint8,
    )
    expected = set()
    for k, tree in enumerate(superblocks):
        row, col = (64 * k, 0) if upright else (0, 64 * k)
        paint(sizes, row, col, 64, tree)
        expected |= nodes_of(row, col, 64, tree)
    nodes = labels_of_nodes(sizes)
    assert len(nodes) == len(set(nodes))
    assert set(nodes) == expected == slow_nodes(sizes)


@given(
    trees(),
    st.integers(0, 15),
    st.integers(0, 15),
    st.sampled_from([(4, 4), (8, 8), (16, 4), (32, 16), (64, 64), (0, 0)]),
)
@settings(max_examples=100, deadline=None)
def test_a_map_with_one_wrong_cell_is_refused(
    tree: Tree, row: int, col: int, size: tuple[int, int]
) -> None:
    sizes = np.zeros((16, 16, 2), dtype=np.uint8)
    paint(sizes, 0, 0, 64, tree)
    if tuple(sizes[row, col]) == size:
        return
    sizes[row, col] = size
    with pytest.raises(
        DatasetError, match=r"row \d+, column \d+: block sizes .* are no legal partition; .*64x64"
    ):
        labels_of_nodes(sizes)


@pytest.mark.parametrize("shape", [(16, 16), (16, 12, 2), (8, 16, 2), (16, 16, 3)])
def test_a_map_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DatasetError, match=r"the size map is .*, expected .* of whole 64x64"):
        labels_of_nodes(np.full(shape, 64, dtype=np.uint8))


def test_recorded_output_of_inspect() -> None:
    sizes, base_q_idx = read_inspection(RECORDED, Path("camera.ivf"))
    assert base_q_idx == 128
    assert sizes.shape == (16, 32, 2)
    nodes = labels_of_nodes(sizes)
    assert set(nodes) == slow_nodes(sizes)
    assert len(nodes) == 28
    assert len({label for _, _, label in nodes}) == 9


def test_inspect_names_the_width_first() -> None:
    frame = json.loads(RECORDED)[0]
    wide = next(number for name, number in frame["blockSizeMap"].items() if name == "BLOCK_16X4")
    sizes, _ = read_inspection(RECORDED, Path("camera.ivf"))
    here = np.array(frame["blockSize"]) == wide
    assert here.any()
    assert (sizes[here] == (4, 16)).all()


BREAKAGES: dict[str, tuple[Callable[[list[Any]], object], str]] = {
    "two frames": (
        lambda f: f.insert(0, f[0]),
        r"camera\.ivf: 2 frames, or not a plain key frame; expected one, with",
    ),
    "no frame": (lambda f: f.pop(0), "0 frames"),
    "inter frame": (lambda f: f[0].update(frameType=1), "not a plain key frame"),
    "delta q": (lambda f: f[0].update(deltaQPresentFlag=1), "not a plain key frame"),
    "no sizes": (
        lambda f: f[0].pop("blockSize"),
        r"camera\.ivf: 'inspect -bs' printed no block sizes \(KeyError: 'blockSize'\)",
    ),
    "no names": (
        lambda f: f[0].update(blockSizeMap={"X": 0}),
        "'inspect -bs' printed no block sizes",
    ),
    "unknown size": (
        lambda f: f[0]["blockSize"][0].__setitem__(0, 99),
        r"printed no block sizes \(IndexError",
    ),
    "no list": (lambda f: f[0].update(blockSize=None), "printed no block sizes"),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_other_output_of_inspect_is_refused(name: str) -> None:
    frames = json.loads(RECORDED)
    breaks, message = BREAKAGES[name]
    breaks(frames)
    with pytest.raises(DatasetError, match=message):
        read_inspection(json.dumps(frames).encode(), Path("camera.ivf"))


def test_output_that_is_no_json_is_refused() -> None:
    with pytest.raises(
        DatasetError, match=r"camera\.ivf: 'inspect -bs' printed no block sizes \(JSONDecodeError"
    ):
        read_inspection(RECORDED[:-50], Path("camera.ivf"))
