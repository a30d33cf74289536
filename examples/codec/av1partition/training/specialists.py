"""Training a specialist of Stage 2 or 3 from options to a finished run folder."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from av1partition.data.tasks import Task
from av1partition.evaluation.metrics import best_record, classification_metrics
from av1partition.evaluation.reports import draw_confusion_matrix, draw_learning_curves, write_json
from av1partition.models.backbones import FEATURES
from av1partition.models.cascade import Cascade, adapt
from av1partition.models.stage1_files import load_stage1
from av1partition.training.focal_loss import ClassBalancedFocalLoss
from av1partition.training.loop import Schedule, add_common_options, fit, predict_logits
from av1partition.training.state import Config, digest_of_data
from av1partition.training.trainees import (
    ADAPTER_FILE,
    HEAD_FILE,
    adapter_trainee,
    frozen_features,
    head_trainee,
    reload_specialist,
)
from resadapt import count_parameters

BETA, GAMMA = 0.9999, 2.0


def add_specialist_options(parser: argparse.ArgumentParser) -> None:
    """The options that the training scripts of all specialists have."""
    add_common_options(parser)
    parser.add_argument("--stage1-model", type=Path, required=True, help="Stage 1 file; tells which backbone it is")
    parser.add_argument("--epochs", type=int, default=50, help="default: %(default)s")
    parser.add_argument("--use-adapters", action="store_true", help="without it: the frozen baseline, head only")
    parser.add_argument("--adapter-bottleneck", type=int, default=64, help="hidden units (default: %(default)s)")
    parser.add_argument("--adapter-dropout", type=float, default=0.1, help="default: %(default)s")
    parser.add_argument("--lr-adapter", type=float, default=1e-4, help="default: %(default)s")
    parser.add_argument("--lr-head", type=float, default=5e-4, help="default: %(default)s")


def train_specialist(
    task: Task, train: TensorDataset, val: TensorDataset, options: argparse.Namespace, seed: int, output: Path
) -> dict[str, Any]:
    """Train a specialist and write its file, history, metrics and pictures.

    Args:
        task: Its question.
        train: Blocks and class numbers.
        val: Blocks and class numbers.
        options: As `add_specialist_options` has them read.
        seed: Of the start, of the order of the blocks and of dropout.
        output: The run's folder; a run that was interrupted there goes on.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        Stage1FileError: The Stage 1 file is not one.
        TrainingStateError: The folder holds another run.
    """
    device: torch.device = options.device
    output.mkdir(parents=True, exist_ok=True)
    stage1 = load_stage1(options.stage1_model)
    config = _config(options, task, seed, train, val)
    loss = ClassBalancedFocalLoss(train.tensors[1].bincount(minlength=len(task.classes)), BETA, GAMMA).to(device)
    schedule = Schedule(options.epochs, options.batch_size, seed, device, options.num_workers)
    torch.manual_seed(seed)
    if options.use_adapters:
        cascade = adapt(Cascade(stage1), task, options.adapter_bottleneck, options.adapter_dropout).to(device)
        rates = {"lr_adapter": options.lr_adapter, "lr_head": options.lr_head}
        trainee = adapter_trainee(cascade, task, loss, val, output, device, stage1_file=options.stage1_model, **rates)
        counts = count_parameters(cascade)
        parameters = {"trainable": counts.trainable, "adapters": counts.adapters, "head": counts.head}
        data = (train, val)
    else:
        head = nn.Linear(FEATURES, len(task.classes)).to(device)
        trainee = head_trainee(head, loss, output, lr_head=options.lr_head)
        size = sum(parameter.numel() for parameter in head.parameters())
        parameters = {"trainable": size, "adapters": 0, "head": size}
        data = (frozen_features(stage1.backbone, train, device), frozen_features(stage1.backbone, val, device))
    history = fit(trainee, *data, schedule, state_file=output / "training_state.pt", config=config)
    # The metrics are those of the file, not of the model in memory, which is that of the last epoch.
    logits = predict_logits(reload_specialist(options.stage1_model, task, output).to(device), val.tensors[0], device)
    file = output / (ADAPTER_FILE if options.use_adapters else HEAD_FILE)
    metrics = {
        **classification_metrics(logits, val.tensors[1], task.classes),
        "task": task.key,
        "best_epoch": best_record(history)["epoch"],
        "parameters": parameters,
        "file": {"name": file.name, "bytes": file.stat().st_size},
        "blocks": {"train": len(train), "val": len(val)},
    }
    write_json(output / "history.json", history)
    write_json(output / "metrics.json", metrics)
    title = f"{task.title}, {'adapters and head' if options.use_adapters else 'frozen baseline, head only'}"
    draw_learning_curves(history, output / "learning_curves.png", title)
    draw_confusion_matrix(metrics, output / "confusion_matrix.png", f"{title}\nmacro-F1 {metrics['macro_f1']:.4f}")
    print(f"{title}: macro-F1 {metrics['macro_f1']:.4f} at epoch {metrics['best_epoch']}, written to {file}")
    return metrics


def _config(options: argparse.Namespace, task: Task, seed: int, *data: TensorDataset) -> Config:
    # All that decides the outcome, and nothing else: a run may resume with other workers or from another folder.
    names = ("epochs", "batch_size", "use_adapters", "adapter_bottleneck", "adapter_dropout", "lr_adapter", "lr_head")
    config: Config = {name: getattr(options, name) for name in names}
    config["task"], config["seed"], config["device"] = task.key, seed, options.device.type
    config["stage1_model"] = hashlib.sha256(options.stage1_model.read_bytes()).hexdigest()
    config["data"] = digest_of_data(*data)
    return config
