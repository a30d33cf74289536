"""Train Stage 2: is a divided 16x16 block SPLIT, RECT or AB? On Stage 1's frozen backbone."""

from __future__ import annotations

import argparse
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from av1partition.data.blocks import STAGE2_CLASSES, BlockSet
from av1partition.data.study_layout import load_dataset
from av1partition.evaluation.metrics import best_record, classification_metrics
from av1partition.evaluation.reports import draw_confusion_matrix, draw_learning_curves, write_json
from av1partition.models.stage1_files import load_stage1_backbone
from av1partition.models.stages import adapt_for_stage2, stage2_head
from av1partition.training.focal_loss import ClassBalancedFocalLoss
from av1partition.training.loop import Schedule, add_common_options, fit, predict_logits
from av1partition.training.state import Config, digest_of_data
from av1partition.training.trainees import (
    ADAPTER_FILE,
    HEAD_FILE,
    adapter_trainee,
    frozen_features,
    head_trainee,
    reload_stage2,
)
from torch.utils.data import TensorDataset

from resadapt import count_parameters

BETA, GAMMA = 0.9999, 2.0


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_options(parser)
    parser.add_argument("--stage1-model", type=Path, required=True, help="Stage 1 file; tells which backbone it is")
    parser.add_argument("--epochs", type=int, default=50, help="default: %(default)s")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/stage2"), help="default: %(default)s")
    parser.add_argument("--use-adapters", action="store_true", help="without it: the frozen baseline, head only")
    parser.add_argument("--adapter-bottleneck", type=int, default=64, help="hidden units (default: %(default)s)")
    parser.add_argument("--adapter-dropout", type=float, default=0.1, help="default: %(default)s")
    parser.add_argument("--lr-adapter", type=float, default=1e-4, help="default: %(default)s")
    parser.add_argument("--lr-head", type=float, default=5e-4, help="default: %(default)s")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train Stage 2 and write its file, history, metrics and pictures."""
    options = parse_options(argv)
    output, device = options.output_dir, options.device
    output.mkdir(parents=True, exist_ok=True)
    train, val = (_divided_only(blocks) for blocks in load_dataset(options.dataset_dir))
    backbone, kind = load_stage1_backbone(options.stage1_model)
    config = _config(options, train, val)
    loss = ClassBalancedFocalLoss(train.tensors[1].bincount(minlength=len(STAGE2_CLASSES)), BETA, GAMMA).to(device)
    schedule = Schedule(options.epochs, options.batch_size, options.seed, device, options.num_workers)
    torch.manual_seed(options.seed)
    if options.use_adapters:
        model = adapt_for_stage2(backbone, kind, options.adapter_bottleneck, options.adapter_dropout).to(device)
        rates = {"lr_adapter": options.lr_adapter, "lr_head": options.lr_head}
        trainee = adapter_trainee(model, loss, val, output, device, stage1_file=options.stage1_model, **rates)
        counts = count_parameters(model)
        parameters = {"trainable": counts.trainable, "adapters": counts.adapters, "head": counts.head}
        data = (train, val)
    else:
        head = stage2_head().to(device)
        trainee = head_trainee(head, loss, output, lr_head=options.lr_head)
        size = sum(parameter.numel() for parameter in head.parameters())
        parameters = {"trainable": size, "adapters": 0, "head": size}
        data = (frozen_features(backbone, train, device), frozen_features(backbone, val, device))
    history = fit(trainee, *data, schedule, state_file=output / "training_state.pt", config=config)
    title = f"Stage 2, {'adapters and head' if options.use_adapters else 'frozen baseline, head only'}"
    # The metrics are those of the file, not of the model in memory, which is that of the last epoch.
    logits = predict_logits(reload_stage2(options.stage1_model, output).to(device), val.tensors[0], device)
    metrics = classification_metrics(logits, val.tensors[1], STAGE2_CLASSES)
    file = output / (ADAPTER_FILE if options.use_adapters else HEAD_FILE)
    best = best_record(history)
    write_json(output / "history.json", history)
    write_json(
        output / "metrics.json",
        {
            **metrics,
            "best_epoch": best["epoch"],
            "parameters": parameters,
            "file": {"name": file.name, "bytes": file.stat().st_size},
            "blocks": {"train": len(train), "val": len(val)},
        },
    )
    draw_learning_curves(history, output / "learning_curves.png", title)
    draw_confusion_matrix(metrics, output / "confusion_matrix.png", f"{title}\nmacro-F1 {metrics['macro_f1']:.4f}")
    print(f"{title}: macro-F1 {metrics['macro_f1']:.4f} at epoch {best['epoch']}, written to {file}")


def _divided_only(blocks: BlockSet) -> TensorDataset:
    divided = blocks.take(blocks.labels_stage2 >= 0)
    return TensorDataset(divided.samples, divided.labels_stage2)


def _config(options: argparse.Namespace, *data: TensorDataset) -> Config:
    # All that decides the outcome, and nothing else: a run may resume with other workers or from another folder.
    names = ("epochs", "batch_size", "seed", "use_adapters", "adapter_bottleneck", "adapter_dropout")
    config: Config = {name: getattr(options, name) for name in (*names, "lr_adapter", "lr_head")}
    config["device"] = options.device.type
    config["stage1_model"] = hashlib.sha256(options.stage1_model.read_bytes()).hexdigest()
    config["data"] = digest_of_data(*data)
    return config


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
