"""Train Stage 3.

Which way is a RECT block cut, or which of its four kinds is an AB block? On Stage 1's frozen
backbone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from av1partition import accept
from av1partition.command_line import run
from av1partition.data.noise import with_misrouted
from av1partition.data.study_layout import load_dataset
from av1partition.data.tasks import AB, RECT, STAGE2
from av1partition.models.cascade import Answers
from av1partition.models.specialist_files import open_cascade
from av1partition.training.loop import predict_logits
from av1partition.training.specialists import (
    add_specialist_options,
    check_specialist_options,
    train_specialist,
)

KINDS = {task.key: task for task in (RECT, AB)}


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_specialist_options(parser)
    parser.add_argument("--kind", choices=KINDS, required=True, help="which specialist")
    parser.add_argument(
        "--seeds",
        type=accept.seed,
        nargs="+",
        default=[0],
        help="one run for each, in a folder of its own (default: 0)",
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("runs/stage3"),
        help="default: %(default)s, in it KIND/seedN",
    )
    parser.add_argument(
        "--noise-injection",
        type=float,
        default=0.0,
        metavar="P",
        help="share of the training blocks that are ones which Stage 2 wrongly sends here "
        "(default: none)",
    )
    parser.add_argument(
        "--stage2-model", type=Path, help="adapter file of the Stage 2 that misroutes them"
    )
    options = parser.parse_args(argv)
    check_specialist_options(parser, options)
    if not 0 <= options.noise_injection < 1:
        parser.error(f"--noise-injection is {options.noise_injection}, expected 0 <= P < 1")
    if options.noise_injection and options.stage2_model is None:
        parser.error("--noise-injection needs --stage2-model, whose errors are injected")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Train a Stage 3 specialist, once for each seed."""
    options = parse_options(argv)
    task = KINDS[options.kind]
    blocks, val = (each.coded_at(options.base_q_idx) for each in load_dataset(options.dataset_dir))
    routed = None
    if options.noise_injection:
        stage2 = Answers(
            open_cascade(options.stage1_model, {STAGE2: [options.stage2_model]})[0], STAGE2
        ).to(options.device)
        divided = blocks.of(STAGE2)
        routed = predict_logits(stage2, divided.inputs(), options.device).argmax(dim=1)
    own = blocks if options.blocks is None else blocks.of(task).part(options.blocks)
    for seed in options.seeds:
        train = own.data(task, every_class=True)
        if routed is not None:
            strangers = divided.take(
                (routed == STAGE2.classes.index(task.key.upper())) & (divided.labels(task) < 0)
            )
            train = with_misrouted(
                train, strangers.inputs(), len(task.classes), options.noise_injection, seed
            )
        train_specialist(
            task,
            train,
            val.data(task),
            options,
            seed,
            options.output_dir / task.key / f"seed{seed}",
        )


if __name__ == "__main__":
    run(main)
