"""Small data and runs that several tests of the example share."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from av1partition.data.blocks import BlockSet, cut_blocks
from av1partition.data.study_layout import write_study_file
from av1partition.models.backbones import BackboneKind, build_backbone
from av1partition.models.cascade import Stage1Model
from av1partition.models.stage1_files import save_stage1
from PIL import Image
from torch import nn


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Subprocesses run on one thread too: the number of threads may change the last bits."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def all_blocks() -> dict[str, BlockSet]:
    return cut_blocks()


@pytest.fixture
def tiny_frames(tmp_path: Path) -> Path:
    """A valid data folder: three pictures of 48x32 noise, one per split, every node labelled."""
    rng = np.random.default_rng(0)
    (tmp_path / "frames").mkdir()
    frames, lines = [], []
    for split in ("train", "val", "test"):
        name = f"{split}-0"
        Image.fromarray(rng.integers(0, 256, (32, 48), dtype=np.uint8)).save(
            tmp_path / "frames" / f"{name}.png"
        )
        file = f"frames/{name}.png"
        frames.append(
            {"name": name, "file": file, "picture": split, "split": split, "size_wh": [48, 32]}
        )
        lines += [
            [name, 20, 80, row, col, rng.integers(0, 10)] for row in (0, 16) for col in (0, 16, 32)
        ]
    manifest = {
        "frames": frames,
        "nodes": len(lines),
        "split_by_picture": {s: [s] for s in ("train", "val", "test")},
    }
    (tmp_path / "MANIFEST.json").write_text(json.dumps(manifest))
    with gzip.open(tmp_path / "nodes.csv.gz", "wt", newline="") as file:
        csv.writer(file).writerows(
            [["frame", "cq_level", "base_q_idx", "row", "col", "label"], *lines]
        )
    return tmp_path


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory, all_blocks: dict[str, BlockSet]) -> Path:
    """A few real blocks in the study's layout."""
    folder = tmp_path_factory.mktemp("tiny_dataset")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 400), ("val", 200)):
        blocks = all_blocks[split]
        write_study_file(
            blocks.take(torch.randperm(len(blocks), generator=generator)[:count]),
            folder / f"{split}.pt",
        )
    return folder


@pytest.fixture(scope="session")
def stage1_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[BackboneKind], Path]:
    """Writes the Stage 1 file of an untrained backbone with lively BatchNorm statistics.

    The fine one's head knows all kinds and sees the quantizer.
    """
    folder = tmp_path_factory.mktemp("stage1")

    def write(kind: BackboneKind) -> Path:
        path = folder / f"{kind}.pt"
        if not path.exists():
            torch.manual_seed(0)
            model = Stage1Model(
                build_backbone(kind), kinds=kind == "fine", quantizer=kind == "fine"
            )
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    nn.init.normal_(module.running_mean, std=0.1)
                    nn.init.uniform_(module.running_var, 0.5, 1.5)
            save_stage1(model, path)
        return path

    return write
