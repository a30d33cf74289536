"""Three ways to use an ImageNet network for hand-written digits, in a minute or two.

A new head on the frozen network, `series` adapters beside it, and full fine-tuning: accuracy, what
was trained, the time, and the size of the file. Then another process verifies the adapter file.

$ .venv/bin/python examples/digits/three_ways.py
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from compare_families import ENTRIES, EPOCHS, WHOLE, accuracy, adapt, backbone, digits, train

from resadapt import count_parameters, save_adapters

HERE = Path(__file__).resolve().parent
SERIES = "series behind blocks 0-4"
# The rates that `compare_families.py` chose on the validation pictures.
RATES = {"frozen head": 3e-3, SERIES: 1e-3, WHOLE: 3e-3}


def main(argv: Sequence[str] | None = None) -> None:
    """Train the three, print and write the table, and verify the file of the adapters."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output-dir", type=Path, default=Path("runs/demo/digits"), help="default: %(default)s"
    )
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="default: %(default)s")
    options = parser.parse_args(argv)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # small maps gain little from a second one
    data = digits()
    print(
        f"Digits: EfficientNet-Lite0 with ImageNet's weights, {len(data['train'][0])} pictures to "
        f"train on, {len(data['test'][0])} to test"
    )
    rows = []
    for name, rate in RATES.items():
        rows.append(row(name, rate, data, options.epochs, options.output_dir))
        print(f"  {name}: {rows[-1][1]}")
    text = table(rows)
    (options.output_dir / "table.md").write_text(text)
    print(f"\n{text}\nThe file of the adapters, in another process:", flush=True)
    file = options.output_dir.resolve() / f"{SERIES}.pt"
    command = [sys.executable, "-m", "resadapt", "verify", file, "--model"]
    # The number of threads may change the order of sums and so the last bits; the training had one.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "compare_families:backbone"], cwd=HERE, env=environment, check=True)


def row(name: str, rate: float, data: Any, epochs: int, folder: Path) -> tuple[str, ...]:
    """Train one, and return its line of the table."""
    entry = next(entry for entry in ENTRIES if entry.name == name)
    model = backbone()
    torch.manual_seed(0)
    groups = adapt(model, entry, rate)
    started = time.monotonic()
    train(model, groups, *data["train"], epochs)
    seconds = time.monotonic() - started
    file = folder / f"{name}.pt"
    if entry.whole:
        trained = sum(parameter.numel() for parameter in model.parameters())
        torch.save(model.state_dict(), file)
    else:
        trained = count_parameters(model).trainable
        save_adapters(model, file, rebuild=backbone)
    return (
        name,
        f"{accuracy(model, *data['test']):.3f}",
        f"{trained:,}",
        f"{file.stat().st_size / 1000:,.0f} kB",
        f"{seconds:.0f} s",
    )


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """The lines in Markdown, in columns."""
    rows = [("digits", "test accuracy", "trained parameters", "file", "training"), *rows]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = [
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))} |"
        for cells in rows
    ]
    lines.insert(1, f"|{'|'.join('-' * (width + 2) for width in widths)}|")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
