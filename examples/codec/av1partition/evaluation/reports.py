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


def draw_ablation(variants: dict[str, dict[str, Any]], path: Path, title: str) -> None:
    """Macro-F1 of each variant, with its standard deviation over seeds; a hollow mark is averaged over the symmetries."""
    names = list(variants)
    figure = Figure(figsize=(8, 0.8 + 0.28 * len(names)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(names))
    for way, colour, face in (("plain", "C0", "C0"), ("averaged", "C1", "none")):
        means = [variants[name][way]["mean"] for name in names]
        deviations = [variants[name][way]["deviation"] for name in names]
        axes.errorbar(means, places, xerr=deviations, fmt="o", capsize=3, label=way, color=colour, mfc=face)
    axes.set_yticks(places, [variants[name]["about"] for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("macro-F1")
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title(title)
    figure.savefig(path, dpi=150)


def draw_reloads(curves: dict[str, list[dict[str, Any]]], path: Path, title: str) -> None:
    """For each way of training, macro-F1 by epoch of the live and of the reloaded model."""
    figure = Figure(figsize=(4 * len(curves), 3.4), layout="constrained")
    figure.suptitle(title)
    for axes, (name, records) in zip(figure.subplots(1, len(curves), sharey=True), curves.items(), strict=True):
        epochs = [record["epoch"] for record in records]
        axes.plot(epochs, [record["live"] for record in records], label="live")
        axes.plot(epochs, [record["reloaded"] for record in records], linestyle="--", label="reloaded")
        axes.set_title(name)
        axes.set_xlabel("epoch")
        axes.set_ylabel("macro-F1")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)


def draw_flow(flow: list[dict[str, Any]], path: Path, title: str) -> None:
    """For each true kind, how many blocks end right and how many are lost at which stage: bands from left to right."""
    kinds = list(dict.fromkeys(each["kind"] for each in flow))
    ends = list(dict.fromkeys(each["end"] for each in flow))
    total = sum(each["blocks"] for each in flow)
    gap = 0.015 * total
    colours = dict(zip(ends, ("#c0392b", "#e67e22", "#f1c40f", "#27ae60"), strict=True))
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    left, right = _places(flow, "kind", kinds, gap), _places(flow, "end", ends, gap)
    x = np.linspace(0, 1, 50)
    ease = x * x * (3 - 2 * x)
    for each in flow:
        low, high = left[each["kind"]][each["end"]], right[each["end"]][each["kind"]]
        lower = low + (high - low) * ease
        axes.fill_between(x, lower, lower + each["blocks"], color=colours[each["end"]], alpha=0.55, linewidth=0)
    for x_text, places, names, key, align in ((-0.02, left, kinds, "kind", "right"), (1.02, right, ends, "end", "left")):
        for name in names:
            count = sum(each["blocks"] for each in flow if each[key] == name)
            middle = min(places[name].values()) + count / 2
            axes.text(x_text, middle, f"{name}\n{count} ({count / total:.1%})", ha=align, va="center", fontsize=9)
    axes.set_xlim(-0.25, 1.3)
    axes.invert_yaxis()
    axes.set_axis_off()
    axes.set_title(title)
    figure.savefig(path, dpi=150)


def _places(flow: list[dict[str, Any]], key: str, names: list[str], gap: float) -> dict[str, dict[str, float]]:
    """Where each band starts on one side: for each name there, by the name on the other side."""
    other = "end" if key == "kind" else "kind"
    at = 0.0
    places: dict[str, dict[str, float]] = {}
    for name in names:
        places[name] = {}
        for each in (each for each in flow if each[key] == name):
            places[name][each[other]] = at
            at += each["blocks"]
        at += gap
    return places
