"""One training step of a ResNet with adapters, in several ways side by side: time, and memory.

$ .venv/bin/python benchmarks/training.py

All ways take turns, so that what else the machine does falls on all of them; figures are medians of
the rounds. The peak is that of a process which does nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from measuring import (
    MIB,
    alone,
    bytes_saved,
    command_line,
    forward,
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
from ways import BACKBONES, CLASSES, COMPILED, FULL, WAYS, built, optimized

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

    @property
    def ways(self) -> tuple[str, ...]:
        """Names of the ways that are measured."""
        return (*WAYS, *(COMPILED if self.compiled else ()))

    def data(self) -> tuple[Tensor, Tensor]:
        """Pictures and labels."""
        return torch.randn(self.batch, self.channels, self.size, self.size), torch.randint(
            CLASSES, (self.batch,)
        )


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


def bound(backbone: nn.Module, images: Tensor) -> Callable[[], object]:
    """The least that a step could take.

    The folded forward, and gradients of the inputs of convolutions behind the first site.
    """
    model, record = optimized(backbone).eval(), Convolutions()
    with torch.no_grad(), record:
        model(images)
    front: list[nn.Module] = [*model.conv1.modules(), *model.layer1.modules()]  # type: ignore[union-attr]
    before = sum(isinstance(module, nn.Conv2d) for module in front)
    behind = record.calls[before:]

    def run() -> None:
        forward(model, images)
        for (
            output,
            x,
            weight,
            _bias,
            stride,
            padding,
            dilation,
            _transposed,
            _output_padding,
            groups,
        ) in behind:
            torch.ops.aten.convolution_backward(
                output,
                x,
                weight,
                None,
                stride,
                padding,
                dilation,
                False,
                [0, 0],
                groups,
                (True, False, False),
            )

    return run


def peak(setting: Setting, way: str) -> int:
    """Bytes that a step takes at most, in a process that does nothing else."""
    on_one_core()
    model, (images, labels) = built(setting.backbone, way), setting.data()
    step(model, images[:2], labels[:2])  # what is made once is there
    model.zero_grad()
    return peak_bytes(partial(step, model, images, labels))


def measure(setting: Setting, rounds: int, peaks: bool = True) -> dict[str, dict[str, float]]:
    """The figures of each way."""
    images, labels = setting.data()
    models = {way: built(setting.backbone, way) for way in setting.ways}
    steps = timed(
        {way: partial(step, model, images, labels) for way, model in models.items()}
        | {BOUND: bound(BACKBONES[setting.backbone](), images)},
        rounds,
    )
    saved = {way: bytes_saved(model, images)[0] for way, model in models.items()}
    evaluated = {"plain": BACKBONES[setting.backbone](), **models}
    forwards = timed(
        {way: partial(forward, model.eval(), images) for way, model in evaluated.items()}, rounds
    )
    return {
        way: {
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "step_s": steps[way],
            "step_of_full": steps[way] / steps[FULL],
            "step_of_bound": steps[way] / steps[BOUND],
            "forward_of_plain": forwards[way] / forwards["plain"],
            "bytes_saved": saved[way],
            "peak_bytes": alone(peak, setting, way) if peaks and way in WAYS else 0,
        }
        for way, model in models.items()
    }


def table(result: dict[str, Any]) -> str:
    """The figures in Markdown."""
    heading = (
        "",
        "trained",
        "step",
        "of full",
        "of the bound",
        "forward, of the plain network",
        "saved for backward",
        "peak of a step",
    )
    parts = [f"{result['machine']}\n"]
    for each in result["settings"]:
        rows: Iterable[tuple[str, ...]] = (
            (
                name,
                f"{row['trained']:,}",
                f"{1000 * row['step_s']:.0f} ms",
                f"{row['step_of_full']:.2f}",
                f"{row['step_of_bound']:.2f}",
                f"{row['forward_of_plain']:.2f}",
                f"{row['bytes_saved'] / MIB:.2f} MiB",
                f"{row['peak_bytes'] / MIB:.0f} MiB" if row["peak_bytes"] else "",
            )
            for name, row in each["ways"].items()
        )
        what = each["setting"]
        shape = f"{what['batch']} pictures of {what['channels']}x{what['size']}x{what['size']}"
        parts.append(f"**{what['backbone']}, {shape}**\n\n{markdown(heading, rows)}")
    return "\n".join(parts)


def main() -> None:
    """Measure, and write JSON and tables."""
    options = command_line(__doc__, 7).parse_args()
    result = {
        "machine": machine(1, options.rounds),
        "settings": [
            {"setting": asdict(each), "ways": measure(each, options.rounds)} for each in SETTINGS
        ],
    }
    report("training", result, table(result))


if __name__ == "__main__":
    main()
