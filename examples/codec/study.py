"""The whole experiment, from two Stage 1 trainings to the results folder.

What is done already is not done again.
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ablation
import diagnosis
import evaluate
import families
import mystery
import run_pipeline
import torch
import train_stage1
import train_stage3
from av1partition import accept
from av1partition.command_line import run
from av1partition.evaluation.html_report import write_report
from av1partition.evaluation.reports import write_json

HERE = Path(__file__).resolve().parent
# What is committed of a run folder; models and training states are not.
KEPT = ("*.json", "*.md", "*.png")
# Stage 2 of the pipeline is this variant of the ablation, and Stage 3 is trained with its flags,
# where they apply.
STAGE2 = "kinds-v2-rare"
ADAPTED = (
    "--use-adapters --adapter-layers layer3 layer4 --quantizer --epochs 4 "
    "--batch-size 256 --weight-decay 0.01 --lr-adapter 1e-3 --lr-head 1e-3"
)
log = logging.getLogger("av1partition")


@dataclass(frozen=True)
class Step:
    """One command of the study.

    Attributes:
        name: Also its folder among the results.
        main: The script's.
        arguments: Its command line, split at blanks; ``{runs}`` stands for the folder of all runs,
            ``{jobs}`` for how many runs go on at once.
        finished: The last file that it writes, below the folder of all runs; None: it knows itself
            what is left to do.
        folder: Of which JSON, tables and pictures are kept, below the folder of all runs.
    """

    name: str
    main: Callable[[Sequence[str]], None]
    arguments: str
    finished: str | None
    folder: str


def steps() -> Iterator[Step]:
    """The study, in its order."""
    own = "--epochs 8 --batch-size 256"
    kinds = (
        "--fine --all-kinds --quantizer --augment --epochs 6 --batch-size 256 --lr 1e-3 "
        "--weight-decay 0.02"
    )
    for name, flags in (("stage1_study", own), ("stage1_kinds", kinds)):
        yield Step(
            name,
            train_stage1.main,
            f"{flags} --output-dir {{runs}}/{name}",
            f"{name}/metrics.json",
            name,
        )
    part = "--base-q-idx 80 --blocks 12000"
    flags = f"--stage1-model {{runs}}/stage1_study/stage1.pt {part} --output-dir {{runs}}/mystery"
    yield Step("mystery", mystery.main, flags, "mystery/mystery.md", "mystery")
    yield Step(
        "ablation", ablation.main, "--runs-dir {runs} --final --jobs {jobs}", None, "ablation"
    )
    both = "{runs}/stage1_study/stage1.pt {runs}/stage1_kinds/stage1.pt"
    flags = f"--stage1-models {both} --output-dir {{runs}}/diagnosis"
    yield Step("diagnosis", diagnosis.main, flags, "diagnosis/diagnosis.md", "diagnosis")
    yield Step(
        "families",
        families.main,
        "--runs-dir {runs} --jobs {jobs}",
        "families/families.md",
        "families",
    )
    for name, stage1, variant, baseline in (
        ("stage2_study", "stage1_study", "v1", "frozen"),
        ("stage2", "stage1_kinds", STAGE2, "kinds-frozen-rare"),
    ):
        folder = f"ablation/{variant}/seed0"
        where = f"--output-dir {{runs}}/{folder} --baseline-dir {{runs}}/ablation/{baseline}/seed0"
        flags = f"--stage1-model {{runs}}/{stage1}/stage1.pt {where}"
        yield Step(name, evaluate.main, flags, f"{folder}/evaluation.json", folder)
    on_kinds = "--stage1-model {runs}/stage1_kinds/stage1.pt"
    stage2 = f"--stage2-model {{runs}}/ablation/{STAGE2}/seed0/adapters.pt"
    # A fifth of misrouted blocks; for RECT a little less, because Stage 2 sends it no more of the
    # training blocks wrongly.
    for kind, seeds, share in (("rect", "0", "0.15"), ("ab", "0 1 2", "0.2")):
        for folder, injected in (
            ("stage3", ""),
            ("stage3_robust", f" --noise-injection {share} {stage2}"),
        ):
            flags = (
                f"{on_kinds} {ADAPTED} --kind {kind} --seeds {seeds}{injected} "
                f"--output-dir {{runs}}/{folder}"
            )
            finished = f"{folder}/{kind}/seed{seeds[-1]}/metrics.json"
            yield Step(
                f"{folder}_{kind}", train_stage3.main, flags, finished, f"{folder}/{kind}/seed0"
            )
    for name, folder, split in (
        ("pipeline_val", "stage3", "val"),
        ("pipeline_robust_val", "stage3_robust", "val"),
        ("pipeline_test", "stage3", "test"),
    ):
        several = " ".join(f"{{runs}}/{folder}/ab/seed{seed}/adapters.pt" for seed in (0, 1, 2))
        rect = f"--stage3-rect-model {{runs}}/{folder}/rect/seed0/adapters.pt"
        flags = (
            f"{on_kinds} {stage2} {rect} --stage3-ab-models {several} --split {split} "
            f"--output-dir {{runs}}/{name}"
        )
        yield Step(name, run_pipeline.main, flags, f"{name}/pipeline.json", name)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, and copy what is to be kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = [step.name for step in steps()]
    parser.add_argument(
        "--runs-dir",
        type=Path,
        default=HERE.parents[1] / "runs" / "study",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--results-dir", type=Path, default=HERE / "results", help="default: %(default)s"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=names,
        metavar="STEP",
        default=names,
        help=f"of {', '.join(names)}",
    )
    parser.add_argument(
        "--jobs",
        type=accept.whole,
        default=os.cpu_count() or 1,
        help="runs of the ablation at once (default: %(default)s)",
    )
    options = parser.parse_args(argv)
    # Blocks are small: a second thread gains little, and the number of threads may change the last
    # bits.
    torch.set_num_threads(1)
    for step in steps():
        if step.name in options.only and not (
            step.finished and (options.runs_dir / step.finished).exists()
        ):
            log.info("%s", step.name)
            _run(step, options.runs_dir, options.jobs)
    _keep(options.runs_dir, options.results_dir, options.jobs)
    log.info("%s", write_report(options.results_dir, runs_dir=options.runs_dir))


def _run(step: Step, runs: Path, jobs: int) -> None:
    """Run a step, and add its time to what interrupted attempts at it took."""
    arguments = [part.format(runs=runs, jobs=jobs) for part in step.arguments.split()]
    file = runs / "seconds.json"
    started = time.monotonic()
    try:
        step.main(arguments)
    finally:
        seconds = json.loads(file.read_text()) if file.exists() else {}
        seconds[step.name] = round(seconds.get(step.name, 0) + time.monotonic() - started)
        write_json(file, seconds)


def _keep(runs: Path, results: Path, jobs: int) -> None:
    """Copy JSON, tables and pictures of the finished steps, and say with what they were made."""
    results.mkdir(parents=True, exist_ok=True)
    for step in steps():
        for file in (
            file for pattern in KEPT for file in sorted((runs / step.folder).glob(pattern))
        ):
            target = results / step.name / file.name
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "threads": 1,
    }
    commands = {
        step.name: (
            f"python {Path(inspect.getsourcefile(step.main) or '').name} {step.arguments}"
        ).format(runs="runs/study", jobs=jobs)
        for step in steps()
    }
    seconds = (
        json.loads((runs / "seconds.json").read_text()) if (runs / "seconds.json").exists() else {}
    )
    write_json(
        results / "study.json", {"made_with": versions, "commands": commands, "seconds": seconds}
    )
    lines = ["| part | command | minutes |", "|---|---|---|"]
    for name, command in commands.items():
        lines.append(
            f"| {name} | `{command}` | "
            f"{f'{seconds[name] / 60:.1f}' if name in seconds else 'not run'} |"
        )
    (results / "study.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(main)
