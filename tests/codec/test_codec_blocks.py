"""The loader of the frames: what it cuts, how it splits, what it refuses."""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from av1partition.data.blocks import DATA_DIR, BlockSet, DatasetError, cut_blocks
from av1partition.data.tasks import AB, PARTITIONS, RECT, STAGE1, STAGE2
from PIL import Image

MEANING = {
    "NONE": (0, -1, -1, -1),
    "HORZ": (1, 1, 0, -1),
    "VERT": (1, 1, 1, -1),
    "SPLIT": (1, 0, -1, -1),
    "HORZ_A": (1, 2, -1, 0),
    "HORZ_B": (1, 2, -1, 1),
    "VERT_A": (1, 2, -1, 2),
    "VERT_B": (1, 2, -1, 3),
    "HORZ_4": (1, 1, 0, -1),
    "VERT_4": (1, 1, 1, -1),
}
README = (DATA_DIR / "README.md").read_text(encoding="utf-8")


def slow_nodes() -> list[dict[str, str]]:
    with gzip.open(DATA_DIR / "nodes.csv.gz", "rt") as file:
        return list(csv.DictReader(file))


def slow_splits() -> dict[str, str]:
    manifest = json.loads((DATA_DIR / "MANIFEST.json").read_text())
    return {f["name"]: s for s, pictures in manifest["split_by_picture"].items() for f in manifest["frames"]
            if f["picture"] in pictures}  # fmt: skip


def test_blocks_equal_a_slow_cut(all_blocks: dict[str, BlockSet]) -> None:
    splits, position = slow_splits(), {"train": 0, "val": 0, "test": 0}
    for number, node in enumerate(slow_nodes()):
        split = splits[node["frame"]]
        here = position[split]
        position[split] += 1
        if number % 997:
            continue
        with Image.open(DATA_DIR / "frames" / f"{node['frame']}.png") as image:
            row, col = int(node["row"]), int(node["col"])
            pixels = [[image.getpixel((col + x, row + y)) for x in range(16)] for y in range(16)]
        blocks = all_blocks[split]
        expected = torch.tensor(pixels, dtype=torch.float32)[None] / 255
        assert torch.equal(blocks.samples[here], expected)
        assert blocks.labels_stage0[here] == int(node["label"])
        assert blocks.qps[here] == int(node["base_q_idx"])
    assert position == {split: len(blocks) for split, blocks in all_blocks.items()}


def test_counts_equal_the_readme(all_blocks: dict[str, BlockSet]) -> None:
    labels = torch.cat([blocks.labels_stage0 for blocks in all_blocks.values()])
    qps = torch.cat([blocks.qps for blocks in all_blocks.values()])
    for qp in (80, 128, 172, 220):
        (row,) = re.findall(rf"\| \d+ \({qp}\) \| ([\d |]+) \|", README)
        counts = labels[qps == qp].bincount(minlength=10).tolist()
        assert [int(cell) for cell in row.split("|")] == [*counts, sum(counts)]
    for split, blocks in all_blocks.items():
        (nodes,) = re.findall(rf"\| {split} \| \d+ \| \d+ \| (\d+) \|", README)
        assert len(blocks) == int(nodes)


def test_no_picture_is_in_two_splits() -> None:
    manifest = json.loads((DATA_DIR / "MANIFEST.json").read_text())
    where: dict[str, set[str]] = {}
    for frame in manifest["frames"]:
        where.setdefault(frame["picture"], set()).add(slow_splits()[frame["name"]])
    assert len(where) == 95
    assert all(len(splits) == 1 for splits in where.values())


def test_every_asked_attribution_is_in_the_readme() -> None:
    for frame in json.loads((DATA_DIR / "MANIFEST.json").read_text())["frames"]:
        if "BY" in frame["licence"]:
            assert f"| {frame['picture']} |" in README
            assert frame["author"] in README


def test_samples_are_unit_floats(all_blocks: dict[str, BlockSet]) -> None:
    for blocks in all_blocks.values():
        assert blocks.samples.dtype == torch.float32
        assert blocks.samples.shape[1:] == (1, 16, 16)
        assert 0 <= blocks.samples.min() < blocks.samples.max() <= 1


@pytest.mark.parametrize("number", range(10))
def test_labels_of_every_stage(number: int) -> None:
    blocks = BlockSet(torch.zeros(1, 1, 16, 16), torch.tensor([number]), torch.tensor([80]))
    labels = [blocks.labels(task) for task in (STAGE1, STAGE2, RECT, AB)]
    assert tuple(int(label) for label in labels) == MEANING[PARTITIONS[number]]


def test_tiny_folder_is_valid(tiny_frames: Path) -> None:
    assert {
        split: len(blocks) for split, blocks in cut_blocks(tiny_frames).items()
    } == dict.fromkeys(("train", "val", "test"), 6)


def edit_manifest(folder: Path, change: Callable[[Any], None]) -> None:
    path = folder / "MANIFEST.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def edit_nodes(folder: Path, old: str, new: str) -> None:
    path = folder / "nodes.csv.gz"
    with gzip.open(path, "rt") as file:
        text = file.read()
    assert old in text
    with gzip.open(path, "wt") as file:
        file.write(text.replace(old, new, 1))


BREAKAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda d: (d / "MANIFEST.json").unlink(), "cannot read the manifest"),
    "manifest lacks": (lambda d: edit_manifest(d, lambda m: m.pop("nodes")), r"lacks \['nodes'\]"),
    "picture twice": (
        lambda d: edit_manifest(d, lambda m: m["split_by_picture"]["val"].append("train")),
        "picture 'train' is in two splits",
    ),
    "frame elsewhere": (
        lambda d: edit_manifest(d, lambda m: m["frames"][0].update(split="val")),
        "frame 'train-0' is in split 'val', its picture 'train' in 'train'",
    ),
    "no nodes": (lambda d: (d / "nodes.csv.gz").unlink(), "cannot read the node table"),
    "cut nodes": (
        lambda d: (d / "nodes.csv.gz").write_bytes((d / "nodes.csv.gz").read_bytes()[:60]),
        "cannot read the node table",
    ),
    "columns": (lambda d: edit_nodes(d, "label", "class"), "columns are"),
    "node lost": (
        lambda d: edit_manifest(d, lambda m: m.update(nodes=19)),
        "18 nodes, the manifest says 19",
    ),
    "unknown frame": (
        lambda d: edit_nodes(d, "train-0", "other-0"),
        "frame 'other-0' is not in the manifest",
    ),
    "not a number": (lambda d: edit_nodes(d, "20,80", "20,x"), "not a name and five integers"),
    "quantizer": (
        lambda d: edit_nodes(d, "20,80", "20,256"),
        "line 2: base_q_idx is 256, expected 0..255",
    ),
    "label": (
        lambda d: edit_nodes(d, "80,0,0,", "80,0,0,1"),
        "line 2: label is 1[0-9], expected 0..9",
    ),
    "off the grid": (
        lambda d: edit_nodes(d, "80,0,16", "80,0,8"),
        "node at row 0, col 8 is not on the 16x16 grid",
    ),
    "outside": (
        lambda d: edit_nodes(d, "80,16,0", "80,32,0"),
        "node at row 32, col 0 is not on the 16x16 grid",
    ),
    "negative": (
        lambda d: edit_nodes(d, "80,16,0", "80,-16,0"),
        "node at row -16, col 0 is not on the 16x16 grid",
    ),
    "no frame": (
        lambda d: (d / "frames" / "val-0.png").unlink(),
        "val-0.png: cannot read the frame",
    ),
    "damaged frame": (
        lambda d: (d / "frames" / "val-0.png").write_bytes(b"no"),
        "val-0.png: cannot read the frame",
    ),
    "colour frame": (
        lambda d: Image.fromarray(np.zeros((32, 48, 3), dtype=np.uint8)).save(
            d / "frames" / "val-0.png"
        ),
        r"val-0.png: RGB \(48, 32\), expected 8-bit luma of \(48, 32\)",
    ),
    "frame size": (
        lambda d: Image.fromarray(np.zeros((32, 32), dtype=np.uint8)).save(
            d / "frames" / "val-0.png"
        ),
        r"val-0.png: L \(32, 32\), expected 8-bit luma of \(48, 32\)",
    ),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_broken_folder_is_refused(tiny_frames: Path, name: str) -> None:
    breaks, message = BREAKAGES[name]
    breaks(tiny_frames)
    with pytest.raises(DatasetError, match=message):
        cut_blocks(tiny_frames)
