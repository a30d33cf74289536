"""Compare the families of adapters on Stage 2, beside what they compete with.

They have about 1 % and 4 % of the backbone's parameters.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ablation
from ablation import Job
from av1partition.command_line import run
from av1partition.evaluation.reports import draw_ablation, write_json
from av1partition.evaluation.spread import over_seeds, paired_difference
from av1partition.training.variants import BALANCED, Variant

SEEDS = (0, 1, 2)
RATES = ("3e-4", "1e-3", "3e-3")
BACKBONE = 11_170_240  # parameters of the ResNet-18 on one channel, without a head
FULL, FROZEN = "fine-tuning", "frozen"
FINALISTS = 2
SOME = 16_000  # blocks, in the first table
CONVOLUTIONS = "--adapter-layers 'layer?.?.conv?'"
BLOCKS = "--adapter-layers 'layer?.?'"
NORMS = "--adapter-layers bn1 'layer?.?.bn?' 'layer?.?.downsample.1'"


def methods(blocks: int | None = SOME) -> Iterator[Variant]:
    """All rows of a table.

    The group is the part whose learning rate is chosen, besides the head's. None is all blocks.
    """
    learn = (
        f"{f'--blocks {blocks} ' if blocks else ''}--batch-size 256 --weight-decay 0.01 {BALANCED}"
    )
    yield Variant(FROZEN, "frozen head, 20 epochs", "head", "stage1_study", f"{learn} --epochs 20")
    yield Variant(
        FULL,
        "full fine-tuning",
        "backbone",
        "stage1_study",
        f"{learn} --epochs 4 --full-fine-tuning",
    )
    for name, about, flags in (
        ("affine", "norms: own affine", "--adapter-layers --adapter-norm affine"),
        ("stats", "norms: own statistics", "--adapter-layers --adapter-norm stats"),
        (
            "affine-stats",
            "norms: own affine and statistics",
            "--adapter-layers --adapter-norm affine+stats",
        ),
        ("ssf", "ssf at every norm", f"--adapter-family ssf {NORMS}"),
        (
            "series-1",
            "series behind layer1-3, 0.8 %",
            "--adapter-family series --adapter-layers layer1 layer2 layer3",
        ),
        (
            "series-4",
            "series behind layer1-4, 3.1 %",
            "--adapter-family series --adapter-layers layer1 layer2 layer3 layer4",
        ),
        (
            "parallel-1",
            "parallel at 3x3 of layer1-2, 0.7 %",
            "--adapter-family parallel --adapter-layers 'layer[12].?.conv?'",
        ),
        (
            "parallel-4",
            "parallel at 3x3 of layer1-3, 2.7 %",
            "--adapter-family parallel --adapter-layers 'layer[123].?.conv?'",
        ),
        *(
            (
                f"{name}-{percent}",
                f"{about}, {percent} %",
                f"{flags} --adapter-budget {BACKBONE * percent // 100}",
            )
            for percent in (1, 4)
            for name, about, flags in (
                ("pooled", "pooled behind layer1-4", "--adapter-family pooled"),
                ("bottleneck", "bottleneck behind blocks", f"--adapter-family bottleneck {BLOCKS}"),
                ("mona", "mona behind blocks", f"--adapter-family mona {BLOCKS}"),
                ("conv", "conv-parallel at 3x3", f"--adapter-family conv {CONVOLUTIONS}"),
                ("lora", "lora at 3x3", f"--adapter-family lora {CONVOLUTIONS}"),
                (
                    "dora",
                    "dora at 3x3",
                    f"--adapter-family lora --adapter-options dora=True {CONVOLUTIONS}",
                ),
                (
                    "lora-norms",
                    "lora at 3x3, own norms",
                    f"--adapter-family lora {CONVOLUTIONS} --adapter-norm affine+stats",
                ),
            )
            if percent == 4 or name not in ("dora", "lora-norms")
        ),
    ):
        yield Variant(
            name, about, "adapter", "stage1_study", f"{learn} --epochs 4 --use-adapters {flags}"
        )


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    ablation.add_common_options(parser, [method.name for method in methods()])
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Compare all with some blocks, and the best of them with all blocks.

    Write tables and a picture.
    """
    options = parse_options(argv)
    some = compare(
        {method: RATES for method in methods() if method.name in options.only}, "", options
    )
    best = {name: (some[name]["rate"],) for name in finalists(some)}
    finals = {method: best[method.name] for method in methods(None) if method.name in best}
    result = {"some": some, "all": compare(finals, "all/", options)}
    folder: Path = options.runs_dir / "families"
    write_json(folder / "families.json", result)
    (folder / "families.md").write_text(table(result) + "\n", encoding="utf-8")
    drawn = {name: {"about": row["about"], "macro_f1": row["val"]} for name, row in some.items()}
    draw_ablation(
        drawn, folder / "families.png", f"Families on Stage 2 with {SOME:,} blocks, validation"
    )
    print(table(result))


def compare(
    rates: Mapping[Variant, Sequence[str]], prefix: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Choose each method's learning rate on validation with the first seed, then run the others."""
    chosen = list(rates)

    def job(method: Variant, rate: str, seed: int) -> Job:
        return Job(
            at_rate(method, rate, prefix),
            seed,
            options.runs_dir,
            options.dataset_dir,
            str(options.device),
            "families",
        )

    ablation.work_all(
        [job(method, rate, SEEDS[0]) for method in chosen for rate in rates[method]], "val", options
    )
    tried = {
        method.name: {
            rate: ablation.scores(job(method, rate, SEEDS[0]), "val")["macro_f1"]
            for rate in rates[method]
        }
        for method in chosen
    }
    best = {name: max(each, key=each.__getitem__) for name, each in tried.items()}
    finals = {
        method.name: [job(method, best[method.name], seed) for seed in SEEDS] for method in chosen
    }
    for split in ("val", "test"):
        ablation.work_all([each for jobs in finals.values() for each in jobs], split, options)
    return {
        method.name: {
            "rates": tried[method.name],
            "rate": best[method.name],
            **_row(method, finals[method.name]),
        }
        for method in chosen
    }


def finalists(result: Mapping[str, Any]) -> list[str]:
    """The ways that go on to all blocks, at the rates chosen.

    The best families on validation, and what they compete with.
    """
    families = sorted(result.keys() - {FROZEN, FULL}, key=lambda name: -result[name]["val"]["mean"])
    return [*(name for name in (FROZEN, FULL) if name in result), *families[:FINALISTS]]


def at_rate(method: Variant, rate: str, prefix: str = "") -> Variant:
    """A method with one learning rate for all that it trains."""
    own = "" if method.group == "head" else f"--lr-{method.group} {rate} "
    return replace(
        method, name=f"{prefix}{method.name}/{rate}", flags=f"{method.flags} {own}--lr-head {rate}"
    )


def _row(method: Variant, jobs: Sequence[Job]) -> dict[str, Any]:
    scores = {split: [ablation.scores(job, split) for job in jobs] for split in ("val", "test")}
    return {
        "about": method.about,
        "flags": method.flags,
        "parameters": scores["val"][0]["parameters"],
        **{
            split: over_seeds([each["macro_f1"] for each in several])
            for split, several in scores.items()
        },
    }


def table(result: Mapping[str, Any]) -> str:
    """Both comparisons in Markdown, the best on validation first.

    Differences on the test pictures are paired by seeds.
    """
    return "\n\n".join(
        (f"With {SOME:,} blocks", _table(result["some"]), "With all blocks", _table(result["all"]))
    )


def _table(result: Mapping[str, Any]) -> str:
    lines = [
        "| | trained | rate | validation | test | against the frozen head, test | of full "
        "fine-tuning, test |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in sorted(result.items(), key=lambda item: -item[1]["val"]["mean"]):
        spread = [
            f"{row[split]['mean']:.4f} ± {row[split]['deviation']:.4f}" for split in ("val", "test")
        ]
        gain = share = ""
        if name != FROZEN and FROZEN in result:
            difference = paired_difference(row["test"]["values"], result[FROZEN]["test"]["values"])
            mean, low, high = (100 * difference[key] for key in ("mean", "low", "high"))
            gain = f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"
        if name != FULL and FULL in result:
            share = f"{row['test']['mean'] / result[FULL]['test']['mean']:.1%}"
        cells = (row["about"], f"{row['parameters']:,}", row["rate"], *spread, gain, share)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
