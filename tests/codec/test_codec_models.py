"""The study's models.

What they compute, what they are called, how large they are, and their strict Stage 1 files.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from av1partition.data.inputs import with_quantizer
from av1partition.data.tasks import SPECIALISTS, STAGE1, STAGE2
from av1partition.models.backbones import (
    AttentionResNet18,
    BackboneKind,
    SpatialAttention,
    SqueezeExcitation,
    build_backbone,
    gray_resnet18,
    gray_stem,
)
from av1partition.models.cascade import Answers, Cascade, Stage1Model, adapt
from av1partition.models.stage1_files import Stage1FileError, load_stage1, save_stage1
from torch import nn
from torchvision.models import ResNet18_Weights, resnet18

from resadapt import count_parameters, list_adapters, remove_adapters, set_active_adapters

KINDS: tuple[BackboneKind, ...] = ("plain", "attention")
HEAD_NAMES = {
    "head.head.0.weight",
    "head.head.0.bias",
    "head.head.3.weight",
    "head.head.3.bias",
    "temperature",
}
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
        expected = (
            colour.weight[channel, 0] + colour.weight[channel, 1] + colour.weight[channel, 2]
        ) / 3
        torch.testing.assert_close(stem.weight[channel, 0], expected)
    x = torch.rand(2, 1, 16, 16)
    torch.testing.assert_close(stem(x), colour(x.expand(-1, 3, -1, -1)) / 3)


@pytest.mark.parametrize("build", [gray_resnet18, AttentionResNet18])
def test_imagenet_weights_are_loaded(
    hub: Path, build: Callable[[ResNet18_Weights], nn.Module]
) -> None:
    weights = ResNet18_Weights.IMAGENET1K_V1
    imagenet = resnet18().state_dict()
    torch.save(imagenet, hub / weights.url.rsplit("/", 1)[1])
    loaded = build(weights).state_dict()
    torch.testing.assert_close(
        loaded["conv1.weight"], imagenet["conv1.weight"].mean(1, keepdim=True)
    )
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
    h = h * torch.sigmoid(
        nn.functional.conv2d(evidence, model.state_dict()["spatial_attn.conv.weight"], padding=3)
    )
    torch.testing.assert_close(model(x), h.mean((2, 3)))


@pytest.mark.parametrize("kind", KINDS)
def test_study_names_and_shapes(kind: BackboneKind) -> None:
    state = Stage1Model(build_backbone(kind)).state_dict()
    torchvisions = {
        f"backbone.{name}" for name in resnet18().state_dict() if not name.startswith("fc.")
    }
    expected = (
        torchvisions | HEAD_NAMES | (ATTENTION_SHAPES.keys() if kind == "attention" else set())
    )
    assert state.keys() == expected
    assert state["head.head.0.weight"].shape == (256, 512)
    assert state["head.head.3.weight"].shape == (1, 256)
    if kind == "attention":
        assert {name: list(state[name].shape) for name in ATTENTION_SHAPES} == ATTENTION_SHAPES


def cascade(kind: BackboneKind = "plain") -> Cascade:
    torch.manual_seed(0)
    return Cascade(Stage1Model(build_backbone(kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_parameter_counts(kind: BackboneKind) -> None:
    model = adapt(cascade(kind), STAGE2)
    counts = count_parameters(model)
    assert (counts.adapters, counts.head, counts.trainable) == (124_096, 1_539, 125_635)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 125_635


def test_the_studys_50k_is_bottleneck_25() -> None:
    assert count_parameters(adapt(cascade(), STAGE2, bottleneck=25)).adapters == 49_060


def test_attention_sites() -> None:
    (adapters,) = list_adapters(adapt(cascade("attention"), STAGE2))
    sites = [(site.name.rpartition(".")[2], site.channels) for site in adapters.sites]
    assert sorted(sites) == [("se1", 64), ("se2", 128), ("se3", 256), ("spatial_attn", 512)]


@pytest.mark.parametrize("kind", KINDS)
def test_specialists_are_sets_in_one_model(kind: BackboneKind) -> None:
    """Each has a head of its own width; without any, the model is Stage 1."""
    model = cascade(kind).eval()
    x = with_quantizer(torch.rand(3, 1, 16, 16), torch.tensor([20, 100, 200]))
    alone = model.stage1(x)
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    outputs = {}
    for task in SPECIALISTS:
        adapt(model, task, quantizer=task is STAGE2)
        outputs[task.key] = Answers(model, task).eval()(x)
        assert outputs[task.key].shape == (3, len(task.classes))
        assert outputs[task.key].abs().min() > 0
    for task in SPECIALISTS:
        set_active_adapters(model, task.key)
        assert torch.equal(Answers(model, task)(x), outputs[task.key])
    set_active_adapters(model, None)
    assert torch.equal(Answers(model, STAGE1)(x), alone)
    assert all(not model(x)[task.key].any() for task in SPECIALISTS), (
        "heads that no set has brought"
    )
    remove_adapters(model)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_stage1_file_round_trip(kind: BackboneKind, tmp_path: Path) -> None:
    torch.manual_seed(0)
    # In the memory format that a file is loaded in; another one may round otherwise.
    model = Stage1Model(build_backbone(kind)).eval().to(memory_format=torch.channels_last)
    model.temperature.fill_(1.7)
    model.threshold = 0.35
    save_stage1(model, tmp_path / "stage1.pt")
    loaded = load_stage1(tmp_path / "stage1.pt").eval()
    x = torch.rand(3, 1, 16, 16)
    assert torch.equal(loaded(x), model(x))
    assert torch.equal(loaded.backbone(x), model.backbone(x))
    assert loaded.threshold == 0.35


@pytest.mark.parametrize("kinds", [False, True])
@pytest.mark.parametrize("quantizer", [False, True])
def test_stage1_files_tell_backbone_and_head(kinds: bool, quantizer: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = (
        Stage1Model(build_backbone("fine"), kinds=kinds, quantizer=quantizer)
        .eval()
        .to(memory_format=torch.channels_last)
    )
    save_stage1(model, tmp_path / "stage1.pt")
    loaded = load_stage1(tmp_path / "stage1.pt").eval()
    x = with_quantizer(torch.rand(3, 1, 16, 16), torch.tensor([20, 100, 200]))
    assert loaded.backbone.get_parameter("conv1.weight").shape == (64, 1, 3, 3)
    assert torch.equal(loaded(x), model(x))
    assert torch.equal(loaded(x), loaded(with_quantizer(x[:, :1], torch.zeros(3)))) is not quantizer


def test_partition_is_any_kind_but_none() -> None:
    torch.manual_seed(0)
    model = Stage1Model(build_backbone("fine"), kinds=True).eval()
    model.temperature.fill_(1.0)
    x = torch.rand(5, 1, 16, 16)
    kinds = model.answers(model.backbone(x), x).softmax(dim=1)
    torch.testing.assert_close(model(x)[:, 0].sigmoid(), kinds[:, 1:].sum(dim=1))


def test_the_fine_backbone_has_no_imagenet_weights() -> None:
    with pytest.raises(ValueError, match="no weights for it; leave them out"):
        build_backbone("fine", ResNet18_Weights.IMAGENET1K_V1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("left_out", [HEAD_NAMES, {"temperature"}])
def test_stage1_head_may_be_absent(kind: BackboneKind, left_out: set[str], tmp_path: Path) -> None:
    state = Stage1Model(build_backbone(kind)).state_dict()
    kept = {name: tensor for name, tensor in state.items() if name not in left_out}
    torch.save({"model_state_dict": kept, "epoch": 3}, tmp_path / "stage1.pt")
    loaded = load_stage1(tmp_path / "stage1.pt").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in kept.items())
    assert all(not loaded[name].any() for name in left_out - {"temperature"})
    assert loaded["temperature"] == 1


def test_scalar_temperature_is_read(tmp_path: Path) -> None:
    state = Stage1Model(build_backbone("plain")).state_dict() | {"temperature": torch.tensor(1.3)}
    torch.save({"model_state_dict": state}, tmp_path / "stage1.pt")
    assert load_stage1(tmp_path / "stage1.pt").temperature.tolist() == pytest.approx([1.3])


@pytest.mark.parametrize("threshold", [0, 1.0, -0.1, "0.5", float("nan"), None])
def test_strange_thresholds_are_refused(threshold: object, tmp_path: Path) -> None:
    torch.save(
        {
            "model_state_dict": Stage1Model(build_backbone("plain")).state_dict(),
            "threshold": threshold,
        },
        tmp_path / "stage1.pt",
    )
    with pytest.raises(Stage1FileError, match="'threshold' is"):
        load_stage1(tmp_path / "stage1.pt")


def change(
    name: str, to: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[dict[str, Any]], object]:
    return lambda state: state.update({name: to(state[name])})


STEM, BN = "backbone.conv1.weight", "backbone.layer4.1.bn2.running_var"
BREAKAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "weight": (
        lambda s: s.pop("backbone.layer3.0.conv1.weight"),
        "missing backbone.layer3.0.conv1.weight",
    ),
    "statistics": (lambda s: s.pop(BN), f"missing {BN}"),
    "gate": (
        lambda s: s.pop("backbone.se3.excitation.2.weight"),
        "missing backbone.se3.excitation.2.weight",
    ),
    "spatial": (
        lambda s: s.pop("backbone.spatial_attn.conv.weight"),
        "missing backbone.spatial_attn.conv.weight",
    ),
    "two": (
        lambda s: [s.pop(STEM), s.pop("backbone.bn1.bias")],
        "missing backbone.bn1.bias; missing backbone.conv1.weight",
    ),
    "extra": (
        lambda s: s.update({"backbone.fc.weight": torch.zeros(2)}),
        "unexpected backbone.fc.weight",
    ),
    "extra head": (
        lambda s: s.update({"head.head.6.weight": torch.zeros(2)}),
        "unexpected head.head.6.weight",
    ),
    "colour stem": (
        change(STEM, lambda t: t.expand(-1, 3, -1, -1)),
        r"backbone.conv1.weight has shape \[64, 3, 7, 7\], expected \[64, 1, 7, 7\]",
    ),
    "head shape": (
        change("head.head.3.bias", lambda t: torch.zeros(2)),
        r"head.head.3.bias has shape \[2\]",
    ),
    "dtype": (change(BN, torch.Tensor.half), f"{BN} is torch.float16, expected torch.float32"),
    "not finite": (change(BN, lambda t: t * torch.nan), f"{BN} has values that are not finite"),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_wrong_stage1_file_is_refused(name: str, tmp_path: Path) -> None:
    state = Stage1Model(build_backbone("attention")).state_dict()
    breaks, message = BREAKAGES[name]
    breaks(state)
    path = tmp_path / "stage1.pt"
    torch.save({"model_state_dict": state}, path)
    with pytest.raises(Stage1FileError, match=message) as raised:
        load_stage1(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [({"state_dict": {}}, "has no 'model_state_dict'"), ([1], "has no 'model_state_dict'"),
     ({"model_state_dict": {"a": 1}}, "has no 'model_state_dict' of tensors")],
)  # fmt: skip
def test_other_files_are_refused(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "stage1.pt")
    with pytest.raises(Stage1FileError, match=message):
        load_stage1(tmp_path / "stage1.pt")


def test_damaged_and_absent_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "stage1.pt").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(Stage1FileError, match="cannot be read as tensors"):
        load_stage1(tmp_path / "stage1.pt")
    with pytest.raises(Stage1FileError, match=r"no such file; make one with train_stage1\.py"):
        load_stage1(tmp_path / "none.pt")


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
        load_stage1(tmp_path / "stage1.pt")
    assert not (tmp_path / "opened-by-pickle").exists()
