"""JSON and pictures of a finished run, from matplotlib.

Each picture is returned, and saved where a path is given.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import ConfusionMatrixDisplay

from av1partition.atomic_file import write_atomically
from av1partition.evaluation.metrics import best_record


def write_json(path: Path, content: object) -> None:
    """Write JSON that a person can read too; NaN is refused."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def draw_learning_curves(history: list[dict[str, Any]], path: Path | None, title: str) -> Figure:
    """Losses on the left, validation scores on the right, the kept epoch marked."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(title)
    losses, scores = figure.subplots(1, 2)
    plot_losses(losses, history)
    plot_scores(scores, history)
    return _saved(figure, path)


def plot_losses(axes: Axes, history: list[dict[str, Any]]) -> None:
    """The losses of training and validation by epoch."""
    epochs = [record["epoch"] for record in history]
    axes.plot(epochs, [record["train_loss"] for record in history], marker=".", label="training")
    axes.plot(epochs, [record["val_loss"] for record in history], marker=".", label="validation")
    axes.set_ylabel("loss")
    _by_epoch(axes)


def plot_scores(axes: Axes, history: list[dict[str, Any]]) -> None:
    """Macro-F1 and accuracy on the validation blocks by epoch, the kept epoch marked."""
    epochs = [record["epoch"] for record in history]
    best = best_record(history)
    axes.plot(epochs, [record["macro_f1"] for record in history], marker=".", label="macro-F1")
    axes.plot(epochs, [record["val_accuracy"] for record in history], marker=".", label="accuracy")
    axes.axvline(best["epoch"], color="0.6", linestyle=":", zorder=0)
    axes.plot(
        [best["epoch"]],
        [best["macro_f1"]],
        "*",
        color="C3",
        markersize=11,
        label=f"kept: {best['macro_f1']:.4f}",
    )
    axes.set_ylabel("on validation blocks")
    _by_epoch(axes)


def draw_confusion_matrix(metrics: dict[str, Any], path: Path | None, title: str) -> Figure:
    """Counts in each cell, coloured by the share of the true class."""
    counts = np.array(metrics["confusion_matrix"])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # Two lines of text in each cell: many classes need room, and names turned so that they do not
    # run into each other.
    many = len(counts) > 4
    figure = Figure(figsize=(6.6, 5.8) if many else (5, 4.2), layout="constrained")
    axes = figure.subplots()
    display = ConfusionMatrixDisplay(shares, display_labels=metrics["classes"])
    turned = 45 if many else "horizontal"
    display.plot(
        ax=axes,
        cmap="Blues",
        values_format=".1%",
        im_kw={"vmin": 0.0, "vmax": 1.0},
        xticks_rotation=turned,
    )
    for (row, col), text in np.ndenumerate(display.text_):
        text.set_text(f"{shares[row, col]:.1%}\n{counts[row, col]}")
        text.set_fontsize(8.5 if many else 10)
        # scikit-learn's own choice goes by the largest share, and is then white on light blue where
        # no share is large.
        text.set_color("white" if shares[row, col] > 0.55 else "#08306b")
    display.im_.colorbar.set_label("share of the true class")
    axes.set_title(title)
    axes.set_xlabel("predicted")
    axes.set_ylabel("chosen by AV1")
    return _saved(figure, path)


def draw_ablation(variants: dict[str, dict[str, Any]], path: Path | None, title: str) -> Figure:
    """Macro-F1 of each variant, with its standard deviation over seeds and each seed as a tick."""
    names = list(variants)
    figure = Figure(figsize=(8, 1 + 0.24 * len(names)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(names))
    scores = [variants[name]["macro_f1"] for name in names]
    # One seed has no deviation, and must not look as if it had a small one.
    several = np.array([len(score["values"]) > 1 for score in scores], dtype=bool)
    means, deviations = (
        np.array([score[key] for score in scores], dtype=float) for key in ("mean", "deviation")
    )
    axes.errorbar(
        means[several], places[several], xerr=deviations[several], fmt="none", capsize=3, color="C0"
    )
    axes.plot(means, places, "o", color="C0")
    for place in places[several]:
        values = scores[place]["values"]
        axes.plot(values, [place] * len(values), "|", color="C0", markersize=7, alpha=0.7)
    # A longer one would leave no room for the axes.
    axes.set_yticks(
        places,
        [
            textwrap.fill(variants[name]["about"], 48, max_lines=1, placeholder=" ...")
            for name in names
        ],
    )
    axes.invert_yaxis()
    axes.set_xlabel("macro-F1")
    axes.grid(alpha=0.3)
    axes.set_title(title)
    return _saved(figure, path)


def draw_reloads(curves: dict[str, list[dict[str, Any]]], path: Path | None, title: str) -> Figure:
    """For each way of training, macro-F1 by epoch of the live and of the reloaded model."""
    figure = Figure(figsize=(4 * len(curves), 3.4), layout="constrained")
    figure.suptitle(title)
    for axes, (name, records) in zip(
        figure.subplots(1, len(curves), sharey=True, squeeze=False)[0], curves.items(), strict=True
    ):
        epochs = [record["epoch"] for record in records]
        axes.plot(epochs, [record["live"] for record in records], label="live")
        axes.plot(
            epochs, [record["reloaded"] for record in records], linestyle="--", label="reloaded"
        )
        axes.set_title(name)
        axes.set_ylabel("macro-F1")
        _by_epoch(axes)
    return _saved(figure, path)


def draw_flow(flow: list[dict[str, Any]], path: Path | None, title: str) -> Figure:
    """For each true kind, how many blocks end right and how many are lost at which stage.

    Bands from left to right.
    """
    kinds = list(dict.fromkeys(each["kind"] for each in flow))
    ends = list(dict.fromkeys(each["end"] for each in flow))
    total = sum(each["blocks"] for each in flow)
    # Wide enough for a line of text, however few blocks a kind has.
    gap = 0.032 * total
    colours = dict(zip(ends, ("#c0392b", "#e67e22", "#f1c40f", "#27ae60"), strict=True))
    figure = Figure(figsize=(7.5, 5.6), layout="constrained")
    axes = figure.subplots()
    left, right = _places(flow, "kind", kinds, gap), _places(flow, "end", ends, gap)
    x = np.linspace(0, 1, 30)
    ease = x * x * (3 - 2 * x)
    for each in flow:
        low, high = left[each["kind"]][each["end"]], right[each["end"]][each["kind"]]
        lower = low + (high - low) * ease
        axes.fill_between(
            x, lower, lower + each["blocks"], color=colours[each["end"]], alpha=0.55, linewidth=0
        )
    for x_text, places, names, key, align in (
        (-0.02, left, kinds, "kind", "right"),
        (1.02, right, ends, "end", "left"),
    ):
        for name in names:
            count = sum(each["blocks"] for each in flow if each[key] == name)
            middle = min(places[name].values()) + count / 2
            axes.text(
                x_text,
                middle,
                f"{name}: {count} ({count / total:.1%})",
                ha=align,
                va="center",
                fontsize=9,
            )
    axes.set_xlim(-0.4, 1.45)
    axes.invert_yaxis()
    axes.set_axis_off()
    axes.set_title(title)
    return _saved(figure, path)


def _by_epoch(axes: Axes) -> None:
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()


def _saved(figure: Figure, path: Path | None) -> Figure:
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _places(
    flow: list[dict[str, Any]], key: str, names: list[str], gap: float
) -> dict[str, dict[str, float]]:
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
