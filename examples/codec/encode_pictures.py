"""Make a data folder from pictures: code each with libaom, and read back how it was divided.

Each picture is coded at each quantizer, and the data are how libaom divided every 16x16 node.

Needs two programs of libaom, aomenc and inspect; without them the error says how to get them.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from av1partition import accept
from av1partition.atomic_folder import check_free, new_folder
from av1partition.command_line import run
from av1partition.data.blocks import DatasetError, cut_blocks
from av1partition.data.frame_folder import Coded, write_frame_folder
from av1partition.data.label_kinds import describe_kinds
from av1partition.data.libaom import (
    CPU_USED,
    HIGHEST_CPU_USED,
    HIGHEST_CQ_LEVEL,
    Libaom,
    find_libaom,
)
from av1partition.data.partition_trees import labels_of_nodes
from av1partition.data.pictures import LUMA, Crop, crop_of, find_pictures, read_planes, y4m_10bit
from av1partition.data.splits import split_by_name_or_share
from tqdm import tqdm

logger = logging.getLogger(__name__)


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pictures", type=Path, nargs="+", help="picture files, or folders of them")
    parser.add_argument(
        "--output-dir", type=Path, required=True, help="new data folder, for --dataset-dir"
    )
    parser.add_argument(
        "--aomenc", default="aomenc", help="libaom's encoder (default: %(default)s, on the PATH)"
    )
    parser.add_argument(
        "--inspect",
        default="inspect",
        help="libaom's example program (default: %(default)s, on the PATH)",
    )
    parser.add_argument(
        "--cq-level",
        type=int,
        nargs="+",
        default=[20, 32, 43, 55],
        metavar="CQ",
        help="0..63 (default: 20 32 43 55)",
    )
    parser.add_argument(
        "--cpu-used",
        type=int,
        default=CPU_USED,
        metavar="SPEED",
        help=f"libaom's speed, 0..{HIGHEST_CPU_USED} (default: %(default)s). A faster one costs "
        "kinds: at 3 HORZ, VERT and 1:4 are half as many, at 4 AB is rare too, from 5 on there is "
        "neither AB nor 1:4",
    )
    parser.add_argument(
        "--downscale",
        type=accept.whole,
        default=1,
        metavar="N",
        help="by this factor; 2 or more for pictures from lossy files",
    )
    split = "a share of the pictures, or names or patterns of pictures"
    parser.add_argument(
        "--val", nargs="+", default=["0.15"], metavar="SHARE|NAME", help=f"{split} (default: 0.15)"
    )
    parser.add_argument(
        "--test", nargs="+", default=["0.15"], metavar="SHARE|NAME", help=f"{split} (default: 0.15)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the choice of the shares (default: 0)"
    )
    parser.add_argument(
        "--jobs",
        type=accept.whole,
        default=os.cpu_count() or 1,
        help="encoders at a time (default: one per processor)",
    )
    parser.add_argument(
        "--work-dir",
        type=Path,
        help="keeps the coded streams, to go on after an interruption (default: OUTPUT_DIR.work)",
    )
    options = parser.parse_args(argv)
    if wrong := [cq for cq in options.cq_level if not 0 <= cq <= HIGHEST_CQ_LEVEL]:
        parser.error(
            f"--cq-level is {wrong[0]}, expected 0..{HIGHEST_CQ_LEVEL}; it is libaom's cq level, "
            "not base_q_idx"
        )
    if not 0 <= options.cpu_used <= HIGHEST_CPU_USED:
        parser.error(
            f"--cpu-used is {options.cpu_used}, expected 0..{HIGHEST_CPU_USED}, the speeds of "
            "libaom's good quality"
        )
    options.work_dir = options.work_dir or options.output_dir.with_name(
        options.output_dir.name + ".work"
    )
    return options


def code(libaom: Libaom, name: str, path: Path, crop: Crop, cq_level: int, work_dir: Path) -> Coded:
    """Code a picture at a cq level, unless that was done before, and derive its labels."""
    y4m = y4m_10bit(read_planes(path, crop))
    # By what went in, so that a changed picture, crop or encoder never meets an old stream.
    made_of = hashlib.sha256(" ".join([libaom.version, *libaom.flags]).encode() + y4m).hexdigest()[
        :16
    ]
    stream = work_dir / f"{name}_cq{cq_level}_{made_of}.ivf"
    if not stream.exists():
        libaom.encode(y4m, cq_level, stream)
    try:
        sizes, base_q_idx = libaom.block_sizes(stream)
        width, height = crop.size_wh
        if sizes.shape != (height // 4, width // 4, 2):
            raise DatasetError(
                f"it is of {4 * sizes.shape[1]}x{4 * sizes.shape[0]}, expected {width}x{height}"
            )
        nodes = labels_of_nodes(sizes)
    except DatasetError as error:
        raise DatasetError(
            f"{stream}: cannot be used, delete it and give the command again ({error})"
        ) from error
    return Coded(name, cq_level, base_q_idx, nodes)


def main(argv: Sequence[str] | None = None) -> None:
    """Check all there is to check, code the pictures, then write the folder."""
    options = parse_options(argv)
    check_free(options.output_dir)
    pictures = find_pictures(options.pictures)
    splits = split_by_name_or_share(
        list(pictures), options.val, options.test, options.seed, "picture"
    )
    crops = {
        name: crop_of(path, options.downscale)
        for name, path in tqdm(pictures.items(), desc="checking", unit="picture")
    }
    libaom = find_libaom(options.aomenc, options.inspect, options.cpu_used)
    options.work_dir.mkdir(parents=True, exist_ok=True)
    jobs = [(name, cq) for name in pictures for cq in sorted(set(options.cq_level))]
    # Threads do: each waits for an encoder, which is a process of its own.
    with ThreadPoolExecutor(options.jobs) as pool:
        futures = [
            pool.submit(code, libaom, name, pictures[name], crops[name], cq, options.work_dir)
            for name, cq in jobs
        ]
        try:
            coded = [
                each.result()
                for each in tqdm(
                    as_completed(futures), desc="encoding", unit="stream", total=len(futures)
                )
            ]
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    if not any(each.nodes for each in coded):
        raise DatasetError(
            "no picture has a 16x16 node, all blocks are larger; pass lower --cq-level, or "
            "pictures with more in them"
        )
    about = {
        "description": "AV1 16x16 intra partition decisions of libaom",
        "encoder": {
            "version": libaom.version,
            "command_line": " ".join(
                ["aomenc", *libaom.flags, "--cq-level=CQ", "-q", "-o", "FRAME.ivf", "FRAME.y4m"]
            ),
        },
        "luma": LUMA,
        "downscale": options.downscale,
    }
    with new_folder(options.output_dir) as folder:
        lumas = ((name, read_planes(pictures[name], crop)[0]) for name, crop in crops.items())
        write_frame_folder(folder, lumas, crops, splits, coded, about)
        for split, blocks in cut_blocks(folder).items():
            logger.info("%s: %d nodes of %d pictures", split, len(blocks), len(splits[split]))
            for line in describe_kinds(blocks, learn=split == "train"):
                logger.info("  %s", line)
    logger.info(
        "%s is ready; %s holds the coded streams and may be deleted",
        options.output_dir,
        options.work_dir,
    )


if __name__ == "__main__":
    run(main)
