"""Train Stage 2: is a divided 16x16 block SPLIT, RECT or AB? On Stage 1's frozen backbone."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from av1partition import accept
from av1partition.command_line import run
from av1partition.data.study_layout import load_dataset
from av1partition.data.tasks import STAGE2
from av1partition.training.specialists import (
    add_specialist_options,
    check_specialist_options,
    train_specialist,
)


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_specialist_options(parser)
    parser.add_argument(
        "--seed", type=accept.seed, default=0, help="same seed, same files (default: %(default)s)"
    )
    parser.add_argument(
        "--output-dir", type=Path, default=Path("runs/stage2"), help="default: %(default)s"
    )
    options = parser.parse_args(argv)
    check_specialist_options(parser, options)
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Train Stage 2 and write its file, history, metrics and pictures."""
    options = parse_options(argv)
    train, val = (
        blocks.coded_at(options.base_q_idx) for blocks in load_dataset(options.dataset_dir)
    )
    if options.blocks is not None:
        train = train.of(STAGE2).part(options.blocks)
    train_specialist(
        STAGE2,
        train.data(STAGE2, every_class=True),
        val.data(STAGE2),
        options,
        options.seed,
        options.output_dir,
    )


if __name__ == "__main__":
    run(main)
