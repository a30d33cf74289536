"""Scores, from scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sklearn.metrics import classification_report, confusion_matrix, f1_score
from torch import Tensor


def best_record(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The epoch whose model was kept: the first with the highest macro-F1."""
    return max(history, key=lambda record: float(record["macro_f1"]))


def classes_of(logits: Tensor) -> Tensor:
    """Predicted class numbers, [N]."""
    return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(dim=1)


def macro_f1(logits: Tensor, labels: Tensor) -> float:
    """Mean over the classes of their F1, 0 for a class never right."""
    classes = list(range(max(2, logits.shape[1])))
    score = f1_score(
        labels.numpy(), classes_of(logits).numpy(), labels=classes, average="macro", zero_division=0
    )
    return float(score)


def classification_metrics(
    logits: Tensor, labels: Tensor, classes: Sequence[str]
) -> dict[str, Any]:
    """Accuracy, averaged and per-class scores, and the confusion matrix.

    Args:
        logits: [N, K], or [N, 1] for two classes.
        labels: Class numbers, [N].
        classes: Names of the K classes.

    Returns:
        Numbers, lists and dictionaries only, ready for JSON. In the confusion matrix a row is a
        true class.
    """
    truth, predicted, numbers = (
        labels.numpy(),
        classes_of(logits).numpy(),
        list(range(len(classes))),
    )
    report = classification_report(
        truth,
        predicted,
        labels=numbers,
        target_names=list(classes),
        output_dict=True,
        zero_division=0,
    )
    per_class = {
        name: {
            "precision": float(report[name]["precision"]),
            "recall": float(report[name]["recall"]),
            "f1": float(report[name]["f1-score"]),
            "support": int(report[name]["support"]),
        }
        for name in classes
    }
    return {
        "accuracy": float((truth == predicted).mean()),
        "macro_f1": float(report["macro avg"]["f1-score"]),
        "weighted_f1": float(report["weighted avg"]["f1-score"]),
        "per_class": per_class,
        "confusion_matrix": confusion_matrix(truth, predicted, labels=numbers).tolist(),
        "classes": list(classes),
    }


def collapse(predicted: Tensor, classes: Sequence[str], most: float = 0.9) -> str | None:
    """Says in words that a classifier gives the same answer nearly always, or some answer never.

    None if it does neither.

    Args:
        predicted: How often each class was predicted, [K].
        classes: Names of the K classes.
        most: Share of the predictions from which on one class has taken them over.

    Example:
        >>> import torch
        >>> collapse(torch.tensor([96, 4, 0]), ("SPLIT", "RECT", "AB"))
        'Collapsed: 96.0% of all predictions are SPLIT. AB is never predicted.'
    """
    shares = predicted / predicted.sum().clamp(min=1)
    said = []
    if shares.max() >= most:
        said.append(
            f"Collapsed: {shares.max():.1%} of all predictions are {classes[int(shares.argmax())]}."
        )
    if never := [
        name for name, count in zip(classes, predicted.tolist(), strict=True) if not count
    ]:
        said.append(f"{', '.join(never)} {'is' if len(never) == 1 else 'are'} never predicted.")
    return " ".join(said) or None
