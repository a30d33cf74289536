"""What own statistics of norms do where the task stays and the pictures get worse.

A network that is trained on clean digits meets noisy ones. A set with statistics of its own takes
them from a few noisy pictures, without labels. Nothing is trained.

$ .venv/bin/python examples/digits/noisy_pictures.py  # five minutes on one core
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path

import torch
from compare_families import EPOCHS, SEEDS, accuracy, backbone, digits, train
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from resadapt import check_backbone, inject_adapters, remove_adapters, save_adapters

RATE = 3e-3  # the best of the three for full fine-tuning
# Standard deviations; the pictures have values from -1 to 1. With 0 nothing but the statistics is
# other than in the training.
STRENGTHS = (0.0, 0.05, 0.1, 0.2)
COUNTS = (8, 200)  # noisy pictures that give the statistics
RESULTS = Path(__file__).parent / "results"

Accuracies = dict[str, list[float]]


def noisy(pictures: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """The pictures with Gaussian noise on every pixel, the same on all channels."""
    noise = torch.randn(len(pictures), 1, *pictures.shape[2:], generator=generator)
    return (pictures + strength * noise).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def take_statistics(model: nn.Module, pictures: Tensor) -> None:
    """Add a set with norm statistics of its own: those of one batch of pictures, without labels."""
    update_bn([pictures], inject_adapters(model, (), norm="stats"))


def measure(model: nn.Module, seed: int, data: dict[str, tuple[Tensor, Tensor]]) -> Accuracies:
    """Accuracy on the test pictures at each strength: without a set, and with each count."""
    generator = torch.Generator().manual_seed(seed)
    test, labels = data["test"]
    drawn = torch.randperm(len(data["val"][0]), generator=generator)
    result = {}
    for strength in STRENGTHS:
        pictures = noisy(test, strength, generator)
        unlabelled = noisy(data["val"][0][drawn], strength, generator)
        scores = [accuracy(model, pictures, labels)]
        for count in COUNTS:
            take_statistics(model, unlabelled[:count])
            scores.append(accuracy(model, pictures, labels))
            assert check_backbone(model).ok
            with tempfile.TemporaryDirectory() as folder:
                assert save_adapters(model, Path(folder) / "set.pt", probe=pictures[:4]).ok
            remove_adapters(model)
        result[str(strength)] = scores
    return result


def table(results: list[Accuracies]) -> str:
    """Means and standard deviations over the seeds, in Markdown."""
    counts = [f"own, from {count} pictures" for count in COUNTS]
    lines = [
        f"| noise | the network's statistics | {' | '.join(counts)} |",
        f"|---|---|{'---|' * len(COUNTS)}",
    ]
    for strength in results[0]:
        columns = zip(*(run[strength] for run in results), strict=True)
        cells = [f"{statistics.mean(each):.3f} ± {statistics.stdev(each):.3f}" for each in columns]
        lines.append(f"| {float(strength):g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Train a network for each seed on clean digits, measure, and write the figures and a table."""
    torch.set_num_threads(1)
    data, results = digits(), []
    for seed in SEEDS:
        model = backbone()
        torch.manual_seed(seed)
        train(model, [{"params": list(model.parameters()), "lr": RATE}], *data["train"], EPOCHS)
        results.append(measure(model, seed, data))
    (RESULTS / "noisy_pictures.json").write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "noisy_pictures.md").write_text(table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
