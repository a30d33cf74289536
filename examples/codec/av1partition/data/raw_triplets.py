"""Raw triplets of the study's tool.

For each sequence one file of samples, one of labels and one of quantizers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from av1partition.data.blocks import BLOCK, BlockSet, DatasetError
from av1partition.data.tasks import PARTITIONS

HIGHEST_SAMPLE = 1023
BLOCK_BYTES = 2 * BLOCK * BLOCK
# Folder, and the end of the file names in it. The samples are binary, whatever their name says.
SAMPLES = ("intra_raw_blocks", "_sample_16.txt")
LABELS = ("labels", "_labels_16_intra.txt")
QPS = ("qps", "_qps_16_intra.txt")
KINDS = (SAMPLES, LABELS, QPS)


@dataclass(frozen=True)
class Triplet:
    """One sequence, checked.

    Attributes:
        samples: 10-bit luma, little-endian uint16 of shape [N, 16, 16], read from the disk when it
            is used.
        labels: AV1 partition ids, int64 of shape [N].
        qps: ``base_q_idx``, int64 of shape [N].
    """

    samples: npt.NDArray[np.uint16]
    labels: npt.NDArray[np.int64]
    qps: npt.NDArray[np.int64]


def sequence_names(root: Path) -> list[str]:
    """Every sequence that has at least one of its three files, in order.

    Raises:
        DatasetError: There are none.
    """
    names = {
        path.name[: -len(end)] for folder, end in KINDS for path in (root / folder).glob(f"?*{end}")
    }
    if not names:
        raise DatasetError(
            f"{root}: no sequence here; expected "
            f"{', '.join(str(_path(Path(), '<seq>', kind)) for kind in KINDS)}"
        )
    return sorted(names)


def open_triplet(root: Path, name: str) -> Triplet:
    """Read and check the three files of a sequence.

    Args:
        root: Folder with ``intra_raw_blocks/``, ``labels/`` and ``qps/``.
        name: Of the sequence.

    Returns:
        The sequence; its samples stay on the disk.

    Raises:
        DatasetError: A file is missing, empty or damaged, a value is out of its range, or the files
            do not have as many blocks each.
    """
    paths = [_path(root, name, kind) for kind in KINDS]
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise DatasetError(
            f"sequence {name!r}: lacks {missing}; all three files of a sequence are needed"
        )
    samples = _map_samples(paths[0])
    labels, qps = (_read_integers(path) for path in paths[1:])
    if not len(samples) == len(labels) == len(qps):
        raise DatasetError(
            f"sequence {name!r}: {len(samples)} blocks in {paths[0]}, {len(labels)} labels in "
            f"{paths[1]} and {len(qps)} quantizers in {paths[2]}; the three files must be of one "
            "run of the tool"
        )
    _check_samples(paths[0], samples)
    _check_range(paths[1], labels, len(PARTITIONS) - 1, "AV1 partition ids, of 16x16 blocks")
    _check_range(paths[2], qps, 255, "base_q_idx, not cq levels or step sizes")
    return Triplet(samples, labels, qps)


def join(triplets: Sequence[Triplet]) -> BlockSet:
    """The blocks of sequences, one sequence after another; samples divided by 1023."""
    labels, qps = (
        np.concatenate([getattr(each, kind) for each in triplets]) for kind in ("labels", "qps")
    )
    # Filled in place: the samples of a whole split may be a good part of the memory.
    samples = np.empty((len(labels), 1, BLOCK, BLOCK), dtype=np.float32)
    start = 0
    for each in triplets:
        end = start + len(each.labels)
        np.divide(each.samples[:, None], np.float32(HIGHEST_SAMPLE), out=samples[start:end])
        start = end
    return BlockSet(torch.from_numpy(samples), torch.from_numpy(labels), torch.from_numpy(qps))


def _path(root: Path, name: str, kind: tuple[str, str]) -> Path:
    folder, end = kind
    return root / folder / f"{name}{end}"


def _map_samples(path: Path) -> npt.NDArray[np.uint16]:
    size = path.stat().st_size
    if size == 0 or size % BLOCK_BYTES:
        raise DatasetError(
            f"{path}: {size} bytes are not one or more blocks of {BLOCK_BYTES} (16x16 uint16, "
            "binary in spite of the name); copy or write the file again"
        )
    return np.memmap(path, dtype="<u2", mode="r").reshape(-1, BLOCK, BLOCK)


def _check_samples(path: Path, samples: npt.NDArray[np.uint16]) -> None:
    # In pieces, because the comparison of a whole file would take half of its size in memory.
    for start in range(0, len(samples), 65536):
        piece = samples[start : start + 65536]
        if piece.max() > HIGHEST_SAMPLE:
            block, row, col = (int(each) for each in np.argwhere(piece > HIGHEST_SAMPLE)[0])
            raise DatasetError(
                f"{path}: block {start + block}, row {row}, column {col} (from 0) is "
                f"{piece[block, row, col]}, expected 0..{HIGHEST_SAMPLE}; is the file 8-bit, "
                "16-bit or big-endian? Write it as 10-bit little-endian uint16"
            )


def _read_integers(path: Path) -> npt.NDArray[np.int64]:
    text = path.read_bytes()
    tokens = text.split()
    if not tokens:
        raise DatasetError(
            f"{path}: is empty, expected an integer for each block; write the file again"
        )
    try:
        # Python's own notations, as 1_000, are not meant.
        if re.search(rb"[^\s\d+-]", text):
            raise ValueError
        return np.array(tokens).astype(np.int64)
    except (ValueError, OverflowError) as error:
        wrong = next(
            (k for k, token in enumerate(tokens) if not re.fullmatch(rb"[+-]?\d{1,18}", token)), 0
        )
        raise DatasetError(
            f"{path}: value {wrong} (from 0) is {tokens[wrong].decode(errors='replace')[:40]!r}, "
            "expected an integer; the file must be text, integers with spaces between them"
        ) from error


def _check_range(path: Path, values: npt.NDArray[np.int64], highest: int, meaning: str) -> None:
    wrong = np.flatnonzero((values < 0) | (values > highest))
    if len(wrong):
        raise DatasetError(
            f"{path}: value {wrong[0]} (from 0) is {values[wrong[0]]}, expected 0..{highest}; are "
            f"these {meaning}?"
        )
