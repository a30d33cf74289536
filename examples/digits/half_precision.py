"""What lower precision costs: digits trained in float32, under autocast, and on a bf16 backbone.

Networks and data are those of compare_families.py, with the learning rate that is best there.

$ .venv/bin/python examples/digits/half_precision.py  # half an hour on one core
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import torch
from compare_families import (
    ENTRIES,
    EPOCHS,
    SEEDS,
    WHOLE,
    Entry,
    accuracy,
    backbone,
    digits,
    train,
)
from torch import Tensor, nn
from tqdm import tqdm

from resadapt import inject_adapters, parameter_groups, suggest_layers

RESULTS = Path(__file__).parent / "results"
NAMES = (
    WHOLE,
    "series behind blocks 0-4",
    "bottleneck behind blocks, 4%",
    "lora at 1x1 convolutions, 4%",
)
WAYS = (
    "float32",
    "bf16 autocast",
    "bf16 backbone, float32 set",
    "bf16 backbone, bf16 set",
)


def run(
    entry: Entry, way: str, rate: float, seed: int, data: dict[str, tuple[Tensor, Tensor]]
) -> float:
    """Train once. Accuracy on the test pictures, in the precision of the training."""
    model, autocast = backbone(), way == "bf16 autocast"
    if way.startswith("bf16 backbone"):
        model = model.bfloat16()
        data = {key: (pictures.bfloat16(), labels) for key, (pictures, labels) in data.items()}
    torch.manual_seed(seed)
    groups = [{"params": list(model.parameters()), "lr": rate}]
    if not entry.whole:
        groups = parameter_groups(_injected(model, entry, way), rate, weight_decay=0.01)
    train(model, groups, *data["train"], EPOCHS, autocast)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return accuracy(model, *data["test"])


def _injected(model: nn.Module, entry: Entry, way: str) -> nn.Module:
    layers = entry.layers
    if entry.budget is not None:
        layers = suggest_layers(
            model, entry.budget, family=entry.family, layers=layers, **entry.options
        )
    return inject_adapters(
        model,
        layers,
        family=entry.family,
        head="classifier",
        dtype=None if way == "bf16 backbone, bf16 set" else torch.float32,
        **entry.options,
    )


def table(results: dict[str, dict[str, list[float]]]) -> str:
    """Means and standard deviations over the seeds, and of the differences, in Markdown."""
    lines = [
        f"| test accuracy | {' | '.join(WAYS)} | autocast minus float32 |",
        f"|---|{'---|' * (len(WAYS) + 1)}",
    ]
    for name, ways in results.items():
        differences = [b - a for a, b in zip(ways[WAYS[0]], ways[WAYS[1]], strict=True)]
        cells = [f"{statistics.mean(r):.3f} ± {statistics.stdev(r):.3f}" for r in ways.values()]
        cells += [""] * (len(WAYS) - len(cells))
        cells.append(f"{statistics.mean(differences):+.4f} ± {statistics.stdev(differences):.4f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Train each entry in each way with each seed, and write the figures and a table."""
    torch.set_num_threads(1)
    data, entries = digits(), {entry.name: entry for entry in ENTRIES}
    best = json.loads((RESULTS / "families.json").read_text())
    file = RESULTS / "half_precision.json"
    results: dict[str, dict[str, list[float]]] = (
        json.loads(file.read_text()) if file.exists() else {}
    )
    todo = [
        (name, way, seed)
        for name in NAMES
        for way in (WAYS[:2] if entries[name].whole else WAYS)
        for seed in SEEDS
    ]
    for name, way, seed in tqdm(todo, unit=" runs", disable=None):
        done = results.setdefault(name, {}).setdefault(way, [])
        if len(done) <= SEEDS.index(seed):  # what is done is not done again
            done.append(run(entries[name], way, best[name][0]["rate"], seed, data))
            file.write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "half_precision.md").write_text(table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
