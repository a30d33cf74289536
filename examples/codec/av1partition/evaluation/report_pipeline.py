"""What a report shows of a run of all stages.

Scores, specialists, the flow of the blocks, and frames with both partitions.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import one_hot

from av1partition.data.blocks import DatasetError
from av1partition.data.positions import Positions, block_positions
from av1partition.data.tasks import SPECIALISTS
from av1partition.evaluation.cascade_analysis import FOLDED, fold
from av1partition.evaluation.frames import draw_partitions, webp
from av1partition.evaluation.metrics import classification_metrics
from av1partition.evaluation.report_parts import (
    Facts,
    Note,
    Part,
    Picture,
    Pictures,
    Section,
    Table,
    image,
    plot,
)
from av1partition.evaluation.report_sections import scores_of
from av1partition.evaluation.reports import draw_flow

Json = dict[str, Any]
Array = npt.NDArray[np.int64]

# A page of several runs should stay below 1.5 MB.
_SCALE = 1.6
_WHY_FOLDED = (
    "Left (on a narrow page, above) what AV1 chose, any of ten partitions; right what was "
    "predicted, one of eight: HORZ stands for HORZ_4 too, and VERT for VERT_4. Blocks where the "
    "two differ even so are coloured. Where no block is outlined AV1 chose a larger one, and no "
    "question arises. The frames were chosen by their number of blocks, without a look at the "
    "predictions."
)


class PredictionsError(ValueError):
    """``predictions.npz`` is damaged, or is not of the run beside it."""


def pipeline_section(
    result: Json, title: str, number: str, predictions: Path, dataset: Path, frames: int
) -> Section:
    """A run of all stages on a split.

    Args:
        result: What ``pipeline.json`` holds.
        title: Heading of the section.
        number: Put before the ids of its plots.
        predictions: Where ``predictions.npz`` should be.
        dataset: The data folder that was predicted.
        frames: How many frames to draw at most.

    Raises:
        PredictionsError: ``predictions.npz`` is damaged or of another run.
    """
    final, rates = result["final"], result["blocks_a_second"]
    split = "validation" if result["split"] == "val" else str(result["split"])
    stage1 = result["stage1"]
    ends = dict.fromkeys(each["end"] for each in result["flow"])
    lost = [
        (end, sum(each["blocks"] for each in result["flow"] if each["end"] == end)) for end in ends
    ]
    shares = ", ".join(f"{count:,} ({count / result['blocks']:.1%}) {end}" for end, count in lost)
    parts: list[Part] = [
        Facts([
            ("accuracy", f"{final['accuracy']:.4f}"),
            ("macro-F1 of 8 kinds", f"{final['macro_f1']:.4f}"),
            ("weighted F1", f"{final['weighted_f1']:.4f}"),
            ("blocks", f"{result['blocks']:,}"),
            ("blocks a second", f"{rates['one_pass']:,.0f}"),
            ("stage by stage", f"{rates['one_by_one']:,.0f} a second"),
        ]),
        *scores_of(final, number, split),
        Note(
            f"Stage 1 answers PARTITION from a probability of {result['threshold']:.3f} on: "
            f"accuracy {stage1['accuracy']:.4f}, macro-F1 {stage1['macro_f1']:.4f}. A specialist "
            "is measured on all blocks that its question really arises for, and on what the stages "
            "before send it; strangers are blocks that none of its answers is right for.",
            heading="Each stage",
        ),
        _specialists(result["specialists"]),
        Pictures([
            plot(draw_flow(result["flow"], None, ""), f"{number}-flow",
                 f"Of all blocks {shares}.",
                 "Where the blocks of each kind end: right, or lost by the first stage that "
                 "answered wrongly."),
        ]),
        *_frames(result, predictions, dataset, frames),
        _files(result["files"]),
    ]  # fmt: skip
    scores = (f"{final['accuracy']:.4f}", f"{final['macro_f1']:.4f}", "all stages", split)
    return Section(title, f"All stages in one pass, on the {split} blocks.", parts, scores)


def sample_frames(where: Positions, count: int) -> list[tuple[int, int]]:
    """Frames to show, chosen without a look at any prediction.

    Args:
        where: The blocks of a split.
        count: How many at most.

    Returns:
        Numbers of frames, each another one, with a quantizer: from the finest quantizer to the
        coarsest, as evenly as it goes, the frame with the most blocks there of those not taken yet.
    """
    quantizers = np.unique(where.base_q_idx)
    steps = np.linspace(0, len(quantizers) - 1, min(count, len(quantizers))).round().astype(int)
    chosen: list[tuple[int, int]] = []
    for quantizer in quantizers[steps]:
        counts = np.bincount(
            where.frame[where.base_q_idx == quantizer], minlength=len(where.frames)
        )
        counts[[frame for frame, _ in chosen]] = 0
        if counts.any():
            chosen.append((int(counts.argmax()), int(quantizer)))
    return chosen


def _frames(result: Json, predictions: Path, dataset: Path, count: int) -> list[Part]:
    heading = "Partitions on the pictures"
    if not predictions.exists():
        return [
            Note(
                f"No frames are drawn: there is no {predictions.name} beside pipeline.json.",
                heading,
            )
        ]
    true, answered = _predictions(predictions, result)
    if not (dataset / "MANIFEST.json").exists():
        why = (
            "it has no MANIFEST.json, and the study's layout does not say where in which frame a "
            "block lies"
        )
        return [
            Note(
                f"No frames are drawn: the data folder has blocks without positions ({why}).",
                heading,
            )
        ]
    where = block_positions(dataset)[result["split"]]
    if len(where) != len(true) or (where.labels != true).any():
        return [
            Note(
                "No frames are drawn: the predictions are of other blocks than those of the data "
                "folder.",
                heading,
            )
        ]
    right = fold(torch.from_numpy(true)).numpy() == answered
    shown = [
        _pair(where, frame, quantizer, answered, right)
        for frame, quantizer in sample_frames(where, count)
    ]
    return [Note(_WHY_FOLDED, heading), *shown]


def _predictions(path: Path, result: Json) -> tuple[Array, Array]:
    """True and final kinds; they must give the confusion matrix of the JSON beside them."""
    final = result["final"]
    try:
        with np.load(path, allow_pickle=False) as arrays:
            true, answered = (
                torch.from_numpy(arrays[name].astype(np.int64))
                for name in ("true_kind", "final_kind")
            )
        given = classification_metrics(one_hot(answered, len(FOLDED)).float(), fold(true), FOLDED)
    except (
        OSError,
        ValueError,
        KeyError,
        EOFError,
        IndexError,
        RuntimeError,
        zipfile.BadZipFile,
    ) as error:
        raise PredictionsError(
            f"{path}: cannot be read as predictions ({error}); run run_pipeline.py again"
        ) from error
    if given["confusion_matrix"] != final["confusion_matrix"]:
        raise PredictionsError(
            f"{path}: {len(true)} blocks with accuracy {given['accuracy']:.4f} and another "
            f"confusion matrix than pipeline.json, which says {result['blocks']} with "
            f"{final['accuracy']:.4f}; they are of two runs, run run_pipeline.py again"
        )
    return true.numpy(), answered.numpy()


def _pair(
    where: Positions, frame: int, quantizer: int, answered: Array, right: npt.NDArray[np.bool_]
) -> Pictures:
    entry, here = where.frames[frame], where.on(frame, quantizer)
    try:
        luma = where.luma(frame)
    except DatasetError as error:
        raise PredictionsError(str(error)) from error
    nodes, share = where.nodes(here), float(right[here].mean())
    size = (luma.shape[1], luma.shape[0])

    def drawn(whose: str, kinds: Array, different: npt.NDArray[np.bool_] | None) -> Picture:
        alt = (
            f"Frame {entry['name']} at base_q_idx {quantizer} with the {whose} partition of "
            f"{len(here)} blocks drawn on it."
        )
        return image(
            webp(draw_partitions(luma, nodes, kinds, different, scale=_SCALE)),
            "image/webp",
            size,
            alt,
            f"{whose.capitalize()} partition.",
        )

    owed = [
        str(entry[key]) for key in ("title", "author", "licence", "licence_url") if entry.get(key)
    ]
    credit = f" Picture: {', '.join(owed)}; cut, scaled and drawn on." if owed else ""
    return Pictures(
        [drawn("true", where.labels[here], None), drawn("predicted", answered[here], ~right[here])],
        f"{entry['name']}, base_q_idx {quantizer}: {len(here)} blocks, {share:.1%} of them "
        f"right.{credit}",
    )


def _specialists(scores: Json) -> Table:
    rows = []
    for task in SPECIALISTS:
        own, there = scores[task.key]["on_true_inputs"], scores[task.key]["on_what_reaches_it"]
        arrived, mine = there["of_its_own"], ("0", "none", "none")
        if own is not None:
            mine = (
                f"{sum(map(sum, own['confusion_matrix'])):,}",
                f"{own['accuracy']:.4f}",
                f"{own['macro_f1']:.4f}",
            )
        rows.append(
            [
                task.title,
                *mine,
                f"{there['blocks']:,}",
                f"{there['strangers']:,}",
                "none" if there["accuracy"] is None else f"{there['accuracy']:.4f}",
                "none" if arrived is None else f"{arrived['macro_f1']:.4f}",
                f"{scores[task.key]['own_blocks_that_never_arrive']:,}",
            ]
        )
    header = (
        "stage",
        "true inputs",
        "accuracy on them",
        "macro-F1 on them",
        "blocks that reach it",
        "of these strangers",
        "accuracy on what reaches it",
        "macro-F1 on its own of these",
        "its own that never arrive",
    )
    return Table(
        "Each specialist on its true inputs, and on what reaches it.", header, "lrrrrrrrr", rows
    )


def _files(files: dict[str, str]) -> Table:
    rows = [[path, digest] for path, digest in files.items()]
    return Table(
        "The model files that answered, by their SHA-256.", ("file", "SHA-256"), "lc", rows
    )
