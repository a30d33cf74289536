"""Why own statistics of norms do harm to the digits.

It trains a set that has them, and does the same by hand with statistics of three kinds.

$ .venv/bin/python examples/digits/own_statistics.py
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from compare_families import EPOCHS, accuracy, backbone, digits, train
from torch import Tensor, nn

from resadapt import inject_adapters, parameter_groups

RATE = 3e-3  # the best of the three for these ways
BATCH = 200


def by_hand(seed: int) -> tuple[nn.Module, list[Tensor]]:
    """A frozen network with norms in training mode, and a trained head, without this library."""
    model = backbone().requires_grad_(False)
    torch.manual_seed(seed)
    head = model.get_submodule("classifier").requires_grad_(True)
    return model, list(head.parameters())


def by_set(seed: int) -> tuple[nn.Module, list[Tensor]]:
    """A set with a head and statistics of its own."""
    model = backbone()
    torch.manual_seed(seed)
    inject_adapters(model, (), norm="stats", head="classifier")
    return model, [
        parameter for group in parameter_groups(model, RATE) for parameter in group["params"]
    ]


def estimate_anew(model: nn.Module, pictures: Tensor) -> nn.Module:
    """The same model with the statistics of these pictures, all batches counted alike."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    model.train()
    with torch.no_grad():
        for part in pictures.split(20):
            model(part)
    return model


@torch.no_grad()
def with_batches(model: nn.Module, pictures: Tensor, labels: Tensor) -> float:
    """Accuracy where each test batch is normalised by its own statistics."""
    model = copy.deepcopy(model).train()
    answers = torch.cat([model(part).argmax(1) for part in pictures.split(BATCH)])
    return (answers == labels).float().mean().item()


def main() -> None:
    """Measure, and write the table."""
    torch.set_num_threads(1)
    data = digits()
    lines = ["| | running averages | estimated anew | batches of the test |", "|---|---|---|---|"]
    for name, make in (('a set, norm="stats"', by_set), ("by hand", by_hand)):
        model, trained = make(0)
        train(model, [{"params": trained, "lr": RATE}], *data["train"], EPOCHS)
        anew = estimate_anew(model, data["train"][0])
        scores = (
            accuracy(model, *data["test"]),
            accuracy(anew, *data["test"]),
            with_batches(model, *data["test"]),
        )
        lines.append(f"| {name} | {' | '.join(f'{score:.4f}' for score in scores)} |")
    table = "\n".join(lines) + "\n"
    (Path(__file__).parent / "results" / "own_statistics.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
