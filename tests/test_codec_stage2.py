"""The short Stage 2 example runs alone, and fails where the reloaded model is another."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import resadapt

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "codec_stage2.py"
FEW = ("--blocks", "128", "--epochs", "1", "--output-dir")


def test_the_script_trains_saves_and_reloads(tmp_path: Path) -> None:
    # From the repository's root, as a user runs it.
    command, environment = (
        [sys.executable, SCRIPT.relative_to(ROOT), *FEW, tmp_path],
        os.environ | {"OMP_NUM_THREADS": "1"},
    )
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^  reconstruction +passed", done.stdout, re.MULTILINE)
    live, reloaded = re.search(
        r"Stage 2: macro-F1 (\S+) live, (\S+) reloaded", done.stdout
    ).groups()
    assert live == reloaded
    assert re.search(rf"^  metric +passed +live {live[:4]}", done.stdout, re.MULTILINE)
    before, after = re.search(
        r"Stage 1: macro-F1 (\S+) before, (\S+) without", done.stdout
    ).groups()
    assert before == after
    assert re.search(r"^adapters +124,096", done.stdout, re.MULTILINE)
    assert re.search(r"^trainable +125,635", done.stdout, re.MULTILINE)
    info = resadapt.read_adapter_info(tmp_path / "adapters.pt")
    assert [site.name for site in info.set.sites] == ["layer1", "layer2", "layer3", "layer4"]


def test_the_script_fails_if_the_reloaded_model_is_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = resadapt.load_adapters

    def load_another(model: nn.Module, path: Path) -> nn.Module:
        load(model, path)
        with torch.no_grad():
            for parameter in resadapt.trainable_parameters(model):
                parameter.neg_()
        return model

    monkeypatch.setattr(resadapt, "load_adapters", load_another)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *FEW, str(tmp_path)])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(
        SystemExit, match="The reloaded model or the frozen backbone is not what it was"
    ):
        runpy.run_path(str(SCRIPT), run_name="__main__")


def test_the_script_is_as_short_as_the_documentation_says() -> None:
    lines = SCRIPT.read_text().splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 100
