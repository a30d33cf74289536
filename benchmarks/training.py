"""One training step of a ResNet with adapters, in several ways and precisions: time, and memory.

$ .venv/bin/python benchmarks/training.py

All ways take turns, so that what else the machine does falls on all of them; figures are medians of
the rounds. The peak is that of a process which does nothing else. Everything is in channels_last.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from measuring import (
    MIB,
    PRECISIONS,
    alone,
    bytes_saved,
    command_line,
    forward,
    in_precision,
    machine,
    markdown,
    on_one_core,
    peak_bytes,
    report,
    step,
    timed,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from ways import BACKBONES, COMPILED, FULL, WAYS, built, optimized, pictures

BOUND = "bound"


@dataclass(frozen=True)
class Setting:
    """What is trained on."""

    backbone: str
    batch: int
    channels: int
    size: int
    compiled: bool = False
    """Whether the ways that are compiled are measured too: compiling takes minutes."""

    def ways(self, precision: str) -> tuple[str, ...]:
        """Names of the ways that are measured."""
        return (*WAYS, *(COMPILED if self.compiled and precision == "float32" else ()))

    def data(self) -> tuple[Tensor, Tensor]:
        """Pictures and labels."""
        return pictures(self.batch, self.size, self.channels)


SETTINGS = (
    Setting("ResNet-18", 8, 3, 224, compiled=True),
    Setting("ResNet-50", 8, 3, 224),
    Setting("ResNet-18, one channel", 256, 1, 16),
)


class Convolutions(TorchDispatchMode):
    """Writes down the arguments of every convolution."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator."""
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            self.calls.append((output, *args))
        return output


def bound(backbone: nn.Module, images: Tensor, precision: str) -> Callable[[], object]:
    """The least that a step could take.

    The folded forward, and gradients of the inputs of convolutions behind the first site.
    """
    model, record = optimized(backbone).eval(), Convolutions()
    with torch.no_grad(), record, in_precision(precision):
        model(images)
    front: list[nn.Module] = [*model.conv1.modules(), *model.layer1.modules()]  # type: ignore[union-attr]
    before = sum(isinstance(module, nn.Conv2d) for module in front)

    def run() -> None:
        for number, (output, x, weight, bias, *geometry) in enumerate(record.calls):
            stride, padding, dilation, transposed, output_padding, groups = geometry
            torch.ops.aten.convolution(
                x, weight, bias, stride, padding, dilation, transposed, output_padding, groups
            )
            if number >= before:
                torch.ops.aten.convolution_backward(
                    output, x, weight, None, *geometry, (True, False, False)
                )

    return run


def peak(setting: Setting, way: str, precision: str) -> int:
    """Bytes that a step takes at most, in a process that does nothing else."""
    on_one_core()
    model, (images, labels) = built(setting.backbone, way), setting.data()
    step(model, images[:2], labels[:2], precision)  # what is made once is there
    model.zero_grad()
    return peak_bytes(partial(step, model, images, labels, precision))


Figures = dict[str, dict[str, dict[str, float]]]


def measure(setting: Setting, rounds: int, peaks: bool = True) -> Figures:
    """The figures of each way in each precision."""
    images, labels = setting.data()
    models = {
        (precision, way): built(setting.backbone, way)
        for precision in PRECISIONS
        for way in setting.ways(precision)
    }
    plain = BACKBONES[setting.backbone]()
    steps = timed(
        {key: partial(step, model, images, labels, key[0]) for key, model in models.items()}
        | {(each, BOUND): bound(copy.deepcopy(plain), images, each) for each in PRECISIONS},
        rounds,
    )
    saved = {key: bytes_saved(model, images, key[0])[0] for key, model in models.items()}
    evaluated = {(precision, "plain"): plain for precision in PRECISIONS} | models
    forwards = timed(
        {key: partial(forward, model.eval(), images, key[0]) for key, model in evaluated.items()},
        rounds,
    )
    found: Figures = {}
    for (precision, way), model in models.items():
        seconds = steps[precision, way]
        found.setdefault(precision, {})[way] = {
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "step_s": seconds,
            "step_of_full": seconds / steps[precision, FULL],
            "step_of_float32": seconds / steps["float32", FULL],
            "step_of_bound": seconds / steps[precision, BOUND],
            "forward_of_plain": forwards[precision, way] / forwards[precision, "plain"],
            "bytes_saved": saved[precision, way],
            "peak_bytes": alone(peak, setting, way, precision) if peaks and way in WAYS else 0,
        }
    return found


def table(result: dict[str, Any]) -> str:
    """The figures in Markdown."""
    heading = (
        "",
        "trained",
        "step",
        "of full",
        "of full in float32",
        "of the bound",
        "forward, of the plain network",
        "saved for backward",
        "peak of a step",
    )

    def cells(name: str, row: dict[str, float]) -> Iterable[str]:
        yield from (name, f"{row['trained']:,}", f"{1000 * row['step_s']:.0f} ms")
        for key in ("step_of_full", "step_of_float32", "step_of_bound", "forward_of_plain"):
            yield f"{row[key]:.2f}"
        yield f"{row['bytes_saved'] / MIB:.2f} MiB"
        yield f"{row['peak_bytes'] / MIB:.0f} MiB" if row["peak_bytes"] else ""

    parts = [f"{result['machine']} Everything is in channels_last.\n"]
    for each in result["settings"]:
        what = each["setting"]
        shape = f"{what['batch']} pictures of {what['channels']}x{what['size']}x{what['size']}"
        for precision, ways in each["precisions"].items():
            rows = (cells(name, row) for name, row in ways.items())
            title = f"**{what['backbone']}, {shape}, {precision}**"
            parts.append(f"{title}\n\n{markdown(heading, rows)}")
    return "\n".join(parts)


def main() -> None:
    """Measure, and write JSON and tables."""
    options = command_line(__doc__, 7).parse_args()
    result = {
        "machine": machine(1, options.rounds),
        "settings": [
            {"setting": asdict(each), "precisions": measure(each, options.rounds)}
            for each in SETTINGS
        ],
    }
    report("training", result, table(result))


if __name__ == "__main__":
    main()
