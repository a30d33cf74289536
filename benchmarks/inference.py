"""A forward of inference copies, beside the plain model and the convolutions alone.

$ .venv/bin/python benchmarks/inference.py
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from measuring import command_line, forward, machine, markdown, report, timed
from torch import Tensor, nn
from ways import BACKBONES, STAGES

from resadapt import inference_copy, inject_adapters

BATCH, SIZE = 8, 224
PLAIN, FASTEST, BOUND = (
    "the model, float32",
    "folded, bfloat16, channels_last",
    "its convolutions alone",
)
OPTIONS: dict[str, dict[str, Any]] = {
    "copy": {},
    "folded": {"fold": True},
    "folded, channels_last": {"fold": True, "memory_format": torch.channels_last},
    "bfloat16, channels_last": {
        "dtype": torch.bfloat16,
        "memory_format": torch.channels_last,
    },
    FASTEST: {"fold": True, "dtype": torch.bfloat16, "memory_format": torch.channels_last},
}


def measure(rounds: int, batch: int = BATCH, size: int = SIZE) -> dict[str, float]:
    """Median seconds of a forward, of pictures in the dtype and memory format of each model."""
    model = inject_adapters(BACKBONES["ResNet-18"](), STAGES, head="fc").eval()
    images = torch.randn(batch, 3, size, size)
    ways: dict[str, Any] = {PLAIN: partial(forward, model, images)}
    for name, options in OPTIONS.items():
        copied = inference_copy(model, **options)
        given = images.to(options.get("dtype"))
        if "memory_format" in options:
            given = given.contiguous(memory_format=options["memory_format"])
        ways[name] = partial(forward, copied, given)
        if name == FASTEST:
            ways[BOUND] = partial(convolve, convolutions(copied, given))
    return timed(ways, rounds)


@torch.no_grad()
def convolutions(model: nn.Module, images: Tensor) -> list[tuple[nn.Module, Tensor]]:
    """The convolutions of a model, each with its input."""
    found: list[tuple[nn.Module, Tensor]] = []
    hooks = [
        module.register_forward_pre_hook(
            lambda module, args: found.append((module, args[0].clone()))
        )
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def convolve(calls: list[tuple[nn.Module, Tensor]]) -> None:
    """Runs convolutions alone."""
    for module, x in calls:
        module(x)


def table(result: dict[str, Any]) -> str:
    """The figures in Markdown."""
    seconds = result["seconds"]
    rows = markdown(
        ("forward", "", "of the model"),
        ([name, f"{1000 * s:.1f} ms", f"{s / seconds[PLAIN]:.2f}"] for name, s in seconds.items()),
    )
    return f"{result['what']}. {result['machine']}\n\n{rows}"


def main() -> None:
    """Measure, and write JSON and a table."""
    options = command_line(__doc__, 15).parse_args()
    result = {
        "what": f"ResNet-18, adapters after the four stages and a head, {BATCH} pictures of {SIZE} "
        "pixels",
        "machine": machine(1, options.rounds),
        "seconds": measure(options.rounds),
    }
    report("inference", result, table(result))


if __name__ == "__main__":
    main()
