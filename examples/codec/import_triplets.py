"""Turn the study tool's raw files into train.pt, val.pt and test.pt.

The raw files hold the samples, labels and quantizers of each sequence. The script says which kinds
the labels have, and which stages cannot be trained on them.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from av1partition.atomic_folder import check_free, new_folder
from av1partition.command_line import run
from av1partition.data.label_kinds import describe_kinds
from av1partition.data.raw_triplets import join, open_triplet, sequence_names
from av1partition.data.splits import check_not_empty, split_by_name
from av1partition.data.study_layout import write_study_file
from tqdm import tqdm

logger = logging.getLogger(__name__)


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--input-dir",
        type=Path,
        required=True,
        help="folder with intra_raw_blocks/, labels/ and qps/",
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        required=True,
        help="new folder in the study's layout, for --dataset-dir",
    )
    names = "sequences, by name or pattern, as 'crowd_*'"
    parser.add_argument(
        "--val", nargs="+", required=True, metavar="SEQ", help=f"validation {names}"
    )
    parser.add_argument(
        "--test",
        nargs="+",
        default=[],
        metavar="SEQ",
        help=f"test {names} (default: none); the rest is train",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Check every sequence, then write the splits."""
    options = parse_options(argv)
    check_free(options.output_dir)
    names = sequence_names(options.input_dir)
    splits = split_by_name(names, options.val, options.test, "sequence")
    check_not_empty(splits, "sequence")
    triplets = {
        name: open_triplet(options.input_dir, name)
        for name in tqdm(names, desc="checking", unit="sequence")
    }
    with new_folder(options.output_dir) as folder:
        for split, members in splits.items():
            if members:
                blocks = join([triplets[name] for name in members])
                write_study_file(blocks, folder / f"{split}.pt")
                logger.info("%s: %d blocks of %s", split, len(blocks), ", ".join(members))
                for line in describe_kinds(blocks, learn=split == "train"):
                    logger.info("  %s", line)


if __name__ == "__main__":
    run(main)
