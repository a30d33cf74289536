"""What grows, and with what: memory with depth and batch, time and memory with the number of sets.

$ .venv/bin/python benchmarks/growth.py
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from measuring import MIB, bytes_saved, command_line, forward, machine, markdown, report, timed
from torch import Tensor, nn
from torchvision import models
from ways import CLASSES, FULL, OPTIMIZED, PLAIN, WAYS

from resadapt import (
    inject_adapters,
    load_adapters,
    remove_adapters,
    save_adapters,
    set_active_adapters,
)

DEPTHS = (18, 34, 50, 101, 152)
BATCHES = (1, 4, 16, 64, 256)
SETS = (1, 4, 16, 64)
SIZE = 112


def resnet(depth: int) -> nn.Module:
    """A ResNet of torchvision's."""
    model: nn.Module = getattr(models, f"resnet{depth}")(num_classes=CLASSES)
    return model


def saved(depth: int, images: Tensor) -> dict[str, float]:
    """Bytes that a forward pass keeps for the backward pass."""
    return {
        way: bytes_saved(WAYS[way](resnet(depth)).train(), images)[0]
        for way in (FULL, PLAIN, OPTIMIZED)
    }


def with_depth(depths: Iterable[int], size: int, rounds: int) -> dict[str, dict[str, float]]:
    """Bytes, and seconds of injecting, saving and proving, and of saving the whole model."""
    found = {}
    for depth in depths:
        with tempfile.TemporaryDirectory() as folder:
            model = WAYS[PLAIN](resnet(depth))
            fresh = iter([resnet(depth) for _ in range(rounds + 1)])
            seconds = timed(
                {
                    "inject": lambda fresh=fresh: WAYS[PLAIN](next(fresh)),  # type: ignore[misc]
                    "save": partial(save_adapters, model, Path(folder) / "set.pt"),
                    "whole": partial(torch.save, model.state_dict(), Path(folder) / "whole.pt"),
                },
                rounds,
            )
        found[str(depth)] = saved(depth, torch.randn(2, 3, size, size)) | seconds
    return found


def with_batch(batches: Iterable[int], size: int) -> dict[str, dict[str, float]]:
    """Bytes."""
    return {str(batch): saved(18, torch.randn(batch, 3, size, size)) for batch in batches}


def with_sets(counts: Sequence[int], size: int, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of a switch, a forward pass, saving one set, and loading one more.

    With them come the bytes of all parameters.
    """
    images = torch.randn(1, 3, size, size)
    models = {count: resnet(18) for count in counts}
    ways: dict[tuple[int, str], Callable[[], object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count, model in models.items():
            for number in range(count):
                inject_adapters(model, bottleneck=64, head="fc", name=f"set{number}")
            path = Path(folder) / f"{count}.pt"
            names = cycle(f"set{number}" for number in reversed(range(count)))
            ways |= {
                (count, "switch"): lambda model=model, names=names: set_active_adapters(  # type: ignore[misc]
                    model, next(names)
                ),
                (count, "forward"): partial(forward, model.eval(), images),
                (count, "save"): partial(save_adapters, model, path, name="set0"),
                (count, "load"): partial(load_adapters, model, path, name="loaded"),
                (count, "back"): partial(_back, model),
            }
        seconds = timed(ways, rounds)
    return {
        str(count): {what: seconds[count, what] for what in ("switch", "forward", "save", "load")}
        | {"bytes": sum(p.nbytes for p in model.parameters())}
        for count, model in models.items()
    }


def _back(model: nn.Module) -> None:
    """Removes the loaded set."""
    set_active_adapters(model, "set0")
    remove_adapters(model, "loaded")


def table(result: dict[str, Any]) -> str:
    """The figures in Markdown."""

    def milliseconds(row: dict[str, float], *keys: str) -> list[str]:
        return [f"{1000 * row[key]:.1f} ms" for key in keys]

    def mib(row: dict[str, float], *keys: str) -> list[str]:
        return [f"{row[key] / MIB:.2f} MiB" for key in keys]

    ways = (FULL, PLAIN, OPTIMIZED)
    depth = markdown(
        (
            "depth",
            *(f"saved, {way}" for way in ways),
            "inject",
            "save and prove",
            "torch.save of the whole model",
        ),
        (
            [name, *mib(row, *ways), *milliseconds(row, "inject", "save", "whole")]
            for name, row in result["depth"].items()
        ),
    )
    batch = markdown(
        ("batch", *(f"saved, {way}" for way in ways)),
        ([name, *mib(row, *ways)] for name, row in result["batch"].items()),
    )
    sets = markdown(
        ("sets", "switch", "forward", "save and prove one", "load one more", "model in memory"),
        (
            [name, *milliseconds(row, "switch", "forward", "save", "load"), *mib(row, "bytes")]
            for name, row in result["sets"].items()
        ),
    )
    return "\n".join([f"{result['what']}. {result['machine']}\n", depth, batch, sets])


def main() -> None:
    """Measure, and write JSON and tables."""
    options = command_line(__doc__, 5).parse_args()
    result = {
        "what": (
            "ResNets, pooled adapters with a bottleneck of 64 after the four stages and a head, "
            f"pictures of {SIZE} pixels. By depth with 2 pictures; by batch and sets ResNet-18"
        ),
        "machine": machine(1, options.rounds),
        "depth": with_depth(DEPTHS, SIZE, options.rounds),
        "batch": with_batch(BATCHES, SIZE),
        "sets": with_sets(SETS, SIZE, options.rounds),
    }
    report("growth", result, table(result))


if __name__ == "__main__":
    main()
