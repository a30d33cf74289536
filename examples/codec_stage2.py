"""Stage 2 of the AV1 partition study: from Stage 1's backbone to a verified adapter file.

Stage 1 predicts whether the encoder divides a 16x16 block: NONE or PARTITION. Stage 2 predicts how
it divides a block: SPLIT, RECT or AB. Stage 2 reuses Stage 1's ResNet-18, frozen, with adapters
after its four stages and a head of its own.

    $ python examples/codec_stage2.py

The script takes less than a minute on one core. It shows the mechanics, not the study's result:
the study trains on all blocks for 50 epochs. examples/codec has its scripts, settings and figures.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18

import resadapt

sys.path.insert(0, str(Path(__file__).resolve().parent / "codec"))
from av1partition.data.blocks import BlockSet, cut_blocks
from av1partition.data.tasks import STAGE1, STAGE2, Task
from av1partition.evaluation.metrics import macro_f1

ROOT = Path(__file__).resolve().parents[1]
Data = tuple[Tensor, Tensor]


def data_for(task: Task, blocks: BlockSet, most: int) -> Data:
    """Luma [N, 1, 16, 16] and class numbers [N] of the blocks that a stage is asked about."""
    part = blocks.of(task).part(most)
    return part.samples, part.labels(task)


def stage1_model() -> nn.Module:
    """A ResNet-18 with one input channel, luma, and two classes: NONE and PARTITION."""
    model: nn.Module = resnet18(num_classes=len(STAGE1.classes))
    model.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: Data, epochs: int) -> None:
    """A plain training loop; all classes count the same in the loss."""
    x, y = data
    weight = len(y) / y.bincount().clamp(min=1)
    for epoch in range(1, epochs + 1):
        model.train()
        for batch in torch.split(torch.randperm(len(y)), 128):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[batch]), y[batch], weight)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        print(f"  epoch {epoch}: loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def score(model: nn.Module, data: Data) -> float:
    """Macro-F1, a fraction: the mean over the classes of their F1."""
    model.eval()
    return macro_f1(torch.cat([model(x) for x in torch.split(data[0], 512)]), data[1])


def main() -> None:
    """Train Stage 1, adapt it to Stage 2, save the adapters, reload them."""
    parser = argparse.ArgumentParser(description="Stage 2 of the AV1 partition study")
    parser.add_argument("--blocks", type=int, default=4000, help="most of each stage and split")
    parser.add_argument("--epochs", type=int, default=3, help="of each stage")
    parser.add_argument("--output-dir", type=Path, default=ROOT / "runs" / "codec_stage2")
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    stage1_file, adapter_file = (options.output_dir / name for name in ("stage1.pt", "adapters.pt"))
    torch.manual_seed(0)

    blocks = cut_blocks()  # of real pictures, each picture in one split, with libaom's decisions
    train1, val1 = (data_for(STAGE1, blocks[s], options.blocks) for s in ("train", "val"))
    train2, val2 = (data_for(STAGE2, blocks[s], options.blocks) for s in ("train", "val"))
    print("Stage 1: train the whole network")
    backbone = stage1_model()
    train(backbone, torch.optim.AdamW(backbone.parameters(), lr=1e-3), train1, options.epochs)
    torch.save(backbone.state_dict(), stage1_file)
    stage1_score = score(backbone, val1)

    print("Stage 2: train adapters and a head on the frozen backbone")
    head = nn.Sequential(nn.Dropout(0.5), nn.Linear(512, len(STAGE2.classes)))
    sites = ("layer1", "layer2", "layer3", "layer4")
    model = resadapt.inject_adapters(backbone, sites, bottleneck=64, head={"fc": head})
    groups = resadapt.parameter_groups(model, lr=1e-3, head_lr=1e-3, weight_decay=1e-4)
    train(model, torch.optim.AdamW(groups), train2, options.epochs)

    def rebuild() -> nn.Module:
        """The backbone from Stage 1's file; the proof shares nothing with the live model."""
        fresh = stage1_model()
        fresh.load_state_dict(torch.load(stage1_file, weights_only=True))
        return fresh

    def metric(candidate: nn.Module) -> float:
        """Macro-F1 on the validation blocks, of the live and of the reloaded model."""
        return score(candidate, val2)

    report = resadapt.save_adapters(model, adapter_file, rebuild=rebuild, metric=metric)
    print(f"\n{resadapt.summary(model)}\n\n{report}\n")

    reloaded = score(resadapt.load_adapters(rebuild(), adapter_file), val2)
    with resadapt.adapters_disabled(model):
        stage1_again = score(model, val1)
    print(f"Stage 2: macro-F1 {report.metric_live:.4f} live, {reloaded:.4f} reloaded from the file")
    print(f"Stage 1: macro-F1 {stage1_score:.4f} before, {stage1_again:.4f} without the adapters")
    print("A minute of training shows the mechanics, not the study's result.")
    if (reloaded, stage1_again) != (report.metric_live, stage1_score):
        raise SystemExit("The reloaded model or the frozen backbone is not what it was.")


if __name__ == "__main__":
    main()
