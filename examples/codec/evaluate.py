"""Evaluate a finished run of a specialist on a split, beside its frozen baseline."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from av1partition import accept
from av1partition.command_line import run
from av1partition.data.blocks import DATA_DIR, SPLITS
from av1partition.data.study_layout import load_dataset
from av1partition.data.tasks import Task
from av1partition.evaluation.metrics import classes_of, classification_metrics, collapse
from av1partition.evaluation.reports import draw_confusion_matrix, write_json
from av1partition.models.specialist_files import reload_specialist, task_of
from av1partition.training.loop import predict_logits


def main(argv: Sequence[str] | None = None) -> None:
    """Print the scores, and write ``evaluation.json`` and a picture into the run's folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--stage1-model", type=Path, required=True, help="the Stage 1 file of the runs"
    )
    parser.add_argument("--output-dir", type=Path, required=True, help="the folder of the run")
    parser.add_argument("--baseline-dir", type=Path, help="the folder of the frozen baseline's run")
    parser.add_argument(
        "--dataset-dir", type=Path, default=DATA_DIR, help="default: the data beside the scripts"
    )
    parser.add_argument("--split", choices=SPLITS, default="val", help="default: %(default)s")
    parser.add_argument(
        "--device", type=accept.device, default=accept.default_device(), help="default: %(default)s"
    )
    options = parser.parse_args(argv)
    task = task_of(options.output_dir)
    runs = {"run": options.output_dir}
    if options.baseline_dir:
        if task_of(options.baseline_dir) is not task:
            parser.error(f"--baseline-dir {options.baseline_dir} is not a run of {task.title}")
        runs["baseline"] = options.baseline_dir
    (blocks,) = load_dataset(options.dataset_dir, [options.split])
    samples, labels = blocks.data(task).tensors
    result: dict[str, Any] = {"split": options.split, "task": task.key}
    for name, folder in runs.items():
        logits = predict_logits(
            reload_specialist(options.stage1_model, task, folder).to(options.device),
            samples,
            options.device,
        )
        predicted = classes_of(logits).bincount(minlength=len(task.classes))
        result[name] = {
            **classification_metrics(logits, labels, task.classes),
            "predicted": dict(zip(task.classes, predicted.tolist(), strict=True)),
            "collapse": collapse(predicted, task.classes),
        }
    write_json(options.output_dir / "evaluation.json", result)
    title = f"{task.title}, {options.split}\nmacro-F1 {result['run']['macro_f1']:.4f}"
    draw_confusion_matrix(result["run"], options.output_dir / "evaluation.png", title)
    print(_table(result, task))


def _table(result: dict[str, Any], task: Task) -> str:
    lines = [f"{task.title} on {result['split']}"]
    for name in ("run", "baseline"):
        if name not in result:
            continue
        scores = result[name]
        lines += [
            "",
            f"{name}: macro-F1 {scores['macro_f1']:.4f}, accuracy {scores['accuracy']:.4f}",
            "| class | precision | recall | F1 | chosen by AV1 | predicted |",
            "|---|---|---|---|---|---|",
        ]
        for label, each in scores["per_class"].items():
            figures = " | ".join(f"{each[key]:.4f}" for key in ("precision", "recall", "f1"))
            lines.append(
                f"| {label} | {figures} | {each['support']} | {scores['predicted'][label]} |"
            )
        if scores["collapse"]:
            lines.append(scores["collapse"])
    if "baseline" in result:
        gain = result["run"]["macro_f1"] - result["baseline"]["macro_f1"]
        lines += ["", f"Against the frozen baseline: {gain:+.4f} macro-F1"]
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
