"""The whole experiment in a few minutes.

Adapters against rivals over seeds, all stages on real frames, and pages to look at.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ablation
import run_pipeline
import torch
import train_stage1
import train_stage3
import verify_run
from av1partition import accept
from av1partition.command_line import run
from av1partition.data.blocks import DATA_DIR, cut_blocks
from av1partition.data.study_layout import write_study_file
from av1partition.data.tasks import STAGE2
from av1partition.evaluation.html_report import write_report
from av1partition.evaluation.spread import paired_difference

HERE = Path(__file__).resolve().parent
TRAIN_BLOCKS, VAL_BLOCKS = 10_000, 4_000
STAGE1_EPOCHS = 4
SEEDS = ("0", "1", "2")
# Few blocks make few steps, so the steps are large: with the study's rate adapters hardly leave
# their start.
ADAPTERS, FROZEN = "rate", "frozen"
STAGE3 = "--use-adapters --epochs 6 --batch-size 64 --lr-adapter 1e-3 --lr-head 1e-3"
VARIANTS = (FROZEN, ADAPTERS, "frozen-q", "trees", "trees-q")


def main(argv: Sequence[str] | None = None) -> None:
    """Run it, print the tables and the path of the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=HERE.parents[1] / "runs" / "demo",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--jobs",
        type=accept.whole,
        default=min(os.cpu_count() or 1, 4),
        help="runs at once (default: %(default)s)",
    )
    options = parser.parse_args(argv)
    output: Path = options.output_dir
    # The blocks are too small for a second thread to gain much, and where the machine is busy it
    # costs a lot.
    torch.set_num_threads(1)
    started = time.monotonic()
    dataset, stage1 = output / "dataset", output / "stage1_study"
    print(_write_dataset(dataset))
    data = ["--dataset-dir", str(dataset), "--device", "cpu"]
    print(f"Stage 1: {STAGE1_EPOCHS} epochs from random weights (ImageNet's would need a download)")
    train_stage1.main(
        [*data, "--epochs", str(STAGE1_EPOCHS), "--batch-size", "256", "--output-dir", str(stage1)]
    )
    print(f"Stage 2: adapters and their rivals, seeds {', '.join(SEEDS)}")
    only = ["--only", *VARIANTS, "--seeds", *SEEDS, "--jobs", str(options.jobs)]
    ablation.main([*data, "--runs-dir", str(output), *only])
    model = ["--stage1-model", str(stage1 / train_stage1.STAGE1_FILE)]
    for kind, seeds in (("rect", SEEDS[:1]), ("ab", SEEDS)):
        flags = ["--kind", kind, *STAGE3.split(), "--seeds", *seeds]
        train_stage3.main([*data, *model, *flags, "--output-dir", str(output / "stage3")])
    pipeline, adapted = output / "pipeline", output / "ablation" / ADAPTERS / f"seed{SEEDS[0]}"
    files = [
        "--stage2-model",
        str(adapted / "adapters.pt"),
        "--stage3-rect-model",
        str(output / "stage3/rect/seed0/adapters.pt"),
    ]
    several = [
        "--stage3-ab-models",
        *(str(output / "stage3/ab" / f"seed{seed}" / "adapters.pt") for seed in SEEDS),
    ]
    run_pipeline.main([*model, *files, *several, "--output-dir", str(pipeline), "--device", "cpu"])
    print(said_of(json.loads((output / "ablation" / "ablation.json").read_text())["validation"]))
    metrics = json.loads((adapted / "metrics.json").read_text())
    differences = _verify([*data, *model, "--output-dir", str(adapted)])
    trained, kilobytes = metrics["parameters"]["trainable"], metrics["file"]["bytes"] / 1000
    size = f"{trained:,} parameters, {kilobytes:.1f} kB"
    logits = f"{differences['logits']:g} in the largest logit"
    print(
        f"The adapter file: {size}. A fresh process that reloads it differs by "
        f"{differences['macro_f1']:g} in macro-F1, {logits}."
    )
    for folder in (stage1, output / "ablation", adapted, pipeline):
        print(f"Page: {write_report(folder, dataset_dir=DATA_DIR)}")
    print(f"Done in {time.monotonic() - started:.0f} s.")


def _write_dataset(folder: Path) -> str:
    """Write a part of the blocks in the study's layout, and say which."""
    folder.mkdir(parents=True, exist_ok=True)
    said = []
    blocks = cut_blocks()
    for name, most in (("train", TRAIN_BLOCKS), ("val", VAL_BLOCKS)):
        part = blocks[name].part(most)
        write_study_file(part, folder / f"{name}.pt")
        said.append(
            f"{name} {len(part)} of {len(blocks[name])} blocks ({len(part.of(STAGE2))} of them "
            "divided, for Stage 2)"
        )
    return f"Data: {', '.join(said)}"


def said_of(validation: Mapping[str, Any]) -> str:
    """In words, whether adapters beat the frozen head by more than the spread over seeds.

    And what beats both.
    """
    values = {name: each["macro_f1"]["values"] for name, each in validation.items()}
    difference = paired_difference(values[ADAPTERS], values[FROZEN])
    mean, low, high = (100 * difference[key] for key in ("mean", "low", "high"))
    figures = (
        f"{mean:+.2f} points of macro-F1 against the frozen head, 95% interval {low:+.2f} to "
        f"{high:+.2f}"
    )
    if low > 0:
        verdict = "more than the seeds' spread: the adapters add something here"
    elif high < 0:
        verdict = "less, by more than the seeds' spread: the adapters do harm here"
    else:
        verdict = "within the seeds' spread: the adapters add nothing that can be told here"
    best = max(validation, key=lambda name: float(validation[name]["macro_f1"]["mean"]))
    score = validation[best]["macro_f1"]["mean"]
    return (
        f"\nAdapters: {figures}; {verdict}.\n"
        f"Best of these: {validation[best]['about']}, {score:.4f}.\n"
    )


def _verify(arguments: list[str]) -> dict[str, float]:
    """The differences that `verify_run` finds, in a process apart from the training."""
    command = [sys.executable, verify_run.__file__, *arguments]
    # The number of threads may change the order of sums and so the last bits; the training had one.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    differences: dict[str, float] = json.loads(done.stdout)
    return differences


if __name__ == "__main__":
    run(main)
