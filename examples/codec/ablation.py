"""Compare the variants of Stage 2.

Train what is not trained yet, choose on validation, decide on the test pictures.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch
import train_stage2
from av1partition import accept
from av1partition.command_line import run
from av1partition.data.blocks import DATA_DIR, SPLITS, BlockSet
from av1partition.data.study_layout import load_dataset
from av1partition.data.tasks import STAGE2
from av1partition.evaluation.comparison import RIVALS, choose, decide, summary, table
from av1partition.evaluation.metrics import classification_metrics
from av1partition.evaluation.reports import draw_ablation, write_json
from av1partition.models.specialist_files import reload_specialist
from av1partition.training.loop import predict_logits
from av1partition.training.state import TrainingStateError
from av1partition.training.trees import fit_trees, tree_probabilities
from av1partition.training.variants import VARIANTS, Variant
from torch import Tensor, nn
from tqdm import tqdm

log = logging.getLogger("av1partition")

FINAL_SEEDS = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Job:
    """One variant with one seed.

    Attributes:
        variant: Which.
        seed: Of everything random.
        runs: Folder of all runs; the Stage 1 runs are in it.
        dataset: As the training scripts take it.
        device: Where to compute.
        table: Of which its folder is a part.
    """

    variant: Variant
    seed: int
    runs: Path
    dataset: Path
    device: str
    table: str = "ablation"

    @property
    def folder(self) -> Path:
        """Of this variant and seed."""
        return self.runs / self.table / self.variant.name / f"seed{self.seed}"

    @property
    def stage1(self) -> Path:
        """The Stage 1 file that a network stands on."""
        return self.runs / self.variant.stage1 / "stage1.pt"

    def parts(self) -> list[tuple[Path, list[str]]]:
        """The folder of each of its training runs, and the flags that it has alone.

        Trees, which take seconds, have none.
        """
        if self.variant.trees:
            return []
        if not self.variant.quantizers:
            return [(self.folder, [])]
        return [(self.folder / f"q{q}", ["--base-q-idx", str(q)]) for q in self.variant.quantizers]


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seeds", type=accept.seed, nargs="+", default=[0], help="of all variants (default: 0)"
    )
    parser.add_argument(
        "--final",
        action="store_true",
        help=f"then the chosen ones and their rivals with seeds {FINAL_SEEDS}, "
        "on the test pictures",
    )
    add_common_options(parser, [variant.name for variant in VARIANTS])
    return parser.parse_args(argv)


def add_common_options(parser: argparse.ArgumentParser, names: list[str]) -> None:
    """Data, device, a choice of names, and what `work_all` reads: where, and how many at once."""
    parser.add_argument(
        "--runs-dir",
        type=Path,
        default=Path("runs/study"),
        help="with the Stage 1 runs (default: %(default)s)",
    )
    parser.add_argument(
        "--dataset-dir", type=Path, default=DATA_DIR, help="default: the data beside the scripts"
    )
    parser.add_argument(
        "--device", type=accept.device, default=accept.default_device(), help="default: %(default)s"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=names,
        metavar="NAME",
        default=names,
        help=f"of {', '.join(names)}",
    )
    parser.add_argument(
        "--engine", choices=("here", "local", "slurm"), default="here",
        help="where the runs go: one after another, or through submitit (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--jobs",
        type=accept.whole,
        default=1,
        help="with --engine here, runs at once, of one thread each (default: 1)",
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Train, compare all that is trained, and write ``ablation.json``, a table and a picture."""
    options = parse_options(argv)
    common = (options.runs_dir, options.dataset_dir, str(options.device))
    jobs = [
        Job(variant, seed, *common)
        for variant in VARIANTS
        if variant.name in options.only
        for seed in options.seeds
    ]
    _scored(common)  # What was scored earlier is checked before anything is trained.
    work_all(jobs, "val", options)
    result: dict[str, Any] = {"validation": {}, "test": {}, "differences": {}, "verdicts": []}
    for variant, each in _scored(common):
        result["validation"][variant.name] = summary(variant.described, each)
    if options.final:
        chosen = {group: choose(result["validation"], group) for group in RIVALS}
        names = dict.fromkeys([*chosen.values(), *RIVALS.values()])
        finalists = {
            name: [Job(variant, seed, *common) for seed in FINAL_SEEDS]
            for variant in VARIANTS
            if (name := variant.name) in names
        }
        work_all([job for jobs in finalists.values() for job in jobs], "test", options)
        result["test"] = {
            name: summary(jobs[0].variant.described, [scores(job, "test") for job in jobs])
            for name, jobs in finalists.items()
        }
        result["differences"], result["verdicts"] = decide(result["test"], chosen)
    folder: Path = options.runs_dir / "ablation"
    write_json(folder / "ablation.json", result)
    (folder / "ablation.md").write_text(table(result) + "\n", encoding="utf-8")
    draw_ablation(result["validation"], folder / "ablation.png", "Stage 2 on the validation blocks")
    print(table(result))


def train(job: Job) -> None:
    """Train the runs of a job that are not finished."""
    for folder, own in job.parts():
        if (folder / "metrics.json").exists():
            continue
        log.info("%s, seed %d: %s", job.variant.name, job.seed, folder)
        where = [
            "--dataset-dir",
            str(job.dataset),
            "--stage1-model",
            str(job.stage1),
            "--output-dir",
            str(folder),
        ]
        train_stage2.main(
            [*where, "--device", job.device, "--seed", str(job.seed), *job.variant.arguments, *own]
        )


def scores(job: Job, split: str) -> dict[str, Any]:
    """A job's scores on a split; kept in its folder.

    Raises:
        TrainingStateError: Those that are there are of other data, another Stage 1 or other flags.
    """
    path = job.folder / f"{split}.json"
    made_of = {
        "data": _digest(job.dataset),
        "stage1": _digest(job.stage1) if job.variant.stage1 else "",
        "flags": job.variant.flags,
    }
    if not path.exists():
        job.folder.mkdir(parents=True, exist_ok=True)
        (blocks,) = (each.of(STAGE2) for each in load_dataset(job.dataset, [split]))
        answers = torch.empty(len(blocks), len(STAGE2.classes))
        for asked, answer in _answerers(job, blocks):
            answers[asked] = answer(blocks.take(asked).inputs())
        result = classification_metrics(answers.log(), blocks.labels(STAGE2), STAGE2.classes)
        about = {
            "parameters": _parameters(job),
            "reload_difference": _reload_difference(job),
            "made_of": made_of,
        }
        write_json(path, {**result, **about})
    content: dict[str, Any] = json.loads(path.read_text())
    # Scores of before this was written down do not say it.
    if other := [
        key for key, value in content.get("made_of", made_of).items() if value != made_of[key]
    ]:
        raise TrainingStateError(
            f"{path}: was made with other {', '.join(other)}; delete {job.folder}, or choose "
            "another --runs-dir"
        )
    return content


def work(job: Job, split: str) -> None:
    """Train a job and score it."""
    train(job)
    scores(job, split)


def work_all(jobs: list[Job], split: str, options: argparse.Namespace) -> None:
    """Do what is not done yet: here, in a few processes, or through submitit."""
    jobs = [job for job in jobs if not (job.folder / f"{split}.json").exists()]
    if options.engine != "here":
        import submitit  # noqa: PLC0415 - an optional extra

        executor = submitit.AutoExecutor(options.runs_dir / "jobs", cluster=options.engine)
        for running in executor.map_array(partial(work, split=split), jobs):
            running.result()
    elif options.jobs == 1:
        for job in jobs:
            work(job, split)
    else:
        with ProcessPoolExecutor(
            options.jobs, get_context("spawn"), initializer=_start_worker
        ) as pool:
            futures = [pool.submit(work, job, split) for job in jobs]
            try:
                for one in tqdm(as_completed(futures), total=len(jobs), unit=" runs", disable=None):
                    one.result()
            except BaseException:
                # What waits would be done all the same before an error, or Ctrl-C, got through.
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _start_worker() -> None:
    """One thread, ended by Ctrl-C and by the end of its parent.

    A worker left alone would meet those of the next start.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := parent_process():
        parent.join()
        os._exit(1)


def _scored(common: tuple[Path, Path, str]) -> list[tuple[Variant, list[dict[str, Any]]]]:
    """The scores of every variant that has some, of now or earlier, in the order of its seeds."""
    found = []
    for variant in VARIANTS:
        files = (common[0] / "ablation" / variant.name).glob("seed*/val.json")
        if seeds := sorted(int(file.parent.name.removeprefix("seed")) for file in files):
            found.append((variant, [scores(Job(variant, seed, *common), "val") for seed in seeds]))
    return found


@cache
def _digest(path: Path) -> str:
    """SHA-256 of a file; of a data folder, of what says which blocks are in it."""
    tables = [
        path / name
        for name in ("MANIFEST.json", "nodes.csv.gz", *(f"{split}.pt" for split in SPLITS))
    ]
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else [file for file in tables if file.exists()]:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _answerers(job: Job, blocks: BlockSet) -> Iterator[tuple[Tensor, Callable[[Tensor], Tensor]]]:
    """What gives the probabilities of which blocks (a mask)."""
    device, variant = torch.device(job.device), job.variant
    if variant.trees:
        quantizer = "--quantizer" in variant.arguments
        trees = fit_trees(
            load_dataset(job.dataset, ["train"])[0].data(STAGE2), quantizer=quantizer, seed=job.seed
        )
        yield blocks.qps >= 0, partial(tree_probabilities, trees, quantizer=quantizer)
        return
    for (folder, _), base_q_idx in zip(job.parts(), variant.quantizers or (None,), strict=True):
        model = reload_specialist(job.stage1, STAGE2, folder).to(device)
        asked = blocks.qps >= 0 if base_q_idx is None else blocks.qps == base_q_idx
        yield asked, partial(_softmax, model, device)


def _softmax(model: nn.Module, device: torch.device, inputs: Tensor) -> Tensor:
    return predict_logits(model, inputs, device).softmax(dim=1)


def _parameters(job: Job) -> int:
    """How many are trained, over all runs of the job; 0 for trees."""
    return sum(
        json.loads((folder / "metrics.json").read_text())["parameters"]["trainable"]
        for folder, _ in job.parts()
    )


def _reload_difference(job: Job) -> float | None:
    """The largest difference of macro-F1 between live and reloaded model in a kept epoch's proof.

    None: there are no proofs.
    """
    differences: list[float] = []
    for folder, _ in job.parts():
        history = json.loads((folder / "history.json").read_text())
        differences += [
            record["proof"]["macro_f1_difference"] for record in history if "proof" in record
        ]
    return max(differences, default=None)


if __name__ == "__main__":
    run(main)
