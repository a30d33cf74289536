"""16x16 luma blocks and the partition AV1 chose for each, cut from the frames in ``data/``."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import TensorDataset

from av1partition.data.inputs import with_quantizer
from av1partition.data.tasks import PARTITIONS, Task

BLOCK = 16
SPLITS = ("train", "val", "test")
COLUMNS = ["frame", "cq_level", "base_q_idx", "row", "col", "label"]
FRAME_KEYS = {"name", "file", "picture", "split", "size_wh"}
DATA_DIR = Path(__file__).resolve().parents[2] / "data"


class DatasetError(ValueError):
    """The data set is incomplete, damaged or contradicts itself."""


@dataclass(frozen=True)
class NodeTable:
    """The node table as it is in the folder, before any pixel is read.

    Attributes:
        frames: The manifest's entries of all frames.
        nodes: Of each node the frame's number, base_q_idx, row, col and label, int64 of shape [N,
            5].
        splits: Of each node the number of its split in ``SPLITS``, int64 of shape [N].
    """

    frames: list[dict[str, Any]]
    nodes: npt.NDArray[np.int64]
    splits: npt.NDArray[np.int64]


@dataclass(frozen=True)
class BlockSet:
    """Blocks with what AV1 did to them.

    Attributes:
        samples: Luma in [0, 1], float32 of shape [N, 1, 16, 16].
        labels_stage0: AV1 partition ids 0..9, int64 of shape [N]; names in ``PARTITIONS``.
        qps: ``base_q_idx`` 0..255 the block was coded at, int64 of shape [N].
    """

    samples: Tensor
    labels_stage0: Tensor
    qps: Tensor

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self.labels_stage0)

    def take(self, index: Tensor) -> BlockSet:
        """The blocks that an index or a mask selects, in its order."""
        return BlockSet(self.samples[index], self.labels_stage0[index], self.qps[index])

    def coded_at(self, base_q_idx: int | None) -> BlockSet:
        """The blocks of one quantizer; None: all.

        Raises:
            DatasetError: There are none.
        """
        if base_q_idx is None:
            return self
        if not (self.qps == base_q_idx).any():
            raise DatasetError(
                f"no block was coded at base_q_idx {base_q_idx}; there are "
                f"{sorted(set(self.qps.tolist()))}"
            )
        return self.take(self.qps == base_q_idx)

    def labels(self, task: Task) -> Tensor:
        """Class numbers of a task, int64 of shape [N]; -1 where its question does not arise."""
        return task.of(self.labels_stage0)

    def of(self, task: Task) -> BlockSet:
        """The blocks of which a task asks."""
        return self.take(self.labels(task) >= 0)

    def part(self, most: int | None, seed: int = 0) -> BlockSet:
        """At most so many of the blocks, all without a limit, in a random order."""
        return self.take(
            torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:most]
        )

    def inputs(self) -> Tensor:
        """What models are given, [N, 2, 16, 16]: luma, and the quantizer as a plane."""
        return with_quantizer(self.samples, self.qps)

    def check(self, task: Task, *, every_class: bool) -> None:
        """Refuse blocks of which a task does not ask, or which lack a class that is to be learned.

        Raises:
            DatasetError: There are none; or, with ``every_class``, none of a class.
        """
        labels = self.labels(task)
        counts = labels[labels >= 0].bincount(minlength=len(task.classes)).tolist()
        missing = [name for name, count in zip(task.classes, counts, strict=True) if not count]
        if len(missing) == len(counts) or (missing and every_class):
            raise DatasetError(
                f"{task.title}: none of {len(self)} blocks is {' or '.join(missing)}; pass data "
                "with some of each"
            )

    def data(self, task: Task, *, every_class: bool = False) -> TensorDataset:
        """The inputs of the blocks of which a task asks, and their class numbers.

        Raises:
            DatasetError: See :meth:`check`.
        """
        self.check(task, every_class=every_class)
        blocks = self.of(task)
        return TensorDataset(blocks.inputs(), blocks.labels(task))


def cut_blocks(data_dir: str | Path = DATA_DIR) -> dict[str, BlockSet]:
    """Cut every labelled block out of its frame.

    Args:
        data_dir: Folder with ``MANIFEST.json``, ``nodes.csv.gz`` and ``frames/``.

    Returns:
        One set for each of "train", "val" and "test", in the table's order. All frames of a
        picture, at all quantizers, are in the same set.

    Raises:
        DatasetError: A file is missing, damaged, or disagrees with the manifest.

    Example:
        >>> blocks = cut_blocks()["val"]
        >>> tuple(blocks.samples.shape)
        (21948, 1, 16, 16)
    """
    root = Path(data_dir)
    table = read_table(root)
    nodes = table.nodes
    samples = np.empty((len(nodes), BLOCK, BLOCK), dtype=np.float32)
    for number, frame in enumerate(table.frames):
        here = np.flatnonzero(nodes[:, 0] == number)
        luma = read_luma(root, frame)
        samples[here] = _cut(luma, nodes[here, 2], nodes[here, 3], frame["name"])
    every = BlockSet(
        torch.from_numpy(samples).unsqueeze(1).div_(255.0),
        torch.from_numpy(nodes[:, 4].copy()),
        torch.from_numpy(nodes[:, 1].copy()),
    )
    splits = torch.from_numpy(table.splits)
    return {name: every.take(splits == number) for number, name in enumerate(SPLITS)}


def read_table(root: Path) -> NodeTable:
    """Read manifest and node table, and hold them against each other.

    Raises:
        DatasetError: A file is missing, damaged, or disagrees with the manifest.
    """
    manifest = _read_manifest(root / "MANIFEST.json")
    frames: list[dict[str, Any]] = manifest["frames"]
    split_of_frame = _splits(manifest)
    nodes = _read_nodes(root / "nodes.csv.gz", [f["name"] for f in frames], manifest["nodes"])
    return NodeTable(frames, nodes, split_of_frame[nodes[:, 0]])


def read_luma(root: Path, frame: dict[str, Any]) -> npt.NDArray[np.uint8]:
    """The pixels of a frame, [height, width].

    Args:
        root: The data folder.
        frame: Its entry in the manifest.

    Raises:
        DatasetError: The file is missing, damaged, or of another size.
    """
    path, size_wh = root / frame["file"], frame["size_wh"]
    try:
        with Image.open(path) as image:
            if image.mode != "L" or list(image.size) != size_wh:
                raise DatasetError(
                    f"{path}: {image.mode} {image.size}, expected 8-bit luma of {tuple(size_wh)}"
                )
            return np.asarray(image, dtype=np.uint8)
    except (
        OSError,
        SyntaxError,
        Image.DecompressionBombError,
    ) as error:  # SyntaxError: a damaged PNG file.
        raise DatasetError(
            f"{path}: cannot read the frame ({error}); restore the data folder"
        ) from error


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"{path}: cannot read the manifest ({error}); restore the data folder"
        ) from error
    if missing := {"frames", "nodes", "split_by_picture"} - manifest.keys():
        raise DatasetError(f"{path}: lacks {sorted(missing)}; restore the data folder")
    for number, frame in enumerate(manifest["frames"]):
        if missing := FRAME_KEYS - frame.keys():
            raise DatasetError(
                f"{path}: frame {number} (from 0) lacks {sorted(missing)}; restore the data folder"
            )
    return manifest


def _splits(manifest: dict[str, Any]) -> npt.NDArray[np.int64]:
    """Split number of each frame; the manifest's two statements of it must agree."""
    split_of_picture: dict[str, str] = {}
    for split, pictures in manifest["split_by_picture"].items():
        for picture in pictures:
            if picture in split_of_picture:
                raise DatasetError(
                    f"picture {picture!r} is in two splits; keep it in one, or validation leaks"
                )
            split_of_picture[picture] = split
    for frame in manifest["frames"]:
        expected = split_of_picture.get(frame["picture"])
        if frame["split"] not in SPLITS or frame["split"] != expected:
            raise DatasetError(
                f"frame {frame['name']!r} is in split {frame['split']!r}, its picture "
                f"{frame['picture']!r} in {expected!r}; every frame must follow its picture into "
                f"one of {SPLITS}"
            )
    return np.array([SPLITS.index(frame["split"]) for frame in manifest["frames"]], dtype=np.int64)


def _read_nodes(path: Path, frames: list[str], expected: int) -> npt.NDArray[np.int64]:
    """Table of frame number, base_q_idx, row, col, label."""
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            header, *lines = csv.reader(file)
    except (OSError, EOFError, ValueError, zlib.error, csv.Error) as error:
        raise DatasetError(
            f"{path}: cannot read the node table ({error}); restore the data folder"
        ) from error
    if header != COLUMNS:
        raise DatasetError(f"{path}: columns are {header}, expected {COLUMNS}")
    if len(lines) != expected:
        raise DatasetError(
            f"{path}: {len(lines)} nodes, the manifest says {expected}; restore the data folder"
        )
    number_of = {name: number for number, name in enumerate(frames)}
    try:
        table = np.array(
            [(number_of[n], int(q), int(r), int(c), int(k)) for n, _, q, r, c, k in lines],
            dtype=np.int64,
        )
    except KeyError as error:
        raise DatasetError(f"{path}: frame {error} is not in the manifest") from error
    except (ValueError, OverflowError) as error:
        raise DatasetError(f"{path}: a line is not a name and five integers ({error})") from error
    _check_range(path, "base_q_idx", table[:, 1], 255)
    _check_range(path, "label", table[:, 4], len(PARTITIONS) - 1)
    return table


def _check_range(path: Path, column: str, values: npt.NDArray[np.int64], highest: int) -> None:
    wrong = np.flatnonzero((values < 0) | (values > highest))
    if len(wrong):
        # The header is line 1.
        line, value = wrong[0] + 2, values[wrong[0]]
        raise DatasetError(f"{path}: line {line}: {column} is {value}, expected 0..{highest}")


def _cut(
    luma: npt.NDArray[np.uint8],
    rows: npt.NDArray[np.int64],
    cols: npt.NDArray[np.int64],
    frame: str,
) -> npt.NDArray[np.uint8]:
    height, width = luma.shape
    wrong = (rows % BLOCK != 0) | (cols % BLOCK != 0)
    wrong |= (rows < 0) | (cols < 0) | (rows + BLOCK > height) | (cols + BLOCK > width)
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        raise DatasetError(
            f"frame {frame!r}: node at row {rows[first]}, col {cols[first]} is not on the 16x16 "
            f"grid of {width}x{height} pixels"
        )
    grid = luma[: height // BLOCK * BLOCK, : width // BLOCK * BLOCK]
    grid = grid.reshape(height // BLOCK, BLOCK, width // BLOCK, BLOCK).swapaxes(1, 2)
    blocks: npt.NDArray[np.uint8] = grid[rows // BLOCK, cols // BLOCK]
    return blocks
