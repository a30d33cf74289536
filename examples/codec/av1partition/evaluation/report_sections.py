"""What a report shows of a training run, an ablation, the mystery and the study, by their JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from av1partition.evaluation.metrics import best_record
from av1partition.evaluation.report_parts import Facts, Note, Part, Pictures, Section, Table, plot
from av1partition.evaluation.reports import (
    draw_ablation,
    draw_confusion_matrix,
    draw_reloads,
    plot_losses,
    plot_scores,
)

Json = dict[str, Any]

_TASKS = {"stage2": "Stage 2", "rect": "Stage 3 RECT", "ab": "Stage 3 AB"}
_TRAINED = {
    "adapters": "adapters and head, on a frozen backbone",
    "head": "the head alone, on a frozen backbone (the frozen baseline)",
    "network": "the whole network",
}
# An error that names tens of tensors would make a table of one row.
_LONGEST = 240
_BEFORE_CALIBRATION = (
    "The curves are of the answers before threshold and temperature were chosen, and of all ten "
    "kinds if those were learned. The figures are of NONE or PARTITION, with both."
)
_SPREAD = (
    "Macro-F1 of each variant. Bars are the standard deviation over seeds, ticks single seeds; "
    "one seed has neither."
)
_PROOF = "What the file proved"
_KEPT_EPOCH = (
    "The epoch was chosen on the validation blocks and the figures are of the same blocks, so they "
    "are a little optimistic."
)


@dataclass(frozen=True)
class History:
    """What ``history.json`` says of a run.

    Its kept epoch's record, the number of epochs, and the curves.
    """

    best: Json
    epochs: int
    curves: Pictures
    proof: Sequence[Part]


def training_history(history: list[Json], number: str) -> History:
    """The curves of a training run, and what its kept file proved.

    Args:
        history: What ``history.json`` holds.
        number: Put before the ids of its plots.
    """
    best = best_record(history)
    losses, scores = (Figure(figsize=(4.6, 3.3), layout="constrained") for _ in range(2))
    plot_losses(losses.subplots(), history)
    plot_scores(scores.subplots(), history)
    score = f"macro-F1 {best['macro_f1']:.4f} at epoch {best['epoch']}"
    curves = Pictures([
        plot(losses, f"{number}-loss",
             f"Training and validation loss over {len(history)} epochs.", "Losses by epoch."),
        plot(scores, f"{number}-score", f"Validation scores over {len(history)} epochs: {score}.",
             "Scores on the validation blocks by epoch; the star is the kept one."),
    ])  # fmt: skip
    return History(best, len(history), curves, _proof(best))


def training_section(
    run: History, metrics: Json, title: str, number: str, stage1_bytes: int | None
) -> Section:
    """A training run.

    Args:
        run: What `training_history` makes of ``history.json``.
        metrics: What ``metrics.json`` holds.
        title: Heading of the section.
        number: Put before the ids of its plots.
        stage1_bytes: Size of the Stage 1 file, where there is one.

    Raises:
        ValueError: The two files are not of the same run.
    """
    kept = run.best["epoch"]
    if metrics["best_epoch"] != kept:
        raise ValueError(
            f"it is of epoch {metrics['best_epoch']}, but the best of history.json is {kept}"
        )
    stage1 = "trained" not in metrics
    task = "Stage 1" if stage1 else _TASKS.get(metrics["task"], metrics["task"])
    what = "the whole network" if stage1 else _TRAINED[metrics["trained"]]
    facts = [
        ("accuracy", f"{metrics['accuracy']:.4f}"),
        ("macro-F1", f"{metrics['macro_f1']:.4f}"),
        ("weighted F1", f"{metrics['weighted_f1']:.4f}"),
        ("kept epoch", f"{kept} of {run.epochs}"),
    ]
    if stage1:
        facts += [
            ("threshold", f"{metrics['threshold']:.3f}"),
            ("temperature", f"{metrics['temperature']:.3f}"),
        ]
        facts += [] if stage1_bytes is None else [("size of the file", _size(stage1_bytes))]
    else:
        facts += [("trained parameters", f"{metrics['parameters']['trainable']:,}")]
        facts += [("size of the file", _size(metrics["file"]["bytes"]))]
    parts: list[Part] = [Facts(facts), run.curves]
    if stage1:
        parts.append(Note(_BEFORE_CALIBRATION))
    parts += [
        *scores_of(metrics, number, "validation"),
        *([] if stage1 else [_parameters(metrics)]),
        *run.proof,
    ]
    if not run.proof:
        adapters = metrics.get("trained") == "adapters"
        why = (
            "history.json has none"
            if adapters
            else "only adapter files prove themselves, and this run keeps another kind"
        )
        parts.append(
            Note(
                f"There is no proof of the kept file, so nothing of it was checked: {why}.", _PROOF
            )
        )
    row = (
        f"{metrics['accuracy']:.4f}",
        f"{metrics['macro_f1']:.4f}",
        f"{task}, {what.split(',')[0]}",
        "validation",
    )
    return Section(title, f"{task}. Trained was {what}. {_KEPT_EPOCH}", parts, row)


def scores_of(metrics: Json, number: str, blocks: str) -> list[Part]:
    """Confusion matrix and per-class table of `classification_metrics`."""
    rows = [
        [
            name,
            *(f"{each[key]:.4f}" for key in ("precision", "recall", "f1")),
            f"{each['support']:,}",
        ]
        for name, each in metrics["per_class"].items()
    ]
    counts, classes = metrics["confusion_matrix"], metrics["classes"]
    right = "; ".join(
        f"{name} {counts[row][row]} of {sum(counts[row])}" for row, name in enumerate(classes)
    )
    return [
        Table(f"Each class on the {blocks} blocks. Support is how many blocks are truly of it.",
              ("class", "precision", "recall", "F1", "support"), "lrrrr", rows),
        Pictures([plot(draw_confusion_matrix(metrics, None, ""), f"{number}-confusion",
                       f"Confusion matrix on the {blocks} blocks. Right are: {right}.",
                       "Confusion matrix: a row is a true class, shares are of the row.")]),
    ]  # fmt: skip


def ablation_section(result: Json, title: str, number: str) -> Section:
    """A comparison of variants."""
    parts: list[Part] = []
    for split in ("validation", "test"):
        variants = result[split]
        if variants:
            parts += [
                Note("", heading=f"On the {split} blocks"),
                _variants(variants, split),
                Pictures([plot(draw_ablation(variants, None, ""), f"{number}-{split}",
                               f"Macro-F1 of {len(variants)} variants on the {split} blocks; the "
                               "table before has the figures.",
                               _SPREAD)]),
            ]  # fmt: skip
    if result["differences"]:
        rows = [
            [each["chosen"], each["rival"],
             *(f"{each[key]:+.4f}" for key in ("mean", "low", "high")), f"{each['confidence']:.0%}"]
            for each in result["differences"].values()
        ]  # fmt: skip
        header = ("chosen on validation", "against", "difference", "from", "to", "confidence")
        caption = (
            "Differences of macro-F1 on the test blocks, paired by seed, with intervals by "
            "Student's t."
        )
        parts += [Note("", heading="Differences on test"), Table(caption, header, "llrrrr", rows)]
    if result.get("verdicts"):
        rows = [
            [each["expected"], each["found"], "passed" if each["holds"] else "failed"]
            for each in result["verdicts"]
        ]
        words = ("holds", "fails", "not checked")
        parts.append(
            Table(
                "What was expected, and what came out.",
                ("expected", "found", "verdict"),
                "llo",
                rows,
                words,
            )
        )
    return Section(
        title, "Variants of Stage 2 compared. All choices are made on the validation blocks.", parts
    )


def diagnosis_section(result: Json, title: str) -> Section:
    """What the trees see."""
    keys = ("trees", "network", "trees-q", "network-q")
    rows = [
        [row["seen"], f"{row['numbers']:,}", *(f"{row[key]:.4f}" for key in keys)]
        for row in result["rows"]
    ]
    header = (
        "what is seen",
        "numbers",
        "trees",
        "network",
        "trees with the quantizer",
        "network with the quantizer",
    )
    lead = (
        "Two learners on hand-made numbers and on what backbones make of "
        f"{result['blocks']['train']:,} blocks of Stage 2."
    )
    return Section(
        title, lead, [Table("Macro-F1 on the validation blocks.", header, "lrrrrr", rows)]
    )


def mystery_section(result: Json, title: str, number: str) -> Section:
    """The checkpoints that lost half their F1."""
    rows = [
        [key, each["what"], f"{each['live']:.4f}", f"{each['reloaded']:.4f}",
         f"{each['reloaded'] - each['live']:+.4f}",
         "passes" if each["passes_the_studys_check"] else "fails", _shortened(each["resadapt"])]
        for key, each in result["cases"].items()
    ]  # fmt: skip
    blocks, tolerance = result["blocks"], result["tolerance_of_the_study"]
    top = 1.1 * max(
        record[key]
        for records in result["curves"].values()
        for record in records
        for key in ("live", "reloaded")
    )
    pictures = []
    for place, (name, records) in enumerate(result["curves"].items()):
        figure = draw_reloads({name: records}, None, "")
        figure.axes[0].set_ylim(0, top)
        last = records[-1]
        alt = (
            f"{name}: in epoch {last['epoch']} the live model has {last['live']:.4f} and the "
            f"reloaded one {last['reloaded']:.4f}."
        )
        pictures.append(plot(figure, f"{number}-reload{place}", alt, f"Macro-F1 by epoch: {name}."))
    header = (
        "",
        "what happened",
        "F1 live",
        "F1 reloaded",
        "change",
        "the study's check",
        "what resadapt says",
    )
    caption = (
        f"Each way to lose F1. The study's check lets any difference up to {tolerance:g} pass, and "
        "an F1 is at most 1."
    )
    lead = (
        f"How checkpoints lost their F1 at the reload: Stage 2 on {blocks['train']:,} blocks, "
        f"measured on {blocks['val']:,}."
    )
    return Section(title, lead, [Table(caption, header, "llrrrll", rows), Pictures(pictures)])


def study_section(made: Json) -> Section:
    """With what and by which commands a results folder was made."""
    rows = [
        [name, command, f"{made['seconds'][name]:,.0f}" if name in made["seconds"] else "-"]
        for name, command in made["commands"].items()
    ]
    total = sum(made["seconds"].values())
    parts: list[Part] = [
        Facts([(name, str(value)) for name, value in made["made_with"].items()]),
        Table(
            f"The commands in their order, and the seconds they took: {total:,.0f} in all.",
            ("step", "command", "seconds"),
            "lcr",
            rows,
        ),
    ]
    return Section("How it was made", "All figures on this page come from these commands.", parts)


def _variants(variants: dict[str, Json], split: str) -> Table:
    def spread(score: Json) -> Sequence[str]:
        # One seed has no deviation: a zero would claim one.
        return f"{score['mean']:.4f}", f"{score['deviation']:.4f}" if len(
            score["values"]
        ) > 1 else "-"

    classes = list(next(iter(variants.values()))["per_class"])
    rows = [
        [name, each["about"], f"{each['parameters']:,}", str(len(each["macro_f1"]["values"])),
         *spread(each["macro_f1"]),
         *(f"{each['per_class'][label]:.3f}" for label in classes)]
        for name, each in variants.items()
    ]  # fmt: skip
    header = ("variant", "what it is", "trained parameters", "seeds", "macro-F1", "s.d.",
              *(f"F1 {label}" for label in classes))  # fmt: skip
    caption = f"Variants on the {split} blocks; s.d. is the standard deviation over seeds."
    return Table(caption, header, "llrrrr" + "r" * len(classes), rows)


def _parameters(metrics: Json) -> Table:
    counts, blocks = metrics["parameters"], metrics["blocks"]
    rows = [[name, f"{counts[name]:,}"] for name in ("adapters", "head", "trainable")]
    rows += [[f"{split} blocks", f"{blocks[split]:,}"] for split in ("train", "val")]
    file = metrics["file"]
    return Table(
        "Trained parameters and blocks.",
        ("", "count"),
        "lr",
        [*rows, [f"bytes of {file['name']}", f"{file['bytes']:,}"]],
    )


def _proof(best: Json) -> Sequence[Part]:
    """The checks of the kept epoch's file; nothing where there was no proof."""
    if "proof" not in best:
        return ()
    proof = best["proof"]
    live, reloaded, difference = (
        proof[f"macro_f1_{key}"] for key in ("live", "reloaded", "difference")
    )
    text = (
        f"When the file of epoch {best['epoch']} was written, it was loaded into a fresh model. On "
        f"{proof['blocks']:,} blocks the live model had macro-F1 {live:.6f}, the reloaded one "
        f"{reloaded:.6f}: a difference of {difference:g}."
    )
    rows = [[name, outcome] for name, outcome in proof["checks"].items()]
    return Note(text, _PROOF), Table(
        "Checks of the kept epoch's file.", ("check", "outcome"), "lo", rows
    )


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1000:.1f} kB"


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
