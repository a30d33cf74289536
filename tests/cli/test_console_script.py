"""The installed command, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import resadapt

SCRIPT = Path(sys.executable).with_name("resadapt")
FAMILIES = ("pooled", "bottleneck", "mona", "series", "parallel", "conv", "lora", "ssf")
NETS = """
import torch
from torch import nn
def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3))
"""


def run(*command: object, cwd: Path) -> tuple[int, str, str]:
    """Runs a command; returns its exit status, output and errors."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_of_every_family_is_verified_in_another_process_and_a_damaged_one_is_not(
    family: str, tmp_path: Path
) -> None:
    (tmp_path / "nets.py").write_text(NETS)
    names: dict[str, object] = {}
    exec(NETS, names)
    model = resadapt.inject_adapters(
        names["build"](), "1" if family == "ssf" else "3", family=family
    )  # type: ignore[operator]
    with torch.no_grad():
        for parameter in resadapt.trainable_parameters(model):
            parameter.add_(0.1)
    resadapt.save_adapters(model, tmp_path / "a.pt")
    command = (SCRIPT, "verify", "a.pt", "--model", "nets:build")
    status, out, err = run(*command, cwd=tmp_path)
    assert (status, err) == (0, "")
    assert "recorded outputs  passed" in out
    if family != "pooled":
        return
    data = bytearray((tmp_path / "a.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "a.pt").write_bytes(data)
    status, out, err = run(*command, cwd=tmp_path)
    assert (status, out) == (1, "")
    assert err.startswith("resadapt verify: a.pt: the file was changed or damaged")
    assert err.count("\n") == 1


def test_the_module_is_the_same_command_and_a_closed_pipe_keeps_its_status(tmp_path: Path) -> None:
    assert run(sys.executable, "-m", "resadapt", "--version", cwd=tmp_path) == (
        0,
        f"resadapt {resadapt.__version__}\n",
        "",
    )
    for name in "ab":
        model = resadapt.inject_adapters(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), "0", 2)
        resadapt.save_adapters(model, tmp_path / name)
    closed = "set -o pipefail; {} diff a b | true"
    status, _, err = run("bash", "-c", closed.format(SCRIPT), cwd=tmp_path)
    assert (status, err) == (1, ""), "the files differ, which the status tells without a reader"
