"""Variants compared.

Summaries over seeds, the choice on validation, the verdicts on test, and the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from av1partition.data.tasks import STAGE2
from av1partition.evaluation.spread import over_seeds, paired_difference

# Test pictures decide two questions: what adapters add to the frozen head, and whether a network
# beats the trees.
RIVALS = {"study": "frozen", "beyond": "trees-q"}
GAIN_PLANNED = 0.015
GAIN_BEYOND = 0.02
EVERY_CLASS = 0.40
RELOAD = 0.01


def summary(about: Mapping[str, str], each: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is known of a variant, over its seeds.

    Args:
        about: What it is, for people.
        each: For each seed the scores on a split, with the number of trained parameters.
    """
    return {
        **about,
        "parameters": each[0]["parameters"],
        "macro_f1": over_seeds([one["macro_f1"] for one in each]),
        "per_class": {
            name: over_seeds([one["per_class"][name]["f1"] for one in each])["mean"]
            for name in STAGE2.classes
        },
        "reload_difference": max(
            (one["reload_difference"] for one in each if one["reload_difference"] is not None),
            default=None,
        ),
    }


def choose(validation: Mapping[str, Any], group: str) -> str:
    """The adapter variant of a group with the highest macro-F1 of its first seed.

    Raises:
        SystemExit: None has been scored.
    """
    candidates = [
        (each["macro_f1"]["values"][0], name)
        for name, each in validation.items()
        if each["group"] == group and "--use-adapters" in each["flags"]
    ]
    if not candidates:
        raise SystemExit(
            f"no adapter variant of the group {group!r} has been scored, so none can be chosen; "
            "leave out --only"
        )
    return max(candidates)[1]


def decide(
    test: Mapping[str, Any], chosen: Mapping[str, str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Differences to the rivals on the test pictures, and what they say of what was expected.

    Args:
        test: For each variant its summary.
        chosen: For each group the variant that was chosen on validation.

    Returns:
        For each group the paired difference; and the verdicts: what was expected, what came out,
        whether it holds.
    """
    differences = {}
    for group, name in chosen.items():
        ours, theirs = (test[each]["macro_f1"]["values"] for each in (name, RIVALS[group]))
        differences[group] = {
            "chosen": name,
            "rival": RIVALS[group],
            **paired_difference(ours, theirs),
        }
    name, classes = chosen["study"], test[chosen["study"]]["per_class"]
    weakest = min(classes, key=lambda label: float(classes[label]))
    reload = max(
        each["reload_difference"] for each in test.values() if each["reload_difference"] is not None
    )
    verdicts = [
        _verdict(
            f"adapters of the study ({name})", "the frozen head", differences["study"], GAIN_PLANNED
        ),
        {
            "expected": f"every class of {name} with an F1 above {EVERY_CLASS:.0%}",
            "found": f"the weakest is {weakest} with {classes[weakest]:.1%}",
            "holds": classes[weakest] > EVERY_CLASS,
        },
        {
            "expected": f"F1 after the reload within {RELOAD:.0%}",
            "found": f"the largest difference is {reload:g}",
            "holds": reload <= RELOAD,
        },
        _verdict(
            f"beyond the study ({chosen['beyond']})",
            "the trees with the quantizer",
            differences["beyond"],
            GAIN_BEYOND,
        ),
    ]
    return differences, verdicts


def _verdict(ours: str, theirs: str, difference: dict[str, Any], least: float) -> dict[str, Any]:
    expected = f"{ours} at least {100 * least:g} points over {theirs}"
    return {
        "expected": expected,
        "found": _points(difference),
        "holds": difference["mean"] >= least,
    }


def _points(difference: dict[str, Any]) -> str:
    mean, low, high = (100 * difference[key] for key in ("mean", "low", "high"))
    return f"{mean:+.2f} points ({difference['confidence']:.0%} interval {low:+.2f} to {high:+.2f})"


def table(result: Mapping[str, Any]) -> str:
    """The result in Markdown."""
    lines: list[str] = []
    for split in ("validation", "test"):
        if not result[split]:
            continue
        lines += ["", f"Stage 2 on the {split} blocks, macro-F1", ""]
        lines += [
            "| variant | | trained parameters | seeds | macro-F1 | SPLIT | RECT | AB |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for name, each in result[split].items():
            classes = " | ".join(f"{each['per_class'][label]:.3f}" for label in STAGE2.classes)
            score = each["macro_f1"]
            lines.append(
                f"| {name} | {each['about']} | {each['parameters']:,} | {len(score['values'])} | "
                f"{_spread(score)} | {classes} |"
            )
    for each in result["differences"].values():
        lines += [
            "",
            f"{each['chosen']} against {each['rival']} on the test blocks: {_points(each)}",
        ]
    if result["verdicts"]:
        lines += ["", "| expected | found | |", "|---|---|---|"]
        lines += [
            f"| {each['expected']} | {each['found']} | {'holds' if each['holds'] else 'fails'} |"
            for each in result["verdicts"]
        ]
    return "\n".join(lines).strip()


def _spread(score: dict[str, Any]) -> str:
    """A mean, and the standard deviation where there are several seeds: one value has none."""
    return f"{score['mean']:.4f}" + (
        f" ± {score['deviation']:.4f}" if len(score["values"]) > 1 else ""
    )
