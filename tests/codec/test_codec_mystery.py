"""The checkpoints that lost their F1: each way reproduced, and found by resadapt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mystery
import pytest
import torch
from av1partition.data.tasks import STAGE2
from av1partition.models.backbones import BackboneKind
from av1partition.models.cascade import Answers, Cascade, adapt
from av1partition.models.hand_made import HandMadeStage2
from av1partition.models.stage1_files import load_stage1

from resadapt import adapter_state_dict


@pytest.mark.parametrize("kind", ["plain", "fine"])
def test_the_hand_made_model_is_the_same_model(
    kind: BackboneKind, stage1_file: Callable[[BackboneKind], Path]
) -> None:
    torch.manual_seed(0)
    hand = HandMadeStage2(load_stage1(stage1_file(kind)).backbone)
    model = adapt(Cascade(load_stage1(stage1_file(kind))), STAGE2)
    with torch.no_grad():
        for name, tensor in adapter_state_dict(model).items():
            if name.startswith("head."):
                hand.head.get_parameter(name.rpartition(".")[2]).copy_(tensor)
        for number, adapters in enumerate(hand.adapters, start=1):
            ours = model.backbone.get_submodule(f"layer{number}.1.resadapt.stage2")
            for which, layer in (("down", adapters[0]), ("up", adapters[3])):
                ours.get_submodule(which).weight.normal_(std=0.1)
                layer.load_state_dict(ours.get_submodule(which).state_dict())
    x = torch.rand(5, 2, 16, 16)
    torch.testing.assert_close(hand.eval()(x), Answers(model, STAGE2).eval()(x))


def test_all_ways_are_found(
    tiny_dataset: Path,
    stage1_file: Callable[[BackboneKind], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    where = [
        "--dataset-dir",
        str(tiny_dataset),
        "--stage1-model",
        str(stage1_file("plain")),
        "--output-dir",
        str(tmp_path),
    ]
    mystery.main([*where, "--epochs", "10", "--blocks", "128", "--batch-size", "16"])
    result = json.loads((tmp_path / "mystery.json").read_text())
    curves, cases = result["curves"], result["cases"]
    assert all(record["live"] == record["reloaded"] for record in curves["resadapt"])
    assert any(record["live"] != record["reloaded"] for record in curves["norms move"])
    assert curves["norms move"][:8] == curves["unfrozen"][:8]
    assert curves["norms move"][8:] != curves["unfrozen"][8:]
    assert all(case["passes_the_studys_check"] for case in cases.values()), "it cannot fail"
    answers = {key: case["resadapt"] for key, case in cases.items()}
    assert answers["a"] == "cannot happen: the difference is 0.0"
    assert answers["b"].startswith("BackboneDriftError: ")
    assert answers["c"].startswith("BackboneMismatchError: ")
    assert answers["d"].startswith(
        "report.ok is False: not checked, they were recorded on another input"
    )
    assert not (tmp_path / "unfrozen.pt").exists()
    assert "| b | the backbone unfrozen at epoch 9" in capsys.readouterr().out
    assert (tmp_path / "mystery.png").read_bytes().startswith(b"\x89PNG")


def test_too_few_epochs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        mystery.main(
            ["--stage1-model", "none.pt", "--output-dir", str(tmp_path / "run"), "--epochs", "8"]
        )
    assert "expected at least 9, where the backbone is unfrozen" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
