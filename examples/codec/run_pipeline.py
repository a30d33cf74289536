"""Run all stages on a split.

Predictions of every block, scores, and where blocks are lost between the stages.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from av1partition import accept
from av1partition.atomic_file import write_atomically
from av1partition.command_line import run
from av1partition.data.blocks import DATA_DIR, SPLITS, BlockSet
from av1partition.data.study_layout import load_dataset
from av1partition.data.tasks import AB, RECT, SPECIALISTS, STAGE2
from av1partition.evaluation.cascade_analysis import analyse
from av1partition.evaluation.pipeline import Pipeline, Predictions, true_inputs
from av1partition.evaluation.reports import draw_confusion_matrix, draw_flow, write_json

# Enough blocks to tell how fast it is.
TIMED = 4096


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage1-model", type=Path, required=True, help="Stage 1 file")
    parser.add_argument("--stage2-model", type=Path, required=True, help="adapter file of Stage 2")
    parser.add_argument(
        "--stage3-rect-model", type=Path, required=True, help="adapter file of the RECT specialist"
    )
    parser.add_argument(
        "--stage3-ab-models",
        type=Path,
        nargs="+",
        required=True,
        help="adapter files of the AB ensemble",
    )
    parser.add_argument(
        "--output-dir", type=Path, default=Path("runs/pipeline"), help="default: %(default)s"
    )
    parser.add_argument(
        "--device", type=accept.device, default=accept.default_device(), help="default: %(default)s"
    )
    parser.add_argument(
        "--stage1-threshold",
        type=float,
        help="probability of PARTITION (default: the Stage 1 file's)",
    )
    parser.add_argument(
        "--dataset-dir", type=Path, default=DATA_DIR, help="default: the data beside the scripts"
    )
    parser.add_argument("--split", choices=SPLITS, default="val", help="default: %(default)s")
    options = parser.parse_args(argv)
    if options.stage1_threshold is not None and not 0 < options.stage1_threshold < 1:
        parser.error(
            f"--stage1-threshold is {options.stage1_threshold}, expected a probability between 0 "
            "and 1"
        )
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Run it, and write ``predictions.npz``, ``pipeline.json``, a table and pictures."""
    options = parse_options(argv)
    files = {
        STAGE2: [options.stage2_model],
        RECT: [options.stage3_rect_model],
        AB: options.stage3_ab_models,
    }
    pipeline = Pipeline(options.stage1_model, files, options.device)
    (blocks,) = load_dataset(options.dataset_dir, [options.split])
    threshold = options.stage1_threshold or pipeline.cascade.stage1.threshold
    rates = {
        name: _blocks_a_second(pipeline, blocks, threshold, one)
        for name, one in (("one_pass", True), ("one_by_one", False))
    }
    predictions = pipeline.run(blocks.inputs(), threshold, also=true_inputs(blocks))
    paths = [options.stage1_model, *(path for several in files.values() for path in several)]
    common = os.path.commonpath([path.resolve().parent for path in paths])
    result = {
        "split": options.split,
        "threshold": threshold,
        # Told apart, but without where they lie on this machine.
        "files": {
            os.path.relpath(path.resolve(), common): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in paths
        },
        "blocks_a_second": rates,
        **analyse(blocks, predictions),
    }
    output: Path = options.output_dir
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(
        output / "predictions.npz",
        lambda file: np.savez_compressed(file, **_arrays(blocks, predictions)),
    )
    write_json(output / "pipeline.json", result)
    final = result["final"]
    draw_confusion_matrix(
        final,
        output / "confusion_matrix.png",
        f"All stages, {options.split}\nmacro-F1 {final['macro_f1']:.4f}",
    )
    draw_flow(result["flow"], output / "flow.png", f"Where blocks are lost, {options.split}")
    (output / "pipeline.md").write_text(table(result) + "\n", encoding="utf-8")
    print(f"{table(result)}\n\nWritten to {output}")


def _blocks_a_second(
    pipeline: Pipeline, blocks: BlockSet, threshold: float, one_pass: bool
) -> float:
    inputs = blocks.inputs()[:TIMED]
    started = time.perf_counter()
    pipeline.run(inputs, threshold, one_pass=one_pass)
    return len(inputs) / (time.perf_counter() - started)


def _arrays(blocks: BlockSet, predictions: Predictions) -> dict[str, Any]:
    return {
        "index": np.arange(len(blocks)),
        "true_kind": blocks.labels_stage0.numpy(),
        "stage1_probability": predictions.partition.numpy(),
        **{
            f"{task.key}_probabilities": predictions.specialists[task.key].numpy()
            for task in SPECIALISTS
        },
        **{f"reaches_{task.key}": predictions.reached[task.key].numpy() for task in SPECIALISTS},
        "final_kind": predictions.kinds.numpy(),
    }


def table(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    final, rates = result["final"], result["blocks_a_second"]
    lines = [
        f"{result['blocks']} blocks of {result['split']}: accuracy {final['accuracy']:.4f}, "
        f"macro-F1 {final['macro_f1']:.4f}. Blocks a second: {rates['one_pass']:.0f} in one pass, "
        f"{rates['one_by_one']:.0f} stage by stage.",
        "",
        "| stage | macro-F1 on its true inputs | blocks that reach it | of them strangers | "
        "accuracy on what reaches it |",
        "|---|---|---|---|---|",
    ]
    for task in SPECIALISTS:
        scores = result["specialists"][task.key]
        there = scores["on_what_reaches_it"]
        accuracy = "none" if there["accuracy"] is None else f"{there['accuracy']:.4f}"
        own = f"{scores['on_true_inputs']['macro_f1']:.4f}" if scores["on_true_inputs"] else "none"
        lines.append(
            f"| {task.title} | {own} | {there['blocks']} | {there['strangers']} | {accuracy} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
