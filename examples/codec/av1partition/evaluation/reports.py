"""JSON and pictures of a finished run, from matplotlib."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import ConfusionMatrixDisplay

from av1partition.atomic_file import write_atomically
from av1partition.evaluation.metrics import best_record


def write_json(path: Path, content: object) -> None:
    """Write JSON that a person can read too; NaN is refused."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def draw_learning_curves(history: list[dict[str, Any]], path: Path, title: str) -> None:
    """Losses on the left, validation scores on the right, the kept epoch marked."""
    epochs = [record["epoch"] for record in history]
    best = best_record(history)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(title)
    losses, scores = figure.subplots(1, 2)
    losses.plot(epochs, [record["train_loss"] for record in history], marker=".", label="training")
    losses.plot(epochs, [record["val_loss"] for record in history], marker=".", label="validation")
    losses.set_ylabel("loss")
    scores.plot(epochs, [record["macro_f1"] for record in history], marker=".", label="macro-F1")
    scores.plot(epochs, [record["val_accuracy"] for record in history], marker=".", label="accuracy")
    scores.axvline(best["epoch"], color="0.6", linestyle=":", zorder=0)
    scores.plot([best["epoch"]], [best["macro_f1"]], "*", color="C3", markersize=11, label=f"kept: {best['macro_f1']:.4f}")
    scores.set_ylabel("on validation blocks")
    for axes in (losses, scores):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)


def draw_confusion_matrix(metrics: dict[str, Any], path: Path, title: str) -> None:
    """Counts in each cell, coloured by the share of the true class."""
    counts = np.array(metrics["confusion_matrix"])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(5, 4.2), layout="constrained")
    axes = figure.subplots()
    display = ConfusionMatrixDisplay(shares, display_labels=metrics["classes"])
    display.plot(ax=axes, cmap="Blues", values_format=".1%", im_kw={"vmin": 0.0, "vmax": 1.0})
    for (row, col), text in np.ndenumerate(display.text_):
        text.set_text(f"{shares[row, col]:.1%}\n{counts[row, col]}")
    display.im_.colorbar.set_label("share of the true class")
    axes.set_title(title)
    axes.set_xlabel("predicted")
    axes.set_ylabel("chosen by AV1")
    figure.savefig(path, dpi=150)
