"""The study's models: what they compute, what they are called, how large they are, and their strict Stage 1 files."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from av1partition.models.stage1_files import Stage1FileError, load_backbone_from, load_stage1_backbone, save_stage1
from av1partition.models.stages import (
    AttentionResNet18,
    BackboneKind,
    SpatialAttention,
    SqueezeExcitation,
    Stage1Model,
    adapt_for_stage2,
    build_backbone,
    gray_resnet18,
    gray_stem,
    stage2_head,
)
from torch import nn
from torchvision.models import ResNet18_Weights, resnet18

from resadapt import count_parameters, list_adapters

KINDS: tuple[BackboneKind, ...] = ("plain", "attention")
HEAD_NAMES = {"head.head.0.weight", "head.head.0.bias", "head.head.3.weight", "head.head.3.bias", "temperature"}
ATTENTION_SHAPES = {
    f"backbone.se{n}.excitation.{i}.weight": [c // 16, c] if i == 0 else [c, c // 16]
    for n, c in enumerate((64, 128, 256, 512), start=1)
    for i in (0, 2)
} | {"backbone.spatial_attn.conv.weight": [1, 2, 7, 7]}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Path]:
    """Torch's download folder, empty."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    yield tmp_path / "checkpoints"
    torch.hub.set_dir(before)


def test_stem_is_the_mean_over_rgb() -> None:
    colour = resnet18().conv1
    stem = gray_stem(colour)
    assert stem.weight.shape == (64, 1, 7, 7)
    for channel in range(64):
        expected = (colour.weight[channel, 0] + colour.weight[channel, 1] + colour.weight[channel, 2]) / 3
        torch.testing.assert_close(stem.weight[channel, 0], expected)
    x = torch.rand(2, 1, 16, 16)
    torch.testing.assert_close(stem(x), colour(x.expand(-1, 3, -1, -1)) / 3)


@pytest.mark.parametrize("build", [gray_resnet18, AttentionResNet18])
def test_imagenet_weights_are_loaded(hub: Path, build: Callable[[ResNet18_Weights], nn.Module]) -> None:
    weights = ResNet18_Weights.IMAGENET1K_V1
    imagenet = resnet18().state_dict()
    torch.save(imagenet, hub / weights.url.rsplit("/", 1)[1])
    loaded = build(weights).state_dict()
    torch.testing.assert_close(loaded["conv1.weight"], imagenet["conv1.weight"].mean(1, keepdim=True))
    for name, tensor in imagenet.items():
        if not name.startswith(("conv1", "fc")):
            assert torch.equal(loaded[name], tensor)


def test_plain_backbone_is_torchvisions() -> None:
    ours, theirs = gray_resnet18().eval(), resnet18().eval()
    theirs.conv1, theirs.fc = copy.deepcopy(ours.conv1), nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    x = torch.rand(4, 1, 16, 16)
    assert torch.equal(ours(x), theirs(x))


def test_attention_backbone_by_hand() -> None:
    torch.manual_seed(0)
    model = AttentionResNet18().eval()
    x = torch.rand(2, 1, 32, 32)
    plain = gray_resnet18().eval()
    plain.load_state_dict({name: model.state_dict()[name] for name in plain.state_dict()})
    h = plain.maxpool(plain.relu(plain.bn1(plain.conv1(x))))
    for number in (1, 2, 3, 4):
        h = plain.get_submodule(f"layer{number}")(h)
        down, up = (model.state_dict()[f"se{number}.excitation.{i}.weight"] for i in (0, 2))
        pooled = h.flatten(2).mean(2)
        h = h * torch.sigmoid(torch.relu(pooled @ down.T) @ up.T).view(*pooled.shape, 1, 1)
    evidence = torch.stack([h.mean(1), h.max(1).values], dim=1)
    h = h * torch.sigmoid(nn.functional.conv2d(evidence, model.state_dict()["spatial_attn.conv.weight"], padding=3))
    torch.testing.assert_close(model(x), h.mean((2, 3)))


@pytest.mark.parametrize("kind", KINDS)
def test_study_names_and_shapes(kind: BackboneKind) -> None:
    state = Stage1Model(build_backbone(kind)).state_dict()
    torchvisions = {f"backbone.{name}" for name in resnet18().state_dict() if not name.startswith("fc.")}
    expected = torchvisions | HEAD_NAMES | (ATTENTION_SHAPES.keys() if kind == "attention" else set())
    assert state.keys() == expected
    assert state["head.head.0.weight"].shape == (256, 512)
    assert state["head.head.3.weight"].shape == (1, 256)
    if kind == "attention":
        assert {name: list(state[name].shape) for name in ATTENTION_SHAPES} == ATTENTION_SHAPES


@pytest.mark.parametrize("kind", KINDS)
def test_parameter_counts(kind: BackboneKind) -> None:
    model = adapt_for_stage2(build_backbone(kind), kind)
    counts = count_parameters(model)
    assert (counts.adapters, counts.head, counts.trainable) == (124_096, 1_539, 125_635)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 125_635
    assert sum(p.numel() for p in stage2_head().parameters()) == 1_539


def test_the_studys_50k_is_bottleneck_25() -> None:
    assert count_parameters(adapt_for_stage2(build_backbone("plain"), "plain", bottleneck=25)).adapters == 49_060


def test_attention_sites() -> None:
    (adapters,) = list_adapters(adapt_for_stage2(build_backbone("attention"), "attention"))
    sites = [(site.name, site.channels) for site in adapters.sites]
    assert sorted(sites) == [("se1", 64), ("se2", 128), ("se3", 256), ("spatial_attn", 512)]


@pytest.mark.parametrize("kind", KINDS)
def test_stage1_file_round_trip(kind: BackboneKind, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Stage1Model(build_backbone(kind)).eval()
    save_stage1(model, tmp_path / "stage1.pt")
    backbone, found = load_stage1_backbone(tmp_path / "stage1.pt")
    assert found == kind
    x = torch.rand(3, 1, 16, 16)
    assert torch.equal(backbone.eval()(x), model.backbone(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("left_out", [HEAD_NAMES, {"temperature"}])
def test_stage1_head_may_be_absent(kind: BackboneKind, left_out: set[str], tmp_path: Path) -> None:
    state = Stage1Model(build_backbone(kind)).state_dict()
    kept = {name: tensor for name, tensor in state.items() if name not in left_out}
    torch.save({"model_state_dict": kept, "epoch": 3}, tmp_path / "stage1.pt")
    assert load_stage1_backbone(tmp_path / "stage1.pt")[1] == kind


def test_scalar_temperature_is_read(tmp_path: Path) -> None:
    state = Stage1Model(build_backbone("plain")).state_dict() | {"temperature": torch.tensor(1.3)}
    torch.save({"model_state_dict": state}, tmp_path / "stage1.pt")
    load_stage1_backbone(tmp_path / "stage1.pt")


def change(name: str, to: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, Any]], object]:
    return lambda state: state.update({name: to(state[name])})


STEM, BN = "backbone.conv1.weight", "backbone.layer4.1.bn2.running_var"
BREAKAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "weight": (lambda s: s.pop("backbone.layer3.0.conv1.weight"), "missing backbone.layer3.0.conv1.weight"),
    "statistics": (lambda s: s.pop(BN), f"missing {BN}"),
    "gate": (lambda s: s.pop("backbone.se3.excitation.2.weight"), "missing backbone.se3.excitation.2.weight"),
    "spatial": (lambda s: s.pop("backbone.spatial_attn.conv.weight"), "missing backbone.spatial_attn.conv.weight"),
    "two": (
        lambda s: [s.pop(STEM), s.pop("backbone.bn1.bias")],
        "missing backbone.bn1.bias; missing backbone.conv1.weight",
    ),
    "extra": (lambda s: s.update({"backbone.fc.weight": torch.zeros(2)}), "unexpected backbone.fc.weight"),
    "extra head": (lambda s: s.update({"head.head.6.weight": torch.zeros(2)}), "unexpected head.head.6.weight"),
    "colour stem": (
        change(STEM, lambda t: t.expand(-1, 3, -1, -1)),
        r"backbone.conv1.weight has shape \[64, 3, 7, 7\], expected \[64, 1, 7, 7\]",
    ),
    "head shape": (change("head.head.3.bias", lambda t: torch.zeros(2)), r"head.head.3.bias has shape \[2\]"),
    "dtype": (change(BN, torch.Tensor.half), f"{BN} is torch.float16, expected torch.float32"),
    "not finite": (change(BN, lambda t: t * torch.nan), f"{BN} has values that are not finite"),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_wrong_stage1_file_is_refused_and_changes_nothing(name: str, tmp_path: Path) -> None:
    state = Stage1Model(build_backbone("attention")).state_dict()
    breaks, message = BREAKAGES[name]
    breaks(state)
    path = tmp_path / "stage1.pt"
    torch.save({"model_state_dict": state}, path)
    backbone = build_backbone("attention")
    before = copy.deepcopy(backbone.state_dict())
    with pytest.raises(Stage1FileError, match=message) as raised:
        load_backbone_from(backbone, path)
    assert str(path) in str(raised.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in backbone.state_dict().items())
    with pytest.raises(Stage1FileError, match=message):
        load_stage1_backbone(path)


def test_plain_file_is_no_attention_backbone(stage1_file: Callable[[BackboneKind], Path]) -> None:
    with pytest.raises(Stage1FileError, match=r"missing backbone.se1.excitation.0.weight.*missing backbone.spatial_attn"):
        load_backbone_from(build_backbone("attention"), stage1_file("plain"))
    with pytest.raises(Stage1FileError, match=r"unexpected backbone.se1.excitation.0.weight"):
        load_backbone_from(build_backbone("plain"), stage1_file("attention"))


@pytest.mark.parametrize(
    ("content", "message"),
    [({"state_dict": {}}, "has no 'model_state_dict'"), ([1], "has no 'model_state_dict'"),
     ({"model_state_dict": {"a": 1}}, "has no 'model_state_dict' of tensors")],
)  # fmt: skip
def test_other_files_are_refused(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "stage1.pt")
    with pytest.raises(Stage1FileError, match=message):
        load_stage1_backbone(tmp_path / "stage1.pt")


def test_damaged_and_absent_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "stage1.pt").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(Stage1FileError, match="cannot be read as tensors"):
        load_stage1_backbone(tmp_path / "stage1.pt")
    with pytest.raises(Stage1FileError, match=r"no such file; make one with train_stage1\.py"):
        load_stage1_backbone(tmp_path / "none.pt")


@pytest.mark.parametrize("module", [SqueezeExcitation(32), SpatialAttention()])
def test_attention_has_no_bias(module: nn.Module) -> None:
    assert all(name.endswith("weight") for name, _ in module.named_parameters())


class Opens:
    """Would open a file when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("opened-by-pickle", "w"))


def test_pickled_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model_state_dict": Opens()}, tmp_path / "stage1.pt")
    with pytest.raises(Stage1FileError, match="cannot be read as tensors"):
        load_stage1_backbone(tmp_path / "stage1.pt")
    assert not (tmp_path / "opened-by-pickle").exists()
