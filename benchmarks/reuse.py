"""What is computed once: features before a late first adapter, and what several sets share.

The features serve all epochs.

$ .venv/bin/python benchmarks/reuse.py
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measuring import command_line, machine, markdown, report, step, timed
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18
from ways import CLASSES

from resadapt import (
    cache_prefix,
    forward_all,
    inject_adapters,
    optimize_backbone,
    set_active_adapters,
)

BATCH, SIZE = 8, 224
SETS = (1, 4, 16, 64)


def last_stage() -> nn.Module:
    """Adapters after the last stage, and a head."""
    model: nn.Module = resnet18(num_classes=CLASSES)
    return inject_adapters(model, "layer4", head="fc").train()


def steps(batch: int, size: int, rounds: int) -> dict[str, float]:
    """Median seconds of a training step with adapters after the last stage, in several ways.

    And of keeping the features.
    """
    images, labels = torch.randn(batch, 3, size, size), torch.randint(CLASSES, (batch,))
    full, plain, optimized, cached = (
        resnet18(num_classes=CLASSES).train(),
        last_stage(),
        last_stage(),
        last_stage(),
    )
    optimize_backbone(optimized)
    data = TensorDataset(images, labels)
    cache = cache_prefix(cached, data, batch_size=batch)
    features, _ = next(iter(DataLoader(cache, batch)))
    return timed(
        {
            "full fine-tuning": partial(step, full, images, labels),
            "resadapt": partial(step, plain, images, labels),
            "optimized": partial(step, optimized, images, labels),
            "from kept features": partial(step, cache.forward, features, labels),
            "keeping them, once": partial(cache_prefix, cached, data, batch_size=batch),
        },
        rounds,
    )


@torch.no_grad()
def sets(batch: int, size: int, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of the outputs of several sets, together and one after another.

    Their adapters are after the last stage.
    """
    images = torch.randn(batch, 3, size, size)
    model = resnet18(num_classes=CLASSES).eval()
    found: dict[str, dict[str, float]] = {}
    for number in range(max(SETS)):
        inject_adapters(model, "layer4", name=f"set{number}", head="fc")
        if number + 1 in SETS:
            found[str(number + 1)] = timed(_ways(model, images, number + 1), rounds)
    return found


def _ways(model: nn.Module, images: Tensor, count: int) -> dict[str, Callable[[], object]]:
    names = [f"set{number}" for number in range(count)]

    def apart() -> None:
        for name in names:
            set_active_adapters(model, name)
            model(images)

    return {"one after another": apart, "forward_all": partial(forward_all, model, images, names)}


def table(result: dict[str, Any]) -> str:
    """The figures in Markdown."""
    full = result["steps"]["full fine-tuning"]
    steps = markdown(
        ("training", "step", "full fine-tuning takes"),
        (
            [name, f"{1000 * s:.1f} ms", f"{full / s:.1f} times as long"]
            for name, s in result["steps"].items()
        ),
    )
    taken = (
        (count, row["one after another"], row["forward_all"])
        for count, row in result["sets"].items()
    )
    sets = markdown(
        ("sets", "one after another", "`forward_all`", ""),
        (
            [
                count,
                f"{1000 * apart:.0f} ms",
                f"{1000 * together:.0f} ms",
                f"{together / apart:.2f}",
            ]
            for count, apart, together in taken
        ),
    )
    return f"{result['what']}. {result['machine']}\n\n{steps}\n{sets}"


def main() -> None:
    """Measure, and write JSON and a table."""
    options = command_line(__doc__, 7).parse_args()
    result = {
        "what": f"ResNet-18, adapters after the last stage and a head, {BATCH} pictures of {SIZE} "
        "pixels, float32",
        "machine": machine(1, options.rounds),
        "steps": steps(BATCH, SIZE, options.rounds),
        "sets": sets(BATCH, SIZE, min(options.rounds, 3)),
    }
    report("reuse", result, table(result))


if __name__ == "__main__":
    main()
