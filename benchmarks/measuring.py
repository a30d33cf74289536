"""How the benchmarks measure, and what they write."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resadapt.base.inputs import named_in
from resadapt.lean.constants import constants_in

Key = TypeVar("Key")
MIB = 2**20
RESULTS = Path(__file__).parent / "results"


def timed(ways: dict[Key, Callable[[], object]], rounds: int) -> dict[Key, float]:
    """Median seconds of each way, which take turns; a round before the first is not counted."""
    seconds: dict[Key, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, run in ways.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(each[1:]) for name, each in seconds.items()}


PRECISIONS: dict[str, torch.dtype | None] = {"float32": None, "bf16 autocast": torch.bfloat16}
"""What is computed in: without autocast, and under it."""


def in_precision(name: str) -> torch.autocast:
    """The context of a precision."""
    dtype = PRECISIONS[name]
    return torch.autocast("cpu", dtype, enabled=dtype is not None)


def step(
    forward: Callable[[Any], Tensor], inputs: Any, labels: Tensor, precision: str = "float32"
) -> None:
    """Forward and backward.

    The optimizer's time is left out, which only full fine-tuning would notice.
    """
    with in_precision(precision):
        loss = F.cross_entropy(forward(inputs), labels)
    torch.autograd.backward(loss)


@torch.no_grad()
def forward(model: nn.Module, images: Tensor, precision: str = "float32") -> None:
    """Forward alone."""
    with in_precision(precision):
        model(images)


def bytes_saved(model: nn.Module, images: Tensor, precision: str = "float32") -> tuple[int, Any]:
    """Bytes that the forward pass keeps for the backward pass, and its output.

    The input and the constants of the model do not count.
    """
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        in_precision(precision),
    ):
        output = model(images)
    for node in _graph_of(output):
        for value in getattr(
            node, "__dict__", {}
        ).values():  # where a function of one's own keeps what hooks do not see
            if isinstance(value, Tensor):
                pack(value)
    for tensor in (images, *model.parameters(), *model.buffers(), *constants_in(model)):
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(saved.values()), output


def _graph_of(output: Any) -> set[Any]:
    waiting = [tensor.grad_fn for _, tensor in named_in(output) if tensor.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        fresh = {
            following for following, _ in waiting.pop().next_functions if following is not None
        } - seen
        seen |= fresh
        waiting += fresh
    return seen


def peak_bytes(run: Callable[[], object]) -> int:
    """Bytes by which the memory of this process grows while something runs. On Linux."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # begins the peak anew
    before = _memory("VmRSS")
    run()
    return _memory("VmHWM") - before


def _memory(what: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[what].split()[0])


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function of a module in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def markdown(heading: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table."""
    cells = list(heading)
    return (
        "\n".join(f"| {' | '.join(row)} |" for row in (cells, ["---"] * len(cells), *rows)) + "\n"
    )


def machine(cores: int, rounds: int) -> str:
    """Where, and how, something was measured."""
    return (
        f"{cores} of {os.cpu_count()} cores, {platform.machine()}, {_bf16_unit()}, torch "
        f"{torch.__version__}; medians of {rounds} rounds, taken in turns."
    )


def _bf16_unit() -> str:
    """What computes in bfloat16, as the kernel of Linux tells."""
    flags = Path("/proc/cpuinfo").read_text().split()
    units = {"amx_bf16": "bf16 by AMX", "avx512_bf16": "bf16 by AVX-512, without AMX"}
    return next((name for flag, name in units.items() if flag in flags), "no bf16 unit")


def report(name: str, result: dict[str, Any], text: str) -> None:
    """Writes the figures of a benchmark and their table, and shows it."""
    write(name, result, text)
    print(text)


def write(name: str, result: dict[str, Any], text: str) -> None:
    """Writes the figures of a benchmark and their table."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(text)


def on_one_core() -> None:
    """Computes on one core, with the same random numbers each time."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


def command_line(about: str | None, rounds: int) -> argparse.ArgumentParser:
    """Flags of the benchmarks that run on one core, which this sees to."""
    on_one_core()
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--rounds", type=int, default=rounds, help="default: %(default)s")
    return parser
