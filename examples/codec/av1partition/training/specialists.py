"""Training a specialist of Stage 2 or 3 from options to a finished run folder."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from av1partition import accept
from av1partition.data.symmetries import turn_at_random
from av1partition.data.tasks import Task
from av1partition.evaluation.metrics import best_record, classification_metrics
from av1partition.evaluation.reports import draw_confusion_matrix, draw_learning_curves, write_json
from av1partition.models.backbones import build_backbone, kind_of
from av1partition.models.cascade import Answers, Cascade, adapt, head_name, new_head
from av1partition.models.specialist_files import (
    ADAPTER_FILE,
    HEAD_FILE,
    NETWORK_FILE,
    reload_specialist,
)
from av1partition.models.stage1_files import load_stage1
from av1partition.training.focal_loss import ClassBalancedFocalLoss
from av1partition.training.loop import Schedule, add_common_options, fit, predict_logits
from av1partition.training.state import Config, digest_of_data
from av1partition.training.trainees import (
    behind_front,
    frozen_features,
    head_on_features,
    network_trainee,
    set_trainee,
)
from resadapt import count_parameters, list_families

GAMMA = 2.0
FILES = {"adapters": ADAPTER_FILE, "head": HEAD_FILE, "network": NETWORK_FILE}
TITLES = {
    "adapters": "adapters and head",
    "head": "frozen baseline, head only",
    "network": "whole network",
}


def add_specialist_options(parser: argparse.ArgumentParser) -> None:
    """The options that the training scripts of all specialists have."""
    add_common_options(parser)
    parser.add_argument(
        "--stage1-model", type=Path, required=True, help="Stage 1 file; tells which backbone it is"
    )
    parser.add_argument("--epochs", type=accept.whole, default=50, help="default: %(default)s")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--use-adapters",
        action="store_true",
        help="without any of these: the frozen baseline, head only",
    )
    what.add_argument(
        "--full-fine-tuning",
        action="store_true",
        help="train the whole network, from Stage 1's weights",
    )
    what.add_argument(
        "--from-scratch", action="store_true", help="train the whole network, from random weights"
    )
    families = sorted(family.name for family in list_families())
    parser.add_argument(
        "--adapter-family", default="pooled", choices=families, help="default: %(default)s"
    )
    parser.add_argument(
        "--adapter-bottleneck",
        type=accept.whole,
        default=64,
        help="their width, if any (default: %(default)s)",
    )
    parser.add_argument(
        "--adapter-dropout", type=float, help="default: the family's own, 0.1 for pooled"
    )
    norms = ("frozen", "affine", "stats", "affine+stats")
    parser.add_argument(
        "--adapter-norm",
        default="frozen",
        choices=norms,
        help="norms of the set's own (default: %(default)s)",
    )
    parser.add_argument(
        "--adapter-layers",
        nargs="*",
        help="modules of the backbone, globs too; without any: norms alone "
        "(default: its four stages)",
    )
    parser.add_argument(
        "--adapter-budget",
        type=accept.whole,
        metavar="N",
        help="most parameters of all adapters, whose widths follow",
    )
    parser.add_argument(
        "--adapter-options",
        type=accept.option,
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="of the family, as dora=True",
    )
    parser.add_argument(
        "--quantizer",
        action="store_true",
        help="the head sees the quantizer, and has a hidden layer",
    )
    parser.add_argument(
        "--base-q-idx",
        type=int,
        metavar="Q",
        help="train and validate on the blocks of this quantizer only",
    )
    parser.add_argument(
        "--blocks",
        type=accept.whole,
        metavar="N",
        help="most blocks to train on, the same for every seed",
    )
    parser.add_argument(
        "--augment",
        action="store_true",
        help="turn each training block by one of the eight symmetries at random",
    )
    parser.add_argument("--lr-adapter", type=accept.rate, default=1e-4, help="default: %(default)s")
    parser.add_argument("--lr-head", type=accept.rate, default=5e-4, help="default: %(default)s")
    parser.add_argument(
        "--lr-backbone",
        type=accept.rate,
        default=1e-4,
        help="where it is trained (default: %(default)s)",
    )
    parser.add_argument(
        "--beta",
        type=float,
        default=0.9999,
        help="of the loss: nearer to 1, rare classes count more (default: %(default)s)",
    )
    parser.add_argument(
        "--weight-decay", type=accept.rate, default=1e-4, help="default: %(default)s"
    )


def check_specialist_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse options that contradict each other, before any data is read."""
    if not 0 <= options.beta < 1:
        parser.error(f"--beta is {options.beta}, expected 0 <= beta < 1")
    for name in ("layers", "budget", "options"):
        if getattr(options, f"adapter_{name}") and not options.use_adapters:
            parser.error(f"--adapter-{name} goes with --use-adapters")
    if options.augment and _what(options) == "head":
        parser.error(
            "--augment does not go with the frozen baseline, whose features are computed once"
        )


def train_specialist(
    task: Task,
    train: TensorDataset,
    val: TensorDataset,
    options: argparse.Namespace,
    seed: int,
    output: Path,
) -> dict[str, Any]:
    """Train a specialist and write its file, history, metrics and pictures.

    Args:
        task: Its question.
        train: Inputs and class numbers.
        val: Inputs and class numbers.
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
    cascade = Cascade(load_stage1(options.stage1_model))
    config = _config(options, task, seed, train, val)
    loss = ClassBalancedFocalLoss(
        train.tensors[1].bincount(minlength=len(task.classes)), options.beta, GAMMA
    ).to(device)
    augment = turn_at_random(task) if options.augment else None
    schedule = Schedule(
        options.epochs, options.batch_size, seed, device, options.num_workers, augment
    )
    what = _what(options)
    rates = {"lr_head": options.lr_head, "weight_decay": options.weight_decay}
    torch.manual_seed(seed)
    data: Sequence[TensorDataset] = (train, val)
    file = output / FILES[what]
    if what != "network":
        size, dropout = options.adapter_bottleneck, options.adapter_dropout
        layers = options.adapter_layers if what == "adapters" else ()
        kind = {}
        if what == "adapters":
            kind = {
                "family": options.adapter_family,
                "norm": options.adapter_norm,
                "budget": options.adapter_budget,
            }
            kind |= dict(options.adapter_options)
        adapt(cascade, task, size, dropout, layers=layers, quantizer=options.quantizer, **kind).to(
            device
        )
        rates["lr_adapter"] = options.lr_adapter
        model: nn.Module = Answers(cascade, task)
        if what == "head":
            model = head_on_features(cascade, task, quantizer=options.quantizer)
            data = [
                frozen_features(cascade.backbone, each, device, quantizer=options.quantizer)
                for each in data
            ]
        elif augment is None:
            model, data = behind_front(cascade, task, data, device)
        trainee = set_trainee(
            model, cascade, task, loss, val, file, device, stage1_file=options.stage1_model, **rates
        )
        counts = count_parameters(cascade)
        parameters = {
            "trainable": counts.trainable,
            "adapters": counts.adapters,
            "head": counts.head,
        }
    else:
        head = new_head(task, options.quantizer).to(device)
        size = sum(parameter.numel() for parameter in head.parameters())
        parameters = {"trainable": size, "adapters": 0, "head": size}
        if options.from_scratch:
            cascade.stage1.backbone = build_backbone(kind_of(cascade.backbone)).to(
                memory_format=torch.channels_last
            )
        cascade.set_submodule(head_name(task, options.quantizer), head)
        trainee = network_trainee(
            cascade.to(device), task, head, loss, output, lr_backbone=options.lr_backbone, **rates
        )
        parameters["trainable"] += sum(
            parameter.numel() for parameter in cascade.backbone.parameters()
        )
    output.mkdir(parents=True, exist_ok=True)
    history = fit(
        trainee, data[0], data[1], schedule, state_file=output / "training_state.pt", config=config
    )
    # The metrics are those of the file, not of the model in memory, which is that of the last
    # epoch.
    logits = predict_logits(
        reload_specialist(options.stage1_model, task, output).to(device), val.tensors[0], device
    )
    metrics = {
        **classification_metrics(logits, val.tensors[1], task.classes),
        "task": task.key,
        "trained": what,
        "best_epoch": best_record(history)["epoch"],
        "parameters": parameters,
        "file": {"name": file.name, "bytes": file.stat().st_size},
        "blocks": {"train": len(train), "val": len(val)},
    }
    write_json(output / "history.json", history)
    write_json(output / "metrics.json", metrics)
    title = f"{task.title}, {TITLES[what]}"
    draw_learning_curves(history, output / "learning_curves.png", title)
    draw_confusion_matrix(
        metrics, output / "confusion_matrix.png", f"{title}\nmacro-F1 {metrics['macro_f1']:.4f}"
    )
    print(
        f"{title}: macro-F1 {metrics['macro_f1']:.4f} at epoch {metrics['best_epoch']}, written to "
        f"{file}"
    )
    return metrics


def _what(options: argparse.Namespace) -> str:
    if options.use_adapters:
        return "adapters"
    return "network" if options.full_fine_tuning or options.from_scratch else "head"


def _config(options: argparse.Namespace, task: Task, seed: int, *data: TensorDataset) -> Config:
    # All that decides the outcome, and nothing else: a run may resume with other workers or from
    # another folder.
    indifferent = (
        "dataset_dir",
        "stage1_model",
        "stage2_model",
        "output_dir",
        "num_workers",
        "device",
        "seed",
        "seeds",
        "kind",
    )
    config: Config = {
        name: value for name, value in vars(options).items() if name not in indifferent
    }
    config["adapter_layers"] = " ".join(options.adapter_layers or ())
    config["adapter_options"] = repr(sorted(options.adapter_options))
    config["task"], config["seed"], config["device"] = task.key, seed, options.device.type
    config["stage1_model"] = hashlib.sha256(options.stage1_model.read_bytes()).hexdigest()
    config["data"] = digest_of_data(*data)
    return config
