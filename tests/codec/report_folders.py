"""Run folders for the tests of the report: the files that the scripts leave, of invented figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from av1partition.data.blocks import BlockSet
from av1partition.data.tasks import AB, RECT, SPECIALISTS, STAGE1, STAGE2, Task
from av1partition.evaluation.cascade_analysis import analyse
from av1partition.evaluation.metrics import classification_metrics
from av1partition.evaluation.pipeline import Predictions
from av1partition.evaluation.spread import over_seeds, paired_difference

CHECKS = {"file": "passed", "tensors": "failed", "recorded outputs": "not checked"}


def dump(content: object, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def training(
    folder: Path, task: Task = STAGE2, trained: str | None = "adapters", epochs: int = 3
) -> None:
    """Of Stage 1 where nothing is said to be trained; the best epoch is the second."""
    history: list[dict[str, Any]] = [
        {
            "epoch": epoch,
            "train_loss": 1 / epoch,
            "val_loss": 1.1 / epoch,
            "val_accuracy": 0.5,
            "macro_f1": 0.5 - abs(epoch - 2) / 10,
        }
        for epoch in range(1, epochs + 1)
    ]
    if trained == "adapters":
        same = {"macro_f1_live": 0.25, "macro_f1_reloaded": 0.125, "macro_f1_difference": 0.125}
        history[1]["proof"] = {"blocks": 1234, **same, "checks": CHECKS}
    count = len(task.classes)
    labels = torch.arange(20 * count) % count
    logits = torch.randn(len(labels), count, generator=torch.Generator().manual_seed(0))
    metrics = {"best_epoch": 2, **classification_metrics(logits, labels, task.classes)}
    if trained is None:
        metrics |= {"temperature": 1.5, "threshold": 0.44, "negative_log_likelihood": 0.6}
    else:
        metrics |= {
            "task": task.key,
            "trained": trained,
            "parameters": {"trainable": 125635, "adapters": 124096, "head": 1539},
            "file": {"name": "adapters.pt", "bytes": 543_838},
            "blocks": {"train": 512, "val": 256},
        }
    dump(history, folder / "history.json")
    dump(metrics, folder / "metrics.json")


def pipeline(folder: Path, blocks: BlockSet, split: str) -> None:
    """Random answers, with the files that ``run_pipeline.py`` writes."""
    generator = torch.Generator().manual_seed(0)
    count = len(blocks)
    specialists = {
        task.key: torch.rand(count, len(task.classes), generator=generator) for task in SPECIALISTS
    }
    divided = torch.rand(count, generator=generator) > 0.3
    answers = specialists[STAGE2.key].argmax(dim=1)
    reached = {
        STAGE2.key: divided,
        RECT.key: divided & (answers == 1),
        AB.key: divided & (answers == 2),
    }
    kinds = torch.where(divided, torch.tensor(3), torch.tensor(0))
    kinds[reached[RECT.key]] = 1 + specialists[RECT.key].argmax(dim=1)[reached[RECT.key]]
    kinds[reached[AB.key]] = 4 + specialists[AB.key].argmax(dim=1)[reached[AB.key]]
    predictions = Predictions(divided.float(), specialists, reached, kinds)
    files = dict.fromkeys(("stage1/stage1.pt", "stage2/adapters.pt"), "0123456789abcdef" * 4)
    rates = {"one_pass": 2345.6, "one_by_one": 1234.5}
    content = {"split": split, "threshold": 0.44, "files": files, "blocks_a_second": rates}
    dump(content | analyse(blocks, predictions), folder / "pipeline.json")
    arrays = {
        "index": np.arange(count),
        "true_kind": blocks.labels_stage0.numpy(),
        "final_kind": kinds.numpy(),
    }
    np.savez_compressed(folder / "predictions.npz", **arrays)  # type: ignore[arg-type]


def ablation(folder: Path, name: str = "v1", about: str = "layer1-4, b=64") -> None:
    """Two variants on validation, one with a single seed, and both with five on test."""

    def variant(what: str, base: float, seeds: int) -> dict[str, Any]:
        scores = {"macro_f1": over_seeds([base + seed / 500 for seed in range(seeds)])}
        classes = dict.fromkeys(STAGE2.classes, base)
        return {
            "about": what,
            "group": "study",
            "flags": "--use-adapters",
            "parameters": 125635,
            **scores,
            "per_class": classes,
        }

    test = {name: variant(about, 0.5, 5), "frozen": variant("frozen head", 0.48, 5)}
    ours, theirs = (test[each]["macro_f1"]["values"] for each in (name, "frozen"))
    theirs = [value - 0.001 * place for place, value in enumerate(theirs)]
    against = {"chosen": name, "rival": "frozen", **paired_difference(ours, theirs)}
    content = {
        "validation": {name: variant(about, 0.51, 5), "frozen": variant("frozen head", 0.47, 1)},
        "test": test,
        "differences": {"study": against},
        "verdicts": [
            {"expected": "more than 1 point", "found": "2.2 points", "holds": True},
            {"expected": "a moon", "found": "none", "holds": False},
        ],
    }
    dump(content, folder / "ablation.json")


def mystery(folder: Path) -> None:
    curve = [{"epoch": epoch, "live": 0.4 + epoch / 100, "reloaded": 0.2} for epoch in (1, 2)]
    case = {
        "what": "the norms move",
        "live": 0.42,
        "reloaded": 0.2,
        "passes_the_studys_check": True,
        "resadapt": "cannot happen",
    }
    content = {
        "blocks": {"train": 300, "val": 200},
        "seed": 0,
        "tolerance_of_the_study": 1.0,
        "cases": {"a": case},
        "curves": {"norms move": curve, "resadapt": curve},
    }
    dump(content, folder / "mystery.json")


def results(folder: Path, blocks: dict[str, BlockSet]) -> None:
    """A results folder as the study leaves it, with a folder of something else in it."""
    training(folder / "stage1_study", STAGE1, trained=None)
    training(folder / "stage2")
    for split in ("val", "test"):
        pipeline_folder = folder / f"pipeline_{split}"
        pipeline_folder.mkdir(parents=True)
        pipeline(pipeline_folder, blocks[split], split)
    ablation(folder / "ablation")
    mystery(folder / "mystery")
    (folder / "notes").mkdir()
    commands = {
        name: f"python {name}.py --epochs 1"
        for name in ("stage1_study", "mystery", "ablation", "stage2", "pipeline_val")
    }
    made = {
        "made_with": {"python": "3.11.7", "torch": "2.14.1", "cores": 2},
        "commands": commands,
        "seconds": {"stage2": 1234},
    }
    dump(made, folder / "study.json")
