"""The whole experiment in a few minutes: a short Stage 1, then Stage 2 with and without adapters."""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import train_stage1
import train_stage2
import verify_run
from av1partition.data.blocks import cut_blocks
from av1partition.data.study_layout import write_study_file
from av1partition.data.tasks import STAGE2

HERE = Path(__file__).resolve().parent
# One quantizer, because the models do not see it and it shifts the choice from SPLIT to NONE; the
# finest, because it has the most divided blocks.
BASE_Q_IDX = 80
TRAIN_BLOCKS = 16_000
STAGE1_EPOCHS = 4
STAGE2_EPOCHS = 10
SEED = "0"


def main(argv: Sequence[str] | None = None) -> None:
    """Run it, print the table and the paths of the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=HERE.parents[1] / "runs" / "demo", help="default: %(default)s")
    output: Path = parser.parse_args(argv).output_dir
    # The blocks are too small for a second thread to gain much, and where the machine is busy it costs a lot.
    torch.set_num_threads(1)
    started = time.monotonic()
    dataset, stage1 = output / "dataset", output / "stage1"
    print(_write_dataset(dataset))
    print(
        f"Stage 1: {STAGE1_EPOCHS} epochs from random weights (ImageNet's would need a download); "
        f"Stage 2: {STAGE2_EPOCHS} epochs; seed {SEED}"
    )
    common = ["--dataset-dir", str(dataset), "--device", "cpu"]
    train_stage1.main([*common, "--seed", SEED, "--epochs", str(STAGE1_EPOCHS), "--output-dir", str(stage1)])
    rows = []
    for name, flags in (("frozen baseline", []), ("adapters", ["--use-adapters"])):
        run = output / name.replace(" ", "_")
        where = ["--stage1-model", str(stage1 / train_stage1.STAGE1_FILE), "--output-dir", str(run)]
        train_stage2.main([*common, *where, *flags, "--seed", SEED, "--epochs", str(STAGE2_EPOCHS)])
        rows.append((name, json.loads((run / "metrics.json").read_text()), _verify([*common, *where])))
    print(_table(rows))
    print("Pictures:")
    for picture in sorted(output.glob("*/*.png")):
        print(f"  {picture}")
    print(f"Done in {time.monotonic() - started:.0f} s on one thread.")


def _write_dataset(folder: Path) -> str:
    """Write a part of the blocks in the study's layout, and say which."""
    folder.mkdir(parents=True, exist_ok=True)
    said = []
    blocks = cut_blocks()
    for name, most in (("train", TRAIN_BLOCKS), ("val", None)):
        part = blocks[name].take(blocks[name].qps == BASE_Q_IDX)
        part = part.take(torch.randperm(len(part), generator=torch.Generator().manual_seed(0))[:most])
        write_study_file(part, folder / f"{name}.pt")
        divided = len(part.of(STAGE2))
        said.append(f"{name} {len(part)} of {len(blocks[name])} blocks ({divided} of them divided, for Stage 2)")
    return f"Data: base_q_idx {BASE_Q_IDX} only; {', '.join(said)}"


def _verify(arguments: list[str]) -> dict[str, float]:
    """The differences that `verify_run` finds, in a process that shares nothing with the training."""
    command = [sys.executable, verify_run.__file__, *arguments]
    # The number of threads may change the order of sums and so the last bits; the training had one.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    differences: dict[str, float] = json.loads(done.stdout)
    return differences


def _table(rows: list[tuple[str, dict[str, Any], dict[str, float]]]) -> str:
    lines = [
        "",
        "| Stage 2 | macro-F1 | trainable parameters | file size | reload difference: macro-F1 | largest logit |",
        "|---|---|---|---|---|---|",
    ]
    for name, metrics, differences in rows:
        lines.append(
            f"| {name} | {metrics['macro_f1']:.4f} | {metrics['parameters']['trainable']:,} "
            f"| {metrics['file']['bytes'] / 1000:.1f} kB | {differences['macro_f1']:g} | {differences['logits']:g} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    main()
