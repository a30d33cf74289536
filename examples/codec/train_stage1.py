"""Train Stage 1: is a 16x16 block coded whole (NONE) or divided (PARTITION)?"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from av1partition import accept
from av1partition.command_line import run
from av1partition.data.study_layout import load_dataset
from av1partition.data.symmetries import turn_at_random
from av1partition.data.tasks import KINDS, STAGE1
from av1partition.evaluation.calibration import choose_threshold, fit_temperature
from av1partition.evaluation.metrics import best_record, classification_metrics
from av1partition.evaluation.reports import draw_confusion_matrix, draw_learning_curves, write_json
from av1partition.models.backbones import BackboneKind, build_backbone
from av1partition.models.cascade import Stage1Model, UncalibratedAnswers
from av1partition.models.stage1_files import load_stage1, save_stage1
from av1partition.training.loop import Schedule, Trainee, add_common_options, fit, predict_logits
from av1partition.training.state import Config, digest_of_data
from torch import Tensor, logit
from torch.optim import AdamW
from torch.utils.data import TensorDataset
from torchvision.models import ResNet18_Weights

STAGE1_FILE = "stage1.pt"


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_options(parser)
    parser.add_argument(
        "--seed", type=accept.seed, default=0, help="same seed, same files (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=accept.whole, default=30, help="default: %(default)s")
    parser.add_argument(
        "--output-dir", type=Path, default=Path("runs/stage1"), help="default: %(default)s"
    )
    parser.add_argument(
        "--lr", type=accept.rate, default=1e-3, help="learning rate (default: %(default)s)"
    )
    parser.add_argument(
        "--weight-decay", type=accept.rate, default=1e-4, help="default: %(default)s"
    )
    backbone = parser.add_mutually_exclusive_group()
    backbone.add_argument(
        "--attention", action="store_true", help="the attention backbone instead of the plain one"
    )
    backbone.add_argument(
        "--fine",
        action="store_true",
        help="a 3x3 stem of stride 1 instead of the plain one's 7x7 of stride 2",
    )
    parser.add_argument(
        "--imagenet", action="store_true", help="start from ImageNet weights (downloads them)"
    )
    parser.add_argument(
        "--all-kinds",
        action="store_true",
        help="learn all ten kinds; PARTITION is then any but NONE",
    )
    parser.add_argument("--quantizer", action="store_true", help="the head sees the quantizer")
    parser.add_argument(
        "--augment",
        action="store_true",
        help="turn each training block by one of the eight symmetries at random",
    )
    options = parser.parse_args(argv)
    if options.fine and options.imagenet:
        parser.error("--imagenet has no weights for --fine")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Train Stage 1 and write its file, history and metrics."""
    options = parse_options(argv)
    output: Path = options.output_dir
    task = KINDS if options.all_kinds else STAGE1
    blocks = load_dataset(options.dataset_dir)
    for each in blocks:
        each.check(STAGE1, every_class=True)
    output.mkdir(parents=True, exist_ok=True)
    train, val = (each.data(task) for each in blocks)
    torch.manual_seed(options.seed)
    weights = ResNet18_Weights.IMAGENET1K_V1 if options.imagenet else None
    kind: BackboneKind = "attention" if options.attention else "fine" if options.fine else "plain"
    model = Stage1Model(
        build_backbone(kind, weights), kinds=options.all_kinds, quantizer=options.quantizer
    )
    # Convolutions on small maps with many channels are faster with the channels last.
    model = model.to(memory_format=torch.channels_last).to(options.device)
    divided = (train.tensors[1] > 0).sum()
    positive_weight = (len(train) - divided) / divided

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        if options.all_kinds:
            return F.cross_entropy(logits, labels)
        # Twice as many blocks are divided as not; weighing them down makes 0 the right threshold
        # for macro-F1.
        weight = positive_weight.to(logits.device)
        return F.binary_cross_entropy_with_logits(
            logits[:, 0], labels.to(logits.dtype), pos_weight=weight
        )

    def keep_best(_: dict[str, Any], __: Tensor) -> None:
        save_stage1(model, output / STAGE1_FILE)

    trainee = Trainee(
        UncalibratedAnswers(model),
        loss,
        AdamW(model.parameters(), lr=options.lr, weight_decay=options.weight_decay, fused=True),
        capture=lambda: {
            name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()
        },
        restore=model.load_state_dict,
        keep_best=keep_best,
    )
    augment = turn_at_random(task) if options.augment else None
    schedule = Schedule(
        options.epochs,
        options.batch_size,
        options.seed,
        options.device,
        options.num_workers,
        augment,
    )
    config: Config = {
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "seed": options.seed,
        "device": options.device.type,
        "lr": options.lr,
        "weight_decay": options.weight_decay,
        "backbone": kind,
        "imagenet": options.imagenet,
        "all_kinds": options.all_kinds,
        "quantizer": options.quantizer,
        "augment": options.augment,
        "data": digest_of_data(train, val),
    }
    history = fit(
        trainee, train, val, schedule, state_file=output / "training_state.pt", config=config
    )
    metrics = _calibrate(output / STAGE1_FILE, blocks[1].data(STAGE1), options.device)
    best = best_record(history)
    write_json(output / "history.json", history)
    write_json(output / "metrics.json", {"best_epoch": best["epoch"], **metrics})
    draw_learning_curves(history, output / "learning_curves.png", "Stage 1: NONE or PARTITION")
    draw_confusion_matrix(
        metrics, output / "confusion_matrix.png", f"Stage 1\nmacro-F1 {metrics['macro_f1']:.4f}"
    )
    print(
        f"Stage 1: macro-F1 {metrics['macro_f1']:.4f} at epoch {best['epoch']}, written to "
        f"{output / STAGE1_FILE}"
    )


def _calibrate(path: Path, val: TensorDataset, device: torch.device) -> dict[str, Any]:
    """Give the best epoch's file a temperature and a threshold, chosen on the validation blocks."""
    samples, labels = val.tensors
    model = load_stage1(path)
    model.temperature.fill_(1)
    model.temperature.fill_(
        fit_temperature(predict_logits(model.to(device), samples, device), labels)
    )
    logits = predict_logits(model, samples, device)
    model.threshold = choose_threshold(logits[:, 0].sigmoid(), labels)
    save_stage1(model, path)
    answers = logits - logit(torch.tensor(model.threshold))
    return {
        **classification_metrics(answers, labels, STAGE1.classes),
        "temperature": float(model.temperature),
        "threshold": model.threshold,
        "negative_log_likelihood": float(
            F.binary_cross_entropy_with_logits(logits[:, 0], labels.float())
        ),
    }


if __name__ == "__main__":
    run(main)
