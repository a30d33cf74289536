"""What is computed once: features before a late first adapter, and what several sets share.

The features serve all epochs.

$ .venv/bin/python benchmarks/reuse.py
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measuring import (
    PRECISIONS,
    command_line,
    in_precision,
    machine,
    markdown,
    report,
    step,
    timed,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from ways import BACKBONES, pictures

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
    return inject_adapters(BACKBONES["ResNet-18"](), "layer4", head="fc").train()


def steps(batch: int, size: int, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of a training step with adapters after the last stage, in several ways.

    And of keeping the features. By precision.
    """
    images, labels = pictures(batch, size)
    data = TensorDataset(images, labels)
    ways: dict[tuple[str, str], Callable[[], object]] = {}
    for precision in PRECISIONS:
        full, plain, optimized, cached = (
            BACKBONES["ResNet-18"]().train(),
            last_stage(),
            optimize_backbone(last_stage()),
            last_stage(),
        )
        keep = partial(keep_features, cached, data, batch, precision)
        cache = keep()
        features, _ = next(iter(DataLoader(cache, batch)))
        for name, forward, given in (
            ("full fine-tuning", full, images),
            ("resadapt", plain, images),
            ("optimized", optimized, images),
            ("from kept features", cache.forward, features),
        ):
            ways[precision, name] = partial(step, forward, given, labels, precision)
        ways[precision, "keeping them, once"] = keep
    seconds = timed(ways, rounds)
    return {
        precision: {name: s for (of, name), s in seconds.items() if of == precision}
        for precision in PRECISIONS
    }


def keep_features(model: nn.Module, data: Any, batch: int, precision: str) -> Any:
    """The features before the adapters, in a precision."""
    with in_precision(precision):
        return cache_prefix(model, data, batch_size=batch)


@torch.no_grad()
def sets(batch: int, size: int, rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of the outputs of several sets, together and one after another.

    Their adapters are after the last stage.
    """
    images, _ = pictures(batch, size)
    model = BACKBONES["ResNet-18"]().eval()
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
    steps = markdown(
        ("training", "precision", "step", "full fine-tuning takes"),
        (
            [
                name,
                precision,
                f"{1000 * s:.1f} ms",
                f"{ways['full fine-tuning'] / s:.1f} times as long",
            ]
            for precision, ways in result["steps"].items()
            for name, s in ways.items()
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
        "pixels, channels_last; sets in float32",
        "machine": machine(1, options.rounds),
        "steps": steps(BATCH, SIZE, options.rounds),
        "sets": sets(BATCH, SIZE, min(options.rounds, 3)),
    }
    report("reuse", result, table(result))


if __name__ == "__main__":
    main()
