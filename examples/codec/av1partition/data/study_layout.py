"""The study's data files: ``train.pt`` and ``val.pt``, one dictionary of tensors each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from av1partition.atomic_file import write_atomically
from av1partition.data.blocks import BLOCK, BlockSet, DatasetError, cut_blocks
from av1partition.data.tasks import AB, PARTITIONS, RECT, STAGE1, STAGE2

KEYS = (
    "samples",
    "labels_stage0",
    "labels_stage1",
    "labels_stage2",
    "labels_stage3_RECT",
    "labels_stage3_AB",
    "qps",
)


def load_dataset(
    directory: str | Path, splits: Sequence[str] = ("train", "val")
) -> tuple[BlockSet, ...]:
    """Load blocks from either kind of folder.

    Args:
        directory: Frames with a manifest (as ``data/`` here), or the study's ``train.pt`` and
            ``val.pt``.
        splits: Which blocks: of "train", "val" and "test".

    Returns:
        The blocks of each split.

    Raises:
        DatasetError: The folder is neither, both, or its content is not valid.
    """
    root = Path(directory)
    framed, study = (root / "MANIFEST.json").exists(), (root / "train.pt").exists()
    if framed == study:
        found = "both" if framed else "neither"
        raise DatasetError(
            f"{root}: has {found} of MANIFEST.json (frames) and train.pt (the study's layout); "
            "pass a folder with exactly one of them"
        )
    if framed:
        blocks = cut_blocks(root)
        return tuple(blocks[split] for split in splits)
    return tuple(read_study_file(root / f"{split}.pt") for split in splits)


def write_study_file(blocks: BlockSet, path: str | Path) -> None:
    """Write blocks as one of the study's files, with every stage's labels."""
    content = {"samples": blocks.samples, "qps": blocks.qps, **_labels(blocks)}
    write_atomically(
        Path(path), lambda file: torch.save({key: content[key].contiguous() for key in KEYS}, file)
    )


def read_study_file(path: str | Path) -> BlockSet:
    """Read one of the study's files; no code in it is run.

    Args:
        path: A file written by ``torch.save``: a dictionary with exactly the tensors in ``KEYS``.

    Returns:
        Its blocks.

    Raises:
        DatasetError: A tensor is missing, superfluous, of the wrong kind, shape or range, or the
            labels of the stages contradict each other.
    """
    path = Path(path)
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # No common base; and its texts advise weights_only=False.
        raise DatasetError(f"{path}: cannot be read as tensors ({type(error).__name__})") from error
    _check_keys(path, content)
    samples: Tensor = content["samples"]
    if (
        not samples.is_floating_point()
        or samples.ndim != 4
        or samples.shape[1:] != (1, BLOCK, BLOCK)
    ):
        raise DatasetError(
            f"{path}: 'samples' is {samples.dtype} {list(samples.shape)}, expected float [N, 1, "
            f"{BLOCK}, {BLOCK}]"
        )
    if not len(samples):
        raise DatasetError(f"{path}: 'samples' is empty")
    low, high = samples.aminmax()
    if not (low >= 0 and high <= 1):  # Written so that NaN is refused too.
        raise DatasetError(
            f"{path}: 'samples' lies in [{low:g}, {high:g}], expected [0, 1]; divide 8-bit luma by "
            "255"
        )
    for key in KEYS[1:]:
        values: Tensor = content[key]
        if values.is_floating_point() or values.is_complex() or values.shape != samples.shape[:1]:
            raise DatasetError(
                f"{path}: {key!r} is {values.dtype} {list(values.shape)}, expected integers "
                f"[{len(samples)}]"
            )
    _check_range(path, "labels_stage0", content["labels_stage0"], len(PARTITIONS) - 1)
    _check_range(path, "qps", content["qps"], 255)
    blocks = BlockSet(
        samples.detach().float(), content["labels_stage0"].long(), content["qps"].long()
    )
    _check_consistency(path, blocks, content)
    return blocks


def _labels(blocks: BlockSet) -> dict[str, Tensor]:
    return {
        "labels_stage0": blocks.labels_stage0,
        "labels_stage1": blocks.labels(STAGE1),
        "labels_stage2": blocks.labels(STAGE2),
        "labels_stage3_RECT": blocks.labels(RECT),
        "labels_stage3_AB": blocks.labels(AB),
    }


def _check_keys(path: Path, content: object) -> None:
    if not isinstance(content, dict):
        raise DatasetError(
            f"{path}: holds a {type(content).__name__}, expected a dictionary with {list(KEYS)}"
        )
    missing = [key for key in KEYS if not isinstance(content.get(key), Tensor)]
    superfluous = [key for key in content if key not in KEYS]
    if missing or superfluous:
        raise DatasetError(f"{path}: missing tensors {missing}, unexpected entries {superfluous}")


def _check_range(path: Path, key: str, values: Tensor, highest: int) -> None:
    wrong = ((values < 0) | (values > highest)).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise DatasetError(f"{path}: {key!r}[{row}] is {int(values[row])}, expected 0..{highest}")


def _check_consistency(path: Path, blocks: BlockSet, content: dict[str, Tensor]) -> None:
    for key, expected in _labels(blocks).items():
        wrong = (content[key] != expected).nonzero()
        if len(wrong):
            row = int(wrong[0])
            partition = PARTITIONS[int(blocks.labels_stage0[row])]
            raise DatasetError(
                f"{path}: {key!r}[{row}] is {int(content[key][row])}, but 'labels_stage0' says "
                f"{partition}, for which it must be {int(expected[row])}; derive the labels with "
                "the tables in av1partition/data/tasks.py"
            )
