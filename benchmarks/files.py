"""What it costs to inject, save, prove and load, beside torch.save of the whole model.

$ .venv/bin/python benchmarks/files.py
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import machine, markdown, report, timed
from torch import nn
from torchvision.models import resnet18
from ways import CLASSES

from resadapt import inject_adapters, load_adapters, save_adapters

ROUNDS = 15


def measure(folder: Path) -> dict[str, float]:
    """Median seconds of each way.

    What a way changes is made anew for it, outside of its time.
    """
    plain = resnet18(num_classes=CLASSES)
    adapted = inject_adapters(copy.deepcopy(plain), bottleneck=64, head="fc")
    save_adapters(adapted, folder / "set.pt")
    fresh = [copy.deepcopy(plain) for _ in range(2 * (ROUNDS + 1))]

    def on_a_fresh_one(run: Callable[[nn.Module], object]) -> None:
        run(fresh.pop())

    return timed(
        {
            "torch.save of the whole model": lambda: torch.save(
                plain.state_dict(), folder / "whole.pt"
            ),
            "inject": partial(
                on_a_fresh_one, lambda model: inject_adapters(model, bottleneck=64, head="fc")
            ),
            "save and prove": lambda: save_adapters(adapted, folder / "proven.pt"),
            "save, not proven": lambda: save_adapters(
                adapted, folder / "unproven.pt", verify=False
            ),
            "load": partial(on_a_fresh_one, lambda model: load_adapters(model, folder / "set.pt")),
        },
        ROUNDS,
    )


def table(result: dict[str, Any]) -> str:
    """The figures in Markdown."""
    whole = result["seconds"]["torch.save of the whole model"]
    rows = (
        [name, f"{1000 * seconds:.0f} ms", f"{seconds / whole:.1f}"]
        for name, seconds in result["seconds"].items()
    )
    return (
        f"{result['what']}. {result['machine']}\n\n{markdown(('', 'time', 'of torch.save'), rows)}"
    )


def main() -> None:
    """Measure, and write JSON and a table."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(Path(folder))
    result = {
        "what": "ResNet-18, pooled adapters with a bottleneck of 64 after the four stages, "
        "and a head",
        "machine": machine(torch.get_num_threads(), ROUNDS),
        "seconds": seconds,
    }
    report("files", result, table(result))


if __name__ == "__main__":
    main()
