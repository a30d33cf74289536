"""A data folder of frames, their nodes and a manifest, as ``cut_blocks`` reads it."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from av1partition.data.blocks import COLUMNS
from av1partition.data.pictures import Crop, Plane
from av1partition.data.tasks import PARTITIONS


@dataclass(frozen=True)
class Coded:
    """What the encoder did to one picture at one cq level.

    Attributes:
        picture: Its name, and that of its frame.
        cq_level: What the encoder was asked for.
        base_q_idx: The quantizer it used.
        nodes: Row, column and partition of each 16x16 node.
    """

    picture: str
    cq_level: int
    base_q_idx: int
    nodes: list[tuple[int, int, int]]


def write_frame_folder(
    folder: Path,
    lumas: Iterator[tuple[str, Plane]],
    crops: Mapping[str, Crop],
    splits: Mapping[str, Sequence[str]],
    coded: Sequence[Coded],
    about: Mapping[str, Any],
) -> None:
    """Fill a folder; the same data give the same bytes, but for PNG files of another Pillow.

    Args:
        folder: An empty folder.
        lumas: Name and luma of each picture.
        crops: Of each picture.
        splits: Names of the pictures in "train", "val" and "test".
        coded: Every picture at every cq level.
        about: Further entries of the manifest: how the data were made.
    """
    (folder / "frames").mkdir()
    for name, luma in lumas:
        Image.fromarray(luma).save(folder / "frames" / f"{name}.png", optimize=True)
    ordered = sorted(coded, key=lambda each: (each.picture, each.cq_level))
    rows = [
        (each.picture, each.cq_level, each.base_q_idx, *node)
        for each in ordered
        for node in sorted(each.nodes)
    ]
    # Without the time of writing, which gzip would put in.
    with (
        open(folder / "nodes.csv.gz", "wb") as raw,
        gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed,
        io.TextIOWrapper(packed, encoding="utf-8", newline="") as text,
    ):
        csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
    manifest = {
        **about,
        "label_ids": dict(enumerate(PARTITIONS)),
        "base_q_idx_of_cq_level": {
            cq: sorted({c.base_q_idx for c in coded if c.cq_level == cq})
            for cq in _cq_levels(coded)
        },
        "nodes": len(rows),
        "class_counts": _counts(ordered),
        "class_counts_per_cq_level": {
            cq: _counts(c for c in coded if c.cq_level == cq) for cq in _cq_levels(coded)
        },
        "class_counts_per_split": {
            split: _counts(c for c in coded if c.picture in names)
            for split, names in splits.items()
        },
        "frames": [
            {
                "name": name,
                "file": f"frames/{name}.png",
                "picture": name,
                "split": next(split for split, names in splits.items() if name in names),
                "size_wh": crop.size_wh,
                "source_size_wh": crop.source_wh,
                "crop_xywh": crop.xywh,
                "nodes_per_cq_level": {
                    each.cq_level: len(each.nodes) for each in ordered if each.picture == name
                },
            }
            for name, crop in crops.items()
        ],
        "split_by_picture": splits,
    }
    (folder / "MANIFEST.json").write_text(
        json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def _cq_levels(coded: Sequence[Coded]) -> list[int]:
    return sorted({each.cq_level for each in coded})


def _counts(coded: Iterator[Coded] | Sequence[Coded]) -> dict[str, int]:
    counts = Counter(label for each in coded for _, _, label in each.nodes)
    return {name: counts[number] for number, name in enumerate(PARTITIONS)}
