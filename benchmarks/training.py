"""One training step of a ResNet with adapters, in several ways side by side: time, and bytes kept for the backward pass.

$ .venv/bin/python benchmarks/training.py

All ways take turns, so that what else the machine does falls on all of them; figures are medians of the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import resnet18, resnet50

from resadapt import inject_adapters, optimize_backbone
from resadapt.injection.freeze import FOLDED

BUILDS = {"resnet18": resnet18, "resnet50": resnet50}
CLASSES = 10
BOUND = "bound"
RESULTS = Path(__file__).parent / "results"


def full(build: Callable[..., nn.Module]) -> nn.Module:
    """Full fine-tuning."""
    return build(num_classes=CLASSES)


def hooks(build: Callable[..., nn.Module]) -> nn.Module:
    """resadapt: pooled adapters after the four stages and a head."""
    return inject_adapters(build(num_classes=CLASSES), bottleneck=64, head="fc")


def exact(build: Callable[..., nn.Module]) -> nn.Module:
    """resadapt, optimized without folding."""
    return optimize_backbone(hooks(build), fold_norms=False)


def folded(build: Callable[..., nn.Module]) -> nn.Module:
    """resadapt, optimized."""
    return optimize_backbone(hooks(build))


def peft_lora(build: Callable[..., nn.Module]) -> nn.Module:
    """PEFT: LoRA r=8 on the 3x3 convolutions and a head."""
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415 - an optional extra

    model = build(num_classes=CLASSES)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=8, target_modules=names, modules_to_save=["fc"]))


WAYS = {"full fine-tuning": full, "PEFT LoRA r=8": peft_lora, "resadapt": hooks, "optimized, exact": exact, "optimized": folded}


def bytes_saved(model: nn.Module, images: Tensor) -> tuple[int, Any]:
    """Bytes that the forward pass keeps for the backward pass, besides the input and the constants of the model; and its output."""
    kept_anyway = [images, *model.parameters(), *model.buffers()]
    for module in model.modules():
        if FOLDED in module.__dict__:
            kept_anyway += module.__dict__[FOLDED].tensors
    own = {tensor.untyped_storage().data_ptr() for tensor in kept_anyway}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(images)
    return sum(saved.values()), output


def step(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Forward and backward; the optimizer's time is left out, which only full fine-tuning would notice."""
    torch.autograd.backward(F.cross_entropy(model(images), labels))


@torch.no_grad()
def forward(model: nn.Module, images: Tensor) -> None:
    """Forward alone, in evaluation."""
    model(images)


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


def bound(build: Callable[..., nn.Module], images: Tensor) -> Callable[[], object]:
    """The least that a step could take: the folded forward, and gradients of the inputs of convolutions behind the first site."""
    model, record = folded(build).eval(), Convolutions()
    with torch.no_grad(), record:
        model(images)
    front: list[nn.Module] = [*model.conv1.modules(), *model.layer1.modules()]  # type: ignore[union-attr]
    before = sum(isinstance(module, nn.Conv2d) for module in front)
    behind = record.calls[before:]

    def run() -> None:
        forward(model, images)
        for output, x, weight, _bias, stride, padding, dilation, _transposed, _output_padding, groups in behind:
            torch.ops.aten.convolution_backward(
                output, x, weight, None, stride, padding, dilation, False, [0, 0], groups, (True, False, False)
            )

    return run


def timed(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each way, which take turns; a round before the first is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, run in ways.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(each[1:]) for name, each in seconds.items()}


def measure(model: str, batch: int, size: int, rounds: int) -> dict[str, dict[str, float]]:
    """The figures of each way."""
    images, labels = torch.randn(batch, 3, size, size), torch.randint(CLASSES, (batch,))
    models = {name: way(BUILDS[model]) for name, way in WAYS.items()}
    evaluated = {"plain": BUILDS[model](num_classes=CLASSES), **models}
    for each in evaluated.values():
        each.eval()
    forwards = timed({name: partial(forward, each, images) for name, each in evaluated.items()}, rounds)
    for each in models.values():
        each.train()
    runs: dict[str, Callable[[], object]] = {name: partial(step, each, images, labels) for name, each in models.items()}
    steps = timed(runs | {BOUND: bound(BUILDS[model], images)}, rounds)
    return {
        name: {
            "step_s": steps[name],
            "step_of_full": steps[name] / steps["full fine-tuning"],
            "step_of_bound": steps[name] / steps[BOUND],
            "forward_of_plain": forwards[name] / forwards["plain"],
            "bytes_saved": bytes_saved(each, images)[0],
            "trained": sum(p.numel() for p in each.parameters() if p.requires_grad),
        }
        for name, each in models.items()
    }


def table(result: dict[str, Any]) -> str:
    """The figures in Markdown."""
    lines = [
        f"{result['what']}. {result['machine']}",
        "",
        "| | trained | step | of full fine-tuning | of the bound | forward, of the plain network | saved for backward |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in result["ways"].items():
        cells = (
            name,
            f"{row['trained']:,}",
            f"{1000 * row['step_s']:.0f} ms",
            f"{row['step_of_full']:.2f}",
            f"{row['step_of_bound']:.2f}",
            f"{row['forward_of_plain']:.2f}",
        )
        lines.append(f"| {' | '.join(cells)} | {row['bytes_saved'] / 2**20:.2f} MiB |")
    return "\n".join(lines) + "\n"


def machine(cores: int, rounds: int) -> str:
    """Where, and how, something was measured."""
    return (
        f"{cores} of {os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}; "
        f"medians of {rounds} rounds, taken in turns."
    )


def report(name: str, result: dict[str, Any], text: str) -> None:
    """Writes the figures of a benchmark and their table, and shows it."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(text)
    print(text)


def command_line(about: str | None, rounds: int) -> argparse.ArgumentParser:
    """Flags of the benchmarks that run on one core, which this sees to, with the same random numbers each time."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--batch", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--size", type=int, default=224, help="pixels (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=rounds, help="default: %(default)s")
    return parser


def main() -> None:
    """Measure, and write JSON and a table."""
    parser = command_line(__doc__, 9)
    parser.add_argument("--model", choices=BUILDS, default="resnet18", help="default: %(default)s")
    options = parser.parse_args()
    result = {
        "what": f"{options.model}, {options.batch} pictures of {options.size} pixels, float32",
        "machine": machine(1, options.rounds),
        "ways": measure(options.model, options.batch, options.size, options.rounds),
    }
    report("training", result, table(result))


if __name__ == "__main__":
    main()
