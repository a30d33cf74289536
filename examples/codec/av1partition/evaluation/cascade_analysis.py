"""How good the stages are together, and where blocks are lost between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from av1partition.data.blocks import BlockSet
from av1partition.data.tasks import PARTITIONS, SPECIALISTS, STAGE1, STAGE2
from av1partition.evaluation.metrics import classification_metrics
from av1partition.evaluation.pipeline import Predictions

# The study answers with eight kinds: a 1:4 partition counts as the one that cuts in its direction.
FOLDED = PARTITIONS[:8]
_FOLD = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 1, 2])


def fold(partitions: Tensor) -> Tensor:
    """AV1 ids with HORZ_4 as HORZ and VERT_4 as VERT."""
    return _FOLD[partitions]


def analyse(blocks: BlockSet, predictions: Predictions) -> dict[str, Any]:
    """Scores of the whole and of each stage, and the way of the blocks.

    Args:
        blocks: What was predicted.
        predictions: With each specialist asked about its true inputs too.

    Returns:
        Numbers, lists and dictionaries only, ready for JSON.
    """
    truth = fold(blocks.labels_stage0)
    partition = predictions.partition
    reached_stage2 = predictions.reached[STAGE2.key]
    stage1 = torch.stack([~reached_stage2, reached_stage2], dim=1).float()
    return {
        "blocks": len(blocks),
        "final": classification_metrics(_one_hot(predictions.kinds, len(FOLDED)), truth, FOLDED),
        "stage1": classification_metrics(stage1, blocks.labels(STAGE1), STAGE1.classes)
        | {"mean_probability": float(partition.mean())},
        "specialists": {task.key: _specialist(blocks, predictions, task) for task in SPECIALISTS},
        "flow": _flow(blocks, predictions),
    }


def _specialist(blocks: BlockSet, predictions: Predictions, task: Any) -> dict[str, Any]:
    labels, reached, answers = (
        blocks.labels(task),
        predictions.reached[task.key],
        predictions.specialists[task.key],
    )
    own, right = labels >= 0, answers.argmax(dim=1) == labels
    arrived = own & reached
    count = int(reached.sum())
    return {
        "on_true_inputs": classification_metrics(answers[own], labels[own], task.classes)
        if own.any()
        else None,
        "on_what_reaches_it": {
            "blocks": count,
            "strangers": int((reached & ~own).sum()),
            "accuracy": int((right & arrived).sum()) / count if count else None,
            "of_its_own": classification_metrics(answers[arrived], labels[arrived], task.classes)
            if arrived.any()
            else None,
        },
        "own_blocks_that_never_arrive": int((own & ~reached).sum()),
    }


def _flow(blocks: BlockSet, predictions: Predictions) -> list[dict[str, Any]]:
    """Where the blocks of each true kind end: right, or the stage that lost them."""
    lost = torch.full((len(blocks),), 3)
    stages = ["lost by Stage 1", "lost by Stage 2", "lost by Stage 3", "right"]
    lost[fold(blocks.labels_stage0) != predictions.kinds] = 2
    asked = blocks.labels(STAGE2) >= 0
    wrong = predictions.specialists[STAGE2.key].argmax(dim=1) != blocks.labels(STAGE2)
    lost[asked & predictions.reached[STAGE2.key] & wrong] = 1
    lost[asked != predictions.reached[STAGE2.key]] = 0
    truth = fold(blocks.labels_stage0)
    return [
        {"kind": name, "end": stages[end], "blocks": int(((truth == kind) & (lost == end)).sum())}
        for kind, name in enumerate(FOLDED)
        for end in range(len(stages))
    ]


def _one_hot(kinds: Tensor, count: int) -> Tensor:
    return torch.nn.functional.one_hot(kinds, count).float()
