"""Write a page of what a run folder, or a folder of run folders, holds.

One HTML file that needs nothing beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from av1partition import accept
from av1partition.command_line import run
from av1partition.data.blocks import DATA_DIR
from av1partition.evaluation.html_report import write_report


def main(argv: Sequence[str] | None = None) -> None:
    """Write it, and print where it is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "folder",
        type=Path,
        help="of a training, pipeline, ablation or mystery run, or with such folders in it",
    )
    parser.add_argument(
        "--dataset-dir",
        type=Path,
        default=DATA_DIR,
        help="frames to draw on (default: the data beside the scripts)",
    )
    parser.add_argument(
        "--runs-dir",
        type=Path,
        help="where predictions.npz is, by the same folder names, if not in the folder itself",
    )
    parser.add_argument("--output", type=Path, help="the page (default: report.html in the folder)")
    parser.add_argument(
        "--frames",
        type=accept.whole_or_none,
        default=4,
        help="to draw on the page, at most (default: %(default)s)",
    )
    options = parser.parse_args(argv)
    page = write_report(
        options.folder,
        options.output,
        dataset_dir=options.dataset_dir,
        runs_dir=options.runs_dir,
        frames=options.frames,
    )
    print(page)


if __name__ == "__main__":
    run(main)
