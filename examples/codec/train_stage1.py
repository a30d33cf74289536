"""Train Stage 1: is a 16x16 block coded whole (NONE) or divided (PARTITION)?"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from av1partition.data.blocks import STAGE1_CLASSES
from av1partition.data.study_layout import load_dataset
from av1partition.evaluation.metrics import best_record, classification_metrics
from av1partition.evaluation.reports import draw_learning_curves, write_json
from av1partition.models.stage1_files import save_stage1
from av1partition.models.stages import Stage1Model, build_backbone
from av1partition.training.loop import Schedule, Trainee, add_common_options, fit
from av1partition.training.state import Config, digest_of_data
from torch import Tensor
from torch.optim import AdamW
from torch.utils.data import TensorDataset
from torchvision.models import ResNet18_Weights

STAGE1_FILE = "stage1.pt"


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_options(parser)
    parser.add_argument("--epochs", type=int, default=30, help="default: %(default)s")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/stage1"), help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (default: %(default)s)")
    parser.add_argument("--attention", action="store_true", help="the attention backbone instead of the plain one")
    parser.add_argument("--imagenet", action="store_true", help="start from ImageNet weights (downloads them)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train Stage 1 and write its file, history and metrics."""
    options = parse_options(argv)
    output: Path = options.output_dir
    output.mkdir(parents=True, exist_ok=True)
    train, val = (TensorDataset(blocks.samples, blocks.labels_stage1) for blocks in load_dataset(options.dataset_dir))
    torch.manual_seed(options.seed)
    weights = ResNet18_Weights.IMAGENET1K_V1 if options.imagenet else None
    model = Stage1Model(build_backbone("attention" if options.attention else "plain", weights)).to(options.device)
    divided = train.tensors[1].sum()
    positive_weight = (len(train) - divided) / divided

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        # Twice as many blocks are divided as not; weighing them down makes 0 the right threshold for macro-F1.
        weight = positive_weight.to(logits.device)
        return F.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype), pos_weight=weight)

    def keep_best(record: dict[str, Any], logits: Tensor) -> None:
        save_stage1(model, output / STAGE1_FILE)
        metrics = classification_metrics(logits, val.tensors[1], STAGE1_CLASSES)
        write_json(output / "metrics.json", {"epoch": record["epoch"], **metrics})

    trainee = Trainee(
        model,
        loss,
        AdamW(model.parameters(), lr=options.lr, weight_decay=1e-4),
        capture=lambda: {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()},
        restore=model.load_state_dict,
        keep_best=keep_best,
    )
    schedule = Schedule(options.epochs, options.batch_size, options.seed, options.device, options.num_workers)
    config: Config = {
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "seed": options.seed,
        "device": options.device.type,
        "lr": options.lr,
        "attention": options.attention,
        "imagenet": options.imagenet,
        "data": digest_of_data(train, val),
    }
    history = fit(trainee, train, val, schedule, state_file=output / "training_state.pt", config=config)
    write_json(output / "history.json", history)
    draw_learning_curves(history, output / "learning_curves.png", "Stage 1: NONE or PARTITION")
    best = best_record(history)
    print(f"Stage 1: macro-F1 {best['macro_f1']:.4f} at epoch {best['epoch']}, written to {output / STAGE1_FILE}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
