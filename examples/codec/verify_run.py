"""Check a finished run of a specialist in a fresh process.

Do its files alone give the logits the live model gave?
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from av1partition.command_line import run
from av1partition.data.blocks import DatasetError
from av1partition.data.study_layout import load_dataset
from av1partition.evaluation.metrics import macro_f1
from av1partition.models.specialist_files import read_tensors, reload_specialist, task_of
from av1partition.training.loop import add_common_options, predict_logits
from av1partition.training.trainees import LOGITS_FILE


def main(argv: Sequence[str] | None = None) -> None:
    """Print the differences as JSON, and fail where there are any."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_options(parser)
    parser.add_argument(
        "--stage1-model", type=Path, required=True, help="the Stage 1 file of the run"
    )
    parser.add_argument("--output-dir", type=Path, required=True, help="the folder of the run")
    options = parser.parse_args(argv)
    task = task_of(options.output_dir)
    _, val = load_dataset(options.dataset_dir)
    samples, labels = val.data(task).tensors
    live = read_tensors(options.output_dir / LOGITS_FILE)
    if len(live) != len(labels):
        raise DatasetError(
            f"{options.dataset_dir}: {len(labels)} validation blocks, the run had {len(live)}; "
            "pass the run's data"
        )
    model = reload_specialist(options.stage1_model, task, options.output_dir).to(options.device)
    reloaded = predict_logits(model, samples, options.device)
    differences = {
        "macro_f1": abs(macro_f1(live, labels) - macro_f1(reloaded, labels)),
        "logits": float((live - reloaded).abs().max()),
    }
    print(json.dumps(differences))
    # Written so that NaN fails too.
    if not all(difference == 0 for difference in differences.values()):
        raise SystemExit(
            f"{options.output_dir}: the files do not give the live model's outputs: {differences}"
        )


if __name__ == "__main__":
    run(main)
