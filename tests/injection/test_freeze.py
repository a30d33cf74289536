"""Frozen means frozen: the four ways in which the study's backbone moved, and others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import backbone_bytes, images, picture, private, small_net, small_resnet, train
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

import resadapt

X = images(2, 8)


def test_study_1_batchnorm_statistics_in_train_mode() -> None:
    model = resadapt.inject_adapters(small_resnet(), head="fc")
    frozen = backbone_bytes(model, ("fc",))
    model.train()
    for _ in range(3):
        model(images() * 10 + 5)
    assert backbone_bytes(model, ("fc",)) == frozen
    assert resadapt.check_backbone(model).ok


def test_study_2_a_loop_that_unfreezes_at_epoch_9(tmp_path: Path) -> None:
    model = resadapt.inject_adapters(small_resnet(), head="fc")
    resadapt.save_adapters(model, tmp_path / "set.pt")
    saved = (tmp_path / "set.pt").read_bytes()
    for epoch in range(10):
        if epoch == 9:
            for parameter in model.layer4.parameters():
                parameter.requires_grad = True
        train(
            model,
            torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3),
            steps=1,
        )
    report = resadapt.check_backbone(model)
    assert not report.ok
    assert "layer4.0.conv1.weight" in report.drifted
    assert all(name.startswith("layer4.") for name in report.drifted)
    assert not any("running" in name or "resadapt" in name for name in report.drifted)
    with pytest.raises(
        resadapt.BackboneDriftError,
        match=r"'layer4\.0\.conv1\.weight' has other values.*Keep the backbone frozen",
    ):
        resadapt.save_adapters(model, tmp_path / "set.pt")
    with pytest.raises(resadapt.BackboneDriftError):
        resadapt.save_adapters(model, tmp_path / "set.pt", verify=False)
    assert (tmp_path / "set.pt").read_bytes() == saved
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set.pt"]


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, weight_decay=0.1),
    ],
)
def test_study_3_an_optimizer_built_before_injection(
    make: Callable[..., torch.optim.Optimizer],
) -> None:
    model = small_resnet()
    optimizer = make(model.parameters())
    train(model, optimizer)  # with momentum from real steps, and gradients left over
    resadapt.inject_adapters(model, head="fc")
    frozen = backbone_bytes(model, ("fc",))
    optimizer.step()
    model.train()
    for _ in range(3):
        model(images()).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert backbone_bytes(model, ("fc",)) == frozen


def test_study_4_a_stage_1_file_loaded_after_injection(tmp_path: Path) -> None:
    model = resadapt.inject_adapters(small_resnet(0), head="fc")
    other = small_resnet(1).state_dict()
    model.load_state_dict(other, strict=False)
    drifted = resadapt.check_backbone(model).drifted
    assert "conv1.weight" in drifted
    assert "bn1.running_mean" in drifted
    assert "fc.weight" in drifted, "the set has a head, and this is the backbone's"
    with pytest.raises(resadapt.BackboneDriftError, match=r"'conv1\.weight'"):
        resadapt.save_adapters(model, tmp_path / "set.pt")
    assert not list(tmp_path.iterdir())


def test_any_mode_and_any_optimizer_over_all_parameters() -> None:
    model = resadapt.inject_adapters(small_resnet(), ["layer1", "layer4"], 4)
    frozen, adapter = backbone_bytes(model), resadapt.adapter_state_dict(model)
    for mode in (True, False, True):
        model.train(mode)
        model.layer1.train(not mode)
        model.bn1.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
        model(images()).square().sum().backward()
        optimizer.step()
    assert backbone_bytes(model) == frozen
    assert any(
        not torch.equal(adapter[key], value)
        for key, value in resadapt.adapter_state_dict(model).items()
    )


class OwnNorm(nn.Module):
    """A BatchNorm that somebody wrote, whose statistics are buffers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(x.mean((0, 2, 3)), alpha=0.1)
        return x - self.mean[:, None, None]


class BatchNormAct(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return torch.relu(super().forward(input))


@pytest.mark.parametrize(
    "norm",
    [
        OwnNorm,
        lambda: BatchNormAct(4),
        lambda: nn.InstanceNorm2d(4, track_running_stats=True),
        lambda: nn.SyncBatchNorm(4),
        lambda: nn.BatchNorm2d(4, momentum=None),
        lambda: nn.BatchNorm2d(4, affine=False),
        lambda: nn.utils.spectral_norm(nn.Conv2d(4, 4, 1)),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 1)),
    ],
)
def test_other_statistics_than_torchvisions(norm: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm(), nn.Conv2d(4, 4, 1))
    model.eval()
    x = images()
    plain = model(x)
    resadapt.inject_adapters(model, "2", 2, init="identity")
    frozen = backbone_bytes(model)
    model.train()
    assert torch.equal(model(x), plain), (
        "in training mode too, the norm does what it does in evaluation"
    )
    train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert backbone_bytes(model) == frozen
    resadapt.remove_adapters(model)
    model.train()
    before = backbone_bytes(model)
    if not isinstance(model[1], nn.SyncBatchNorm):  # which trains on accelerators only
        model(x)
        assert backbone_bytes(model) != before, "thawed"


def test_a_norm_without_statistics_is_left_alone() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 4, 1)
    )
    x = images()
    plain = model(x)
    resadapt.inject_adapters(model, "2", 2, init="identity")
    assert type(model[1]) is nn.BatchNorm2d
    assert torch.equal(model(x), plain)


def test_a_network_that_owns_a_buffer_keeps_its_training_behaviour(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.steps += 1
            return self.conv(x)

    model = resadapt.inject_adapters(Net(), "conv", 2)
    model.train()(images())
    assert model.steps == 1
    assert resadapt.check_backbone(model).drifted == ["steps"]
    with pytest.raises(resadapt.BackboneDriftError, match="'steps'"):
        resadapt.save_adapters(model, tmp_path / "set.pt")


def test_a_head_trains_its_norms() -> None:
    model = resadapt.inject_adapters(small_resnet(), ["layer1"], 4, head=["layer4.1", "fc"])
    frozen, head = backbone_bytes(model), private(model, "layer4.1").bn1.running_mean.clone()
    train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert backbone_bytes(model) == frozen
    assert not torch.equal(private(model, "layer4.1").bn1.running_mean, head)


def test_frozen_by_hand_stays_frozen() -> None:
    model = resadapt.inject_adapters(small_resnet(), head="fc")
    model.layer1.requires_grad_(False)
    names = [name for name, _ in resadapt.named_trainable_parameters(model)]
    assert not any(name.startswith("layer1") for name in names)
    with resadapt.adapters_disabled(model):
        pass
    assert [name for name, _ in resadapt.named_trainable_parameters(model)] == names


def test_sync_batchnorm_conversion_is_found_out() -> None:
    model = resadapt.inject_adapters(small_resnet())
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.bn1.running_mean.add_(1)
    assert resadapt.check_backbone(model).drifted == ["bn1.running_mean"]


class NormWithChildren(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, input: Tensor) -> Tensor:
        return self.act(super().forward(input))


def test_a_norm_with_children_is_frozen_too() -> None:
    parametrized = nn.BatchNorm2d(4)
    nn.utils.parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    for norm in (NormWithChildren(4), parametrized):
        model = resadapt.inject_adapters(small_net(norm=norm), "c2", 2)
        frozen = backbone_bytes(model)
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), inputs=X)
        assert backbone_bytes(model) == frozen


class NormAndActivation(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: no class for its frozen kind."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.relu(super().forward(input))


@pytest.mark.parametrize("policy", ["frozen", "affine", "stats"])
def test_update_bn_moves_own_statistics_only_in_norms_of_other_classes(policy: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), NormAndActivation(4), nn.Conv2d(4, 2, 1))
    model(X + 1)  # statistics that a reset would change
    before = picture(model)
    resadapt.inject_adapters(model, "2", 2, norm=policy, name="a")
    resadapt.inject_adapters(model, "2", 2, norm=policy, name="b")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(2):
        update_bn([X, X], model)
    moved = {
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])
    }
    counted = {
        f"1.resadapt.b@1.{key}" for key in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert moved == (counted if policy == "stats" else set())
    assert resadapt.check_backbone(model).ok
    resadapt.set_active_adapters(model, "a")
    resadapt.remove_adapters(model)
    assert picture(model) == before


def test_update_bn_leaves_frozen_statistics() -> None:
    model = resadapt.inject_adapters(small_net(), "c2", 2)
    model.bn.running_mean.data.fill_(0.5)
    averaged = AveragedModel(model)
    update_bn([X, X], averaged)
    assert averaged.module.bn.running_mean.tolist() == [0.5] * 4
    assert averaged(X).shape == (2, 2)


def test_a_norm_that_was_held_trains_in_a_head_at_once() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(4))
            self.bias = nn.Parameter(torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.mean += 1
            return x + self.bias[:, None, None]

    model = resadapt.inject_adapters(small_net(norm=Own()), "c2", 2, name="a").train()
    model(X)
    resadapt.inject_adapters(model, "c2", 2, name="b", head="bn")
    model(X)
    assert model.bn.mean.tolist() == [0.0] * 4
    assert private(model, "bn", "b").mean.tolist() == [1.0] * 4


def test_two_models_that_share_a_backbone() -> None:
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    one, two = (nn.Sequential(backbone, nn.Conv2d(4, 4, 1)) for _ in range(2))
    resadapt.inject_adapters(one, "1", 2)
    with pytest.raises(
        resadapt.InjectionError,
        match="frozen by an injection into another model that shares the module",
    ):
        resadapt.inject_adapters(two, "1", 2)
    assert resadapt.check_backbone(one).ok


def test_a_full_checkpoint_in_an_injected_skeleton(tmp_path: Path) -> None:
    """How every framework resumes: build, inject, load everything."""
    trained = resadapt.inject_adapters(small_resnet(3), head="fc", bottleneck=8)
    train(trained, torch.optim.SGD(resadapt.trainable_parameters(trained), lr=0.05))
    skeleton = resadapt.inject_adapters(small_resnet(0), head="fc", bottleneck=8)
    skeleton.load_state_dict(trained.state_dict())
    x = images()
    assert torch.equal(skeleton.eval()(x), trained.eval()(x))
    with pytest.raises(
        resadapt.BackboneDriftError,
        match=r"'conv1.weight' has other values.*call accept_backbone\(model\)",
    ):
        resadapt.save_adapters(skeleton, tmp_path / "set.pt")
    resadapt.accept_backbone(skeleton)
    assert resadapt.check_backbone(skeleton).ok
    assert resadapt.save_adapters(skeleton, tmp_path / "set.pt", rebuild=lambda: small_resnet(3)).ok
    loaded = resadapt.load_adapters(small_resnet(3), tmp_path / "set.pt").eval()
    assert torch.equal(loaded(x), trained(x))
    with pytest.raises(resadapt.BackboneMismatchError):
        resadapt.load_adapters(small_resnet(0), tmp_path / "set.pt")
    body = [child for name, child in trained.named_children() if name != "fc"]
    with resadapt.adapters_disabled(skeleton), resadapt.adapters_disabled(trained):
        features = nn.Sequential(*body, nn.Flatten())(x)
        assert torch.equal(
            nn.functional.linear(features, skeleton.fc.weight, skeleton.fc.bias), skeleton(x)
        )
    train(skeleton, torch.optim.SGD(skeleton.parameters(), lr=0.1, weight_decay=0.1))
    assert resadapt.check_backbone(skeleton).ok
    resadapt.remove_adapters(skeleton)
    assert torch.equal(skeleton.conv1.weight, trained.conv1.weight)


def test_accepting_freezes_norms_that_came_in_since() -> None:
    model = resadapt.inject_adapters(small_resnet(), head="fc")
    model.layer1[0].bn1 = nn.BatchNorm2d(64)
    assert (
        "layer1.0.bn1.running_mean"
        not in resadapt.check_backbone(resadapt.inject_adapters(small_resnet())).drifted
    )
    resadapt.accept_backbone(model)
    train(model, torch.optim.SGD(resadapt.trainable_parameters(model), lr=0.1))
    assert resadapt.check_backbone(model).ok
    with pytest.raises(resadapt.InjectionError, match="was not injected into"):
        resadapt.accept_backbone(small_resnet())
    model.fc = nn.Linear(512, 3)
    with pytest.raises(resadapt.InjectionError, match="has lost 'fc'"):
        resadapt.accept_backbone(model)


def test_accepting_leaves_norms_of_the_head_in_training() -> None:
    model = small_net(head=nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    resadapt.inject_adapters(model, "c2", 2, head="head").train()
    resadapt.accept_backbone(model)
    assert private(model, "head")[1].training
    assert [type(model.bn).__name__, type(private(model, "head")[1]).__name__] == [
        "FrozenBatchNorm2d",
        "BatchNorm1d",
    ]


def test_an_optimizer_that_writes_into_every_parameter_it_is_given() -> None:
    """LBFGS adds its step to all parameters as one vector, zeros to the frozen ones: -0.0 becomes
    0.0, which is drift.
    """
    for parameters, drifted in (
        (lambda m: m.parameters(), ["conv.weight"]),
        (resadapt.trainable_parameters, []),
    ):
        model = small_net()
        with torch.no_grad():
            model.conv.weight[0, 0, 0, 0] = -0.0
        resadapt.inject_adapters(model, "c2", 2, head="head")
        optimizer = torch.optim.LBFGS(parameters(model), max_iter=9)

        def loss(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            value = model(X).square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        assert resadapt.check_backbone(model).drifted == drifted
