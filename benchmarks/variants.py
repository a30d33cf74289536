"""A training step with adapters at other sites, and one of each family, plain and optimized.

Each family gets one percent of the parameters.

$ .venv/bin/python benchmarks/variants.py
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from measuring import MIB, bytes_saved, command_line, machine, markdown, report, step, timed
from torch import nn
from ways import BACKBONES, FULL, STAGES, pictures

from resadapt import (
    count_parameters,
    inject_adapters,
    optimize_backbone,
    save_adapters,
    suggest_layers,
)

BATCH, SIZE, SHARE = 8, 224, 0.01
CONVOLUTIONS, BLOCKS = "layer*.*.conv*", "layer*.*"
SITES: dict[str, tuple[str, ...]] = {
    "all four stages": STAGES,
    "last two": STAGES[2:],
    "last one": STAGES[3:],
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "pooled": ("layer*", {}),
    "series": ("layer[12].*.conv*", {}),
    "parallel": ("layer[12].*.conv*", {}),
    "bottleneck": (BLOCKS, {}),
    "conv": (CONVOLUTIONS, {}),
    "conv, around blocks": (BLOCKS, {"scheme": "residual-parallel"}),
    "lora": (CONVOLUTIONS, {}),
    "lora, DoRA": (CONVOLUTIONS, {"dora": True}),
    "ssf": ("layer*.*.bn*", {}),
    "mona": (BLOCKS, {}),
}
"""Sites of each, of which those are taken that fit the share, with the widths that do.

Those without a width have sites that do.
"""


def models() -> dict[tuple[str, str], nn.Module]:
    """What is measured, by table and row."""
    new = BACKBONES["ResNet-18"]
    found = {
        ("sites", name): inject_adapters(new(), layers, bottleneck=64, head="fc")
        for name, layers in SITES.items()
    }
    for name, (layers, options) in FAMILIES.items():
        family, backbone = name.split(",", maxsplit=1)[0], new()
        chosen = suggest_layers(backbone, SHARE, family=family, layers=layers, **options)
        found["families", name] = inject_adapters(
            backbone, chosen, family=family, head="fc", **options
        )
    return found


def measure(rounds: int, batch: int = BATCH, size: int = SIZE) -> dict[str, Any]:
    """The figures of each, plain and optimized, all in one run."""
    images, labels = pictures(batch, size)
    full, plain, lean = (
        BACKBONES["ResNet-18"](),
        models(),
        {key: optimize_backbone(model) for key, model in models().items()},
    )

    def run(model: nn.Module) -> Callable[[], object]:
        return partial(step, model.train(), images, labels)

    seconds = timed(
        {(FULL,): run(full)}
        | {
            (*key, way): run(ways[key])
            for key in plain
            for way, ways in (("plain", plain), ("lean", lean))
        },
        rounds,
    )
    found: dict[str, Any] = {
        "full": {"step_s": seconds[FULL,], "bytes_saved": bytes_saved(full, images)[0]}
    }
    for (part, name), model in plain.items():
        found.setdefault(part, {})[name] = {
            "adapters": count_parameters(model).adapters,
            "step_s": seconds[part, name, "plain"],
            "optimized_step_s": seconds[part, name, "lean"],
            "bytes_saved": bytes_saved(model, images)[0],
            "optimized_bytes_saved": bytes_saved(lean[part, name], images)[0],
            "file_bytes": _file_bytes(model),
        }
    return found


def _file_bytes(model: nn.Module) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "set.pt"
        save_adapters(model, path, verify=False)
        return path.stat().st_size


def table(result: dict[str, Any]) -> str:
    """The figures in Markdown."""
    full = result["figures"]["full"]
    heading = ("parameters", "step, of full", "optimized", "saved, of full", "optimized", "file")

    def cells(name: str, row: dict[str, float]) -> Iterable[str]:
        yield from (name, f"{row['adapters']:,}")
        yield from (f"{row[key] / full['step_s']:.2f}" for key in ("step_s", "optimized_step_s"))
        yield from (
            f"{row[key] / full['bytes_saved']:.3f}"
            for key in ("bytes_saved", "optimized_bytes_saved")
        )
        yield f"{row['file_bytes'] / MIB:.2f} MiB"

    tables = [
        markdown(
            (part, *heading), (cells(name, row) for name, row in result["figures"][part].items())
        )
        for part in ("sites", "families")
    ]
    about = (
        f"Full fine-tuning: {1000 * full['step_s']:.0f} ms a step, "
        f"{full['bytes_saved'] / MIB:.1f} MiB saved for backward."
    )
    return "\n".join([f"{result['what']}. {result['machine']} {about}\n", *tables])


def main() -> None:
    """Measure, and write JSON and tables."""
    options = command_line(__doc__, 5).parse_args()
    result = {
        "what": f"ResNet-18 with a head, {BATCH} pictures of {SIZE} pixels, float32, channels_last",
        "machine": machine(1, options.rounds),
        "figures": measure(options.rounds),
    }
    report("variants", result, table(result))


if __name__ == "__main__":
    main()
