"""A forward of inference copies beside the model, and how much half precision changes outputs.

$ .venv/bin/python benchmarks/inference.py
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from measuring import command_line, forward, machine, markdown, report, timed
from torch import Tensor, nn
from torchvision import models
from ways import BACKBONES, STAGES

from resadapt import AdapterWarning, inference_copy, inject_adapters

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


RESNETS = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2", "wide_resnet101_2"),
)
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
STATISTICS = ("as built", "of random pictures")


@torch.no_grad()
def rounding(name: str, statistics: str, size: int = 64) -> dict[str, float | None]:
    """Largest difference of a ResNet's outputs from those of its folded copies in half precision.

    As a fraction of the largest output; None if the copy's overflow. Weights are random.
    """
    torch.manual_seed(0)
    images = torch.rand(8, 3, size, size)
    backbone = models.get_model(name, num_classes=10)
    if statistics != STATISTICS[0]:
        for module in backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        backbone.train()(images)
    model = inject_adapters(backbone, STAGES, head="fc").eval()
    expected, found = model(images), {}
    for precision, dtype in HALF.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AdapterWarning)  # differences are what is measured
            copied = inference_copy(model, dtype=dtype, fold=True)
        difference = (copied(images.to(dtype)).float() - expected).abs().max()
        finite = bool(difference.isfinite())
        found[precision] = float(difference / expected.abs().max()) if finite else None
    return found


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
    differences = markdown(
        ("copy in", "statistics of the norms", "smallest", "largest", "overflows"),
        (
            _spread(precision, statistics, {name: row[precision] for name, row in each.items()})
            for statistics, each in result["rounding"].items()
            for precision in HALF
        ),
    )
    return (
        f"{result['what']}. {result['machine']}\n\n{rows}\nLargest difference of a folded copy's "
        "outputs from the model's, as a fraction of the largest output, over torchvision's "
        f"{len(RESNETS)} ResNets for pictures, with random weights:\n\n{differences}"
    )


def _spread(precision: str, statistics: str, row: dict[str, float | None]) -> tuple[str, ...]:
    known = {each: name for name, each in row.items() if each is not None}
    ends = (f"{end:.2g} ({known[end]})" for end in (min(known), max(known)))
    return precision, statistics, *ends, ", ".join(name for name in row if row[name] is None)


def main() -> None:
    """Measure, and write JSON and a table."""
    options = command_line(__doc__, 15).parse_args()
    result = {
        "what": f"ResNet-18, adapters after the four stages and a head, {BATCH} pictures of {SIZE} "
        "pixels",
        "machine": machine(1, options.rounds),
        "seconds": measure(options.rounds),
        "rounding": {
            statistics: {name: rounding(name, statistics) for name in RESNETS}
            for statistics in STATISTICS
        },
    }
    report("inference", result, table(result))


if __name__ == "__main__":
    main()
