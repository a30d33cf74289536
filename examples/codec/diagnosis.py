"""What trees see that a network lost.

The same two learners on hand-made numbers and on what each part of a backbone makes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from av1partition import accept
from av1partition.command_line import run
from av1partition.data.blocks import DATA_DIR
from av1partition.data.inputs import luma, quantizer_code
from av1partition.data.study_layout import load_dataset
from av1partition.data.tasks import STAGE2
from av1partition.evaluation.metrics import macro_f1
from av1partition.evaluation.reports import write_json
from av1partition.models.backbones import front, parts
from av1partition.models.stage1_files import load_stage1
from av1partition.training.focal_loss import ClassBalancedFocalLoss
from av1partition.training.loop import full_batches, predict_logits
from av1partition.training.state import TrainingStateError, digest_of_data
from av1partition.training.trees import block_numbers, new_trees
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from tqdm import tqdm

CPU = torch.device("cpu")
HIDDEN = 128
EPOCHS = 20
BATCH = 256
LEARNERS = ("trees", "network")
# Of maps larger than 2x2, the means of the four quarters; smaller ones as they are.
QUARTERS = 2


class Tap(nn.Module):
    """A backbone up to one of its parts: what stands there, [N, F]."""

    def __init__(self, backbone: nn.Module, end: str) -> None:
        """See the class."""
        super().__init__()
        self.backbone, self.end = backbone, end

    def forward(self, inputs: Tensor) -> Tensor:
        """From [N, 2, 16, 16]."""
        h = front(self.backbone, luma(inputs), self.end)
        return nn.functional.adaptive_avg_pool2d(h, min(QUARTERS, h.shape[-1])).flatten(1)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure each, and write ``diagnosis.json`` and a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--stage1-models",
        type=Path,
        nargs="+",
        required=True,
        help="Stage 1 files, each in a folder of its name",
    )
    parser.add_argument(
        "--dataset-dir", type=Path, default=DATA_DIR, help="default: the data beside the scripts"
    )
    parser.add_argument(
        "--output-dir", type=Path, default=Path("runs/diagnosis"), help="default: %(default)s"
    )
    parser.add_argument(
        "--blocks", type=accept.whole, help="most blocks to train on (default: all)"
    )
    parser.add_argument("--seed", type=accept.seed, default=0, help="default: %(default)s")
    options = parser.parse_args(argv)
    backbones = {path.parent.name: load_stage1(path).backbone for path in options.stage1_models}
    if len(backbones) < len(options.stage1_models):
        parser.error(
            "--stage1-models: two files in folders of one name, which could not be told apart in "
            "the table"
        )
    blocks, val_blocks = load_dataset(options.dataset_dir)
    blocks.check(STAGE2, every_class=True)
    train = blocks.of(STAGE2).part(options.blocks, options.seed).data(STAGE2, every_class=True)
    val = val_blocks.data(STAGE2, every_class=True)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    file = options.output_dir / "diagnosis.json"
    result: dict[str, Any] = {
        "blocks": {"train": len(train), "val": len(val)},
        "seed": options.seed,
        "data": digest_of_data(train, val),
        "stage1_models": {
            path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in options.stage1_models
        },
        "rows": [],
    }
    result["rows"] = rows = _measured(file, result)
    with tqdm(
        total=1 + sum(len(_taps(each)) for each in backbones.values()), unit=" rows", disable=None
    ) as progress:
        for name, see in _features(backbones, (train, val)):
            if name in (row["seen"] for row in rows):
                progress.update()
                continue
            seen, scores = see(), {}
            for quantizer in (False, True):
                sets = [
                    _with_code(x, data, quantizer)
                    for x, data in zip(seen, (train, val), strict=True)
                ]
                for learner in LEARNERS:
                    answers = (_trees if learner == "trees" else _network)(
                        sets[0], sets[1], options.seed
                    )
                    scores[f"{learner}{'-q' if quantizer else ''}"] = macro_f1(
                        answers, val.tensors[1]
                    )
            rows.append({"seen": name, "numbers": seen[0].shape[1], **scores})
            progress.update()
            # Written row by row: a run that is stopped goes on behind what it measured.
            write_json(file, result)
    (options.output_dir / "diagnosis.md").write_text(table(rows) + "\n", encoding="utf-8")
    print(table(rows))


def _measured(file: Path, result: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier run of the same; it must be of the same."""
    if not file.exists():
        return []
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        rows: list[dict[str, Any]] = before.pop("rows")
    except (ValueError, KeyError, AttributeError) as error:
        raise TrainingStateError(
            f"{file}: is no diagnosis ({type(error).__name__}); delete it to start over"
        ) from error
    if before != {key: value for key, value in result.items() if key != "rows"}:
        raise TrainingStateError(
            f"{file}: is of other data, Stage 1 files or another seed; delete it, or choose "
            "another --output-dir"
        )
    return rows


def _taps(backbone: nn.Module) -> list[str]:
    return ["maxpool", *(name for name in parts(backbone) if name.startswith("layer"))]


def _features(
    backbones: dict[str, nn.Module], data: Sequence[TensorDataset]
) -> Iterator[tuple[str, Callable[[], list[Tensor]]]]:
    yield (
        "hand-made numbers",
        lambda: [
            torch.from_numpy(block_numbers(each.tensors[0], quantizer=False)) for each in data
        ],
    )
    for name, backbone in backbones.items():
        for end in _taps(backbone):
            tap = Tap(backbone, end)
            yield f"{name}: {end}", partial(_seen_by, tap, data)


def _seen_by(tap: Tap, data: Sequence[TensorDataset]) -> list[Tensor]:
    return [predict_logits(tap, each.tensors[0], CPU) for each in data]


def _with_code(seen: Tensor, data: TensorDataset, quantizer: bool) -> TensorDataset:
    if quantizer:
        seen = torch.cat([seen, quantizer_code(data.tensors[0])], dim=1)
    return TensorDataset(seen, data.tensors[1])


def _trees(train: TensorDataset, val: TensorDataset, seed: int) -> Tensor:
    # Trees see ranks only. What has 256 values at most spares scikit-learn its own search for bins,
    # which is very slow where blocks have weights and numbers are hundreds.
    edges = np.quantile(train.tensors[0].numpy(), np.linspace(0, 1, 255), axis=0)
    known, asked = (
        np.stack(
            [
                np.searchsorted(edges[:, k], column)
                for k, column in enumerate(data.tensors[0].numpy().T)
            ],
            axis=1,
        )
        for data in (train, val)
    )
    return torch.from_numpy(
        new_trees(seed).fit(known, train.tensors[1].numpy()).predict_proba(asked)
    )


def _network(train: TensorDataset, val: TensorDataset, seed: int) -> Tensor:
    """A hidden layer on standardised numbers, as the heads that see the quantizer have.

    The last epoch's answers.
    """
    torch.manual_seed(seed)
    size, classes = train.tensors[0].shape[1], len(STAGE2.classes)
    model = nn.Sequential(
        nn.BatchNorm1d(size, affine=False),
        nn.Linear(size, HIDDEN),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(HIDDEN, classes),
    )
    # Cross-entropy in which all classes weigh the same, as they do for the trees.
    loss = ClassBalancedFocalLoss(
        train.tensors[1].bincount(minlength=classes), beta=1 - 1e-6, gamma=0
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS)
    for _ in range(EPOCHS):
        for x, labels in full_batches(train, BATCH):
            optimizer.zero_grad()
            torch.autograd.backward(loss(model(x), labels))
            optimizer.step()
        schedule.step()
    return predict_logits(model, val.tensors[0], CPU)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "Stage 2 on the validation blocks, macro-F1",
        "",
        "| what is seen | numbers | trees | network | trees with the quantizer | network with the "
        "quantizer |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        scores = " | ".join(
            f"{row[f'{learner}{q}']:.4f}" for q in ("", "-q") for learner in LEARNERS
        )
        lines.append(f"| {row['seen']} | {row['numbers']} | {scores} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
