"""Norm policies: a set's own affine parameters and statistics; the backbone's stay."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from support import backbone_bytes, images, picture, private, small_net, small_resnet, train
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torchvision.models import resnet18, resnet50

import resadapt

POLICIES = ("affine", "stats", "affine+stats")


def of_norms(model: nn.Module, name: str) -> dict[str, Tensor]:
    return {
        key: t
        for key, t in resadapt.adapter_state_dict(model, name).items()
        if key.startswith("norms.")
    }


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_moves_what_it_says_and_nothing_else(policy: str) -> None:
    model, x = small_resnet().eval(), images()
    before, plain = picture(model), model(x)
    bytes_before = backbone_bytes(model)
    resadapt.inject_adapters(model, "layer4", 4, norm=policy, head="fc")
    start = of_norms(model, "default")
    train(model, torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1), steps=3)
    moved = {
        key.rpartition(".")[2]
        for key, tensor in of_norms(model, "default").items()
        if not torch.equal(tensor, start[key])
    }
    expected: set[str] = set()
    if "affine" in policy:
        expected |= {"weight", "bias"}
    if "stats" in policy:
        expected |= {"running_mean", "running_var", "num_batches_tracked"}
    assert moved == expected
    assert resadapt.check_backbone(model).ok
    with resadapt.adapters_disabled(model):
        assert torch.equal(model.eval()(x), plain)
        assert backbone_bytes(model) == bytes_before
    resadapt.remove_adapters(model)
    assert picture(model) == before


@pytest.mark.parametrize(("build", "count"), [(resnet18, 9600), (resnet50, 53120)])
def test_the_affine_parameters_of_all_norms(build: type, count: int) -> None:
    model = build()
    by_hand = sum(
        2 * module.num_features for module in model.modules() if isinstance(module, nn.BatchNorm2d)
    )
    resadapt.inject_adapters(model, (), norm="affine")
    assert resadapt.count_parameters(model).trainable == by_hand == count
    assert resadapt.count_parameters(model).norm == count
    assert resadapt.list_adapters(model)[0].norm_parameters == count


def test_statistics_alone_have_nothing_to_train_and_are_estimated_in_one_pass() -> None:
    model = resadapt.inject_adapters(small_resnet(), (), norm="stats")
    assert list(resadapt.trainable_parameters(model)) == []
    shifted = [3 * images(seed=seed) + 1 for seed in range(4)]
    torch.optim.swa_utils.update_bn(shifted, model)
    expected = small_resnet()
    torch.optim.swa_utils.update_bn(shifted, expected)
    assert torch.equal(private(model, "bn1").running_mean, expected.bn1.running_mean)
    assert torch.equal(model.eval()(shifted[0]), expected.eval()(shifted[0]))
    assert resadapt.check_backbone(model).ok


@pytest.mark.parametrize("policy", POLICIES)
def test_norms_travel_in_the_file(policy: str, tmp_path: Path) -> None:
    model, x = small_resnet(), images()
    weights = copy.deepcopy(model.state_dict())
    resadapt.inject_adapters(model, "layer3", 4, norm=policy, head="fc")
    train(model, torch.optim.SGD(resadapt.trainable_parameters(model), lr=0.1))
    assert resadapt.save_adapters(model, tmp_path / "a", probe=x, rebuild=small_resnet).ok
    fresh = small_resnet(seed=5)
    fresh.load_state_dict(weights)
    resadapt.load_adapters(fresh, tmp_path / "a")
    assert torch.equal(fresh.eval()(x), model.eval()(x))
    assert resadapt.list_adapters(fresh)[0].norm == policy


def test_sets_with_different_policies_switch() -> None:
    model, x = small_resnet(), images()
    outputs = {}
    for name, policy in (("f", "frozen"), ("a", "affine"), ("s", "stats"), ("b", "affine+stats")):
        resadapt.inject_adapters(model, "layer4", 4, name=name, norm=policy, head="fc")
        train(model, torch.optim.SGD(model.parameters(), lr=0.1))
        outputs[name] = model.eval()(x)
    for name in ("a", "f", "b", "s", "f", "a"):
        resadapt.set_active_adapters(model, name)
        assert torch.equal(model.eval()(x), outputs[name])
        model.train()
        before = of_norms(model, "s")
        model(x)
        assert all(torch.equal(before[k], t) for k, t in of_norms(model, "s").items()) is (
            name != "s"
        )
        outputs[name] = model.eval()(x)  # its own statistics have moved, if it has any


def test_parameter_groups_have_one_for_norms() -> None:
    model = resadapt.inject_adapters(small_resnet(), "layer4", head="fc", norm="affine")
    groups = resadapt.parameter_groups(model, 0.1, head_lr=0.2, norm_lr=0.3)
    assert [(group["name"], group["lr"], len(group["params"])) for group in groups] == [
        ("adapters", 0.1, 4),
        ("head", 0.2, 2),
        ("norm", 0.3, 40),
    ]


def test_a_site_may_be_a_norm_of_the_sets_own() -> None:
    model, x = small_resnet(), images()
    before = picture(model)
    resadapt.inject_adapters(model, "layer4.1.bn2", 4, norm="affine+stats")
    train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    adapted = model.eval()(x)
    resadapt.set_active_adapters(model, None)
    assert not torch.equal(model.eval()(x), adapted)
    resadapt.set_active_adapters(model, "default")
    assert torch.equal(model.eval()(x), adapted)
    model.train()
    resadapt.remove_adapters(model)
    assert picture(model.train())["state_dict"] == before["state_dict"]


def test_norms_of_other_kinds() -> None:
    model = resadapt.inject_adapters(small_net(norm=nn.GroupNorm(2, 4)), (), norm="affine")
    assert resadapt.count_parameters(model).norm == 8
    with pytest.raises(resadapt.InjectionError, match="no norm of the backbone outside the head"):
        resadapt.inject_adapters(small_net(norm=nn.GroupNorm(2, 4)), (), norm="stats")


def test_unknown_policy() -> None:
    with pytest.raises(
        resadapt.InjectionError, match="'frozen', 'affine', 'stats', 'affine\\+stats'"
    ):
        resadapt.inject_adapters(small_resnet(), norm="batch")


@pytest.mark.parametrize("away", ["switched", "disabled", "mixed"])
def test_starting_norms_anew_does_not_reach_the_adapters_of_other_sets(away: str) -> None:
    model, x = small_net(), images(4)
    resadapt.inject_adapters(model, "conv", family="series", batch_norm=True, init="he", name="a")
    norm = resadapt.adapter_state_dict(model, "a")
    for _ in range(3):
        model.train()(x)
    expected, state = model.eval()(x), resadapt.adapter_state_dict(model, "a")
    assert not torch.equal(
        norm["adapters.conv.norm.running_mean"], state["adapters.conv.norm.running_mean"]
    )
    model.train()
    if away == "switched":
        resadapt.inject_adapters(model, layers=(), norm="stats", name="fog")
        update_bn([x + 3], model)
        resadapt.set_active_adapters(model, "a")
    elif away == "disabled":
        with resadapt.adapters_disabled(model):
            update_bn([x + 3], model)
    else:
        resadapt.inject_adapters(model, layers=(), norm="stats", name="fog")
        with resadapt.adapters_for(model, ["fog"] * 4):
            update_bn([x + 3], model)
        resadapt.set_active_adapters(model, "a")
    for key, tensor in resadapt.adapter_state_dict(model, "a").items():
        assert torch.equal(tensor, state[key]), key
    assert torch.equal(model.eval()(x), expected)
    for _ in range(2):  # and they move again
        model.train()(x)
    assert not torch.equal(
        resadapt.adapter_state_dict(model, "a")["adapters.conv.norm.running_mean"],
        state["adapters.conv.norm.running_mean"],
    )


def test_a_norm_with_two_names() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.norm = self.bn

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x))

    model = Twice().eval()
    before = picture(model)
    for policy in POLICIES:
        resadapt.inject_adapters(model, layers=(), norm=policy, name=policy.replace("+", "-"))
        model.train()(images())
    assert resadapt.check_backbone(model).ok
    assert picture(resadapt.remove_adapters(model)) == before
