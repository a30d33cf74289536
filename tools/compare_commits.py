"""Times the library of the working tree beside that of a commit, call by call, in turns.

Two worker processes import one version each. For every task they run in turns, so that noise of
the machine falls on both. A ratio above 1 means that the working tree takes longer.

    python tools/compare_commits.py f2224e1 --rounds 9
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def tasks(folder: Path) -> dict[str, Callable[[], object]]:
    """Returns what is timed, by name; a task that times itself returns seconds of CPU time."""
    import torch  # noqa: PLC0415 - in the workers only
    from torchvision.models import resnet18  # noqa: PLC0415

    import resadapt  # noqa: PLC0415

    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    x, small = torch.randn(4, 3, 224, 224), torch.randn(2, 3, 32, 32)

    def adapted(sets: int = 1, **options: Any) -> torch.nn.Module:
        model: torch.nn.Module = resnet18(num_classes=10)
        for number in range(sets):
            resadapt.inject_adapters(model, name=f"s{number}", head="fc", **options)
        return model

    def step(optimized: bool = False, bf16: bool = False, **options: Any) -> Callable[[], object]:
        model = adapted(**options).train()
        last = torch.channels_last if bf16 else torch.contiguous_format
        model, images = model.to(memory_format=last), x.contiguous(memory_format=last)
        if optimized:
            resadapt.optimize_backbone(model)
        optimizer = torch.optim.SGD(resadapt.trainable_parameters(model), lr=1e-4)

        def run() -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model(images).square().mean()
            loss.backward()
            optimizer.step()

        run()
        return run

    def forward(inputs: torch.Tensor, **options: Any) -> Callable[[], object]:
        model = adapted(**options).eval()
        return torch.no_grad()(lambda: model(inputs))

    def switch(sets: int, **options: Any) -> Callable[[], object]:
        model = adapted(sets, **options)

        def run() -> None:
            for _ in range(5):
                resadapt.set_active_adapters(model, "s0")
                resadapt.set_active_adapters(model, "s1")

        return run

    def cpu_time(call: Callable[[], object], after: Callable[[], object]) -> float:
        start = time.process_time()
        call()
        spent = time.process_time() - start
        after()
        return spent

    file, saved, several, bare = folder / "set.pt", adapted().eval(), adapted(4).eval(), resnet18()
    resadapt.save_adapters(resadapt.inject_adapters(bare, head="fc"), folder / "load.pt")
    resadapt.remove_adapters(bare)

    def mixed() -> object:
        with resadapt.adapters_for(several, ["s0", "s1"]):
            return several(small)

    return {
        "training step": step(),
        "training step, optimized": step(optimized=True),
        "training step, bf16": step(bf16=True),
        "training step, bf16, optimized": step(optimized=True, bf16=True),
        "training step, norm=affine": step(norm="affine"),
        "training step, norm=affine, optimized": step(optimized=True, norm="affine"),
        "forward": forward(x),
        "forward, norm=affine+stats": forward(x, norm="affine+stats"),
        "forward, 32 pixels": forward(small),
        "10 switches, 2 sets": switch(2),
        "10 switches, 2 sets, norm=affine": switch(2, norm="affine"),
        "10 switches, 64 sets": switch(64),
        "mixed batch, 32 pixels": torch.no_grad()(mixed),
        "forward_all, 4 sets, 32 pixels": torch.no_grad()(
            lambda: resadapt.forward_all(several, small)
        ),
        "inject": lambda: cpu_time(
            lambda: resadapt.inject_adapters(bare, head="fc"),
            lambda: resadapt.remove_adapters(bare),
        ),
        "save": lambda: resadapt.save_adapters(saved, file),
        "save, verify=False": lambda: resadapt.save_adapters(saved, file, verify=False),
        "load": lambda: cpu_time(
            lambda: resadapt.load_adapters(bare, folder / "load.pt"),
            lambda: resadapt.remove_adapters(bare),
        ),
    }


def work() -> None:
    """Runs the tasks that the parent process names, and prints their CPU time in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        known = tasks(Path(folder))
        print(json.dumps(list(known)), flush=True)
        for line in sys.stdin:
            start = time.process_time()
            found = known[line.strip()]()
            spent = time.process_time() - start
            print(found if isinstance(found, float) else spent, flush=True)


def started(source: Path) -> subprocess.Popen[str]:
    """Starts a worker with one version of the library."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(source)}
    command = [sys.executable, __file__, "--work"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)


def asked(worker: subprocess.Popen[str], line: str | None = None) -> str:
    """Gives a worker a line, if there is one, and returns its answer."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    if line is not None:
        worker.stdin.write(f"{line}\n")
        worker.stdin.flush()
    return worker.stdout.readline()


def main() -> None:
    """Prints a row a task: both medians, and the median of the ratios of all rounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit", nargs="?", default="HEAD")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work()
        return
    command = ["git", "archive", arguments.commit, "src"]
    archive = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(folder, filter="data")
        workers = [started(Path(folder) / "src"), started(ROOT / "src")]
        names, _ = (json.loads(asked(worker)) for worker in workers)
        print(f"{'CPU time, ms':<38}{arguments.commit[:10]:>10}{'now':>9}{'ratio':>8}")
        for name in names:
            times: list[list[float]] = [[], []]
            for number in range(arguments.rounds):
                for which in (0, 1) if number % 2 else (1, 0):
                    times[which].append(float(asked(workers[which], name)))
            before, now = (1000 * statistics.median(each) for each in times)
            ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
            print(f"{name:<38}{before:>10.1f}{now:>9.1f}{ratio:>8.3f}", flush=True)
        for worker in workers:
            worker.kill()


if __name__ == "__main__":
    main()
