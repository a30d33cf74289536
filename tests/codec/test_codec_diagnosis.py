"""What trees see: each part of a backbone against pooling by hand, and a real short run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import diagnosis
import pytest
import torch
from av1partition.data.inputs import quantizer_code, with_quantizer
from av1partition.models.backbones import BackboneKind
from av1partition.models.stage1_files import load_stage1
from av1partition.training.state import TrainingStateError
from torch.utils.data import TensorDataset


def test_a_tap_has_the_quarters_of_the_map(stage1_file: Callable[[BackboneKind], Path]) -> None:
    backbone = load_stage1(stage1_file("plain")).backbone.eval()
    x = with_quantizer(torch.rand(3, 1, 16, 16), torch.tensor([20, 80, 220]))
    with torch.no_grad():
        h = backbone.get_submodule("maxpool")(backbone.relu(backbone.bn1(backbone.conv1(x[:, :1]))))
        quarters = [h[:, :, i : i + 2, j : j + 2].mean((2, 3)) for i in (0, 2) for j in (0, 2)]
        torch.testing.assert_close(
            diagnosis.Tap(backbone, "maxpool")(x), torch.stack(quarters, dim=2).flatten(1)
        )
        # Behind layer4 a single position is left, which is what the heads see.
        torch.testing.assert_close(diagnosis.Tap(backbone, "layer4")(x), backbone(x[:, :1]))


def test_the_quantizer_is_behind_the_numbers_where_it_is_asked_for() -> None:
    data = TensorDataset(
        with_quantizer(torch.rand(2, 1, 16, 16), torch.tensor([40, 64])), torch.tensor([0, 1])
    )
    seen = torch.rand(2, 22)
    without, beside = (
        diagnosis._with_code(seen, data, quantizer).tensors for quantizer in (False, True)
    )
    assert without[0] is seen
    assert torch.equal(beside[0], torch.cat([seen, quantizer_code(data.tensors[0])], dim=1))
    assert without[1] is beside[1] is data.tensors[1]


def test_every_part_and_both_learners_are_measured(
    tiny_dataset: Path,
    stage1_file: Callable[[BackboneKind], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(diagnosis, "EPOCHS", 2)
    new_trees = diagnosis.new_trees
    monkeypatch.setattr(diagnosis, "new_trees", lambda seed: new_trees(seed).set_params(max_iter=5))
    model, output = stage1_file("plain"), tmp_path / "out"
    where = ["--dataset-dir", str(tiny_dataset), "--output-dir", str(output)]
    with pytest.raises(SystemExit):
        diagnosis.main([*where, "--stage1-models", str(model), str(model)])
    assert not output.exists(), "a bad flag is answered before anything starts"
    diagnosis.main([*where, "--stage1-models", str(model)])
    result = json.loads((output / "diagnosis.json").read_text())
    name = model.parent.name
    assert [(row["seen"], row["numbers"]) for row in result["rows"]] == [
        ("hand-made numbers", 22),
        *((f"{name}: {end}", size) for end, size in zip(("maxpool", "layer1", "layer2", "layer3", "layer4"),
                                                         (256, 256, 512, 256, 512), strict=True)),
    ]  # fmt: skip
    for row in result["rows"]:
        assert all(0 <= row[key] <= 1 for key in ("trees", "network", "trees-q", "network-q"))
        assert len({row["trees"], row["trees-q"]}) + len({row["network"], row["network-q"]}) > 2, (
            "the quantizer is seen"
        )
    first = (output / "diagnosis.json").read_bytes()
    (output / "diagnosis.json").write_text(json.dumps({**result, "rows": result["rows"][:4]}))
    measured = []
    monkeypatch.setattr(
        diagnosis,
        "_seen_by",
        lambda tap, data, see=diagnosis._seen_by: measured.append(tap.end) or see(tap, data),
    )
    diagnosis.main([*where, "--stage1-models", str(model)])
    assert measured == ["layer3", "layer4"], "an interrupted run goes on"
    assert (output / "diagnosis.json").read_bytes() == first
    with pytest.raises(
        TrainingStateError,
        match=r"diagnosis\.json: is of other data, Stage 1 files or another seed",
    ):
        diagnosis.main([*where, "--stage1-models", str(model), "--seed", "1"])
    assert (output / "diagnosis.md").read_text() == diagnosis.table(result["rows"]) + "\n"
