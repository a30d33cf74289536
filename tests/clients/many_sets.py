"""A model with sets of several kinds, and whether all of them are still themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from roundtrip import PROVEN, seeded, small_images
from support import backbone_bytes
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

import resadapt

X = small_images()
SETS: dict[str, dict[str, Any]] = {
    "equal": {"layers": "layer4", "bottleneck": 8, "head": "fc"},
    "wide": {"layers": "layer3", "bottleneck": 8, "head": {"fc": nn.Linear(512, 5)}},
    "affine": {"layers": ("layer2", "layer4"), "bottleneck": 4, "norm": "affine"},
    "stats": {"layers": (), "norm": "stats", "head": "fc"},
    "headonly": {
        "layers": (),
        "head": {"fc": nn.Sequential(nn.Linear(512, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))},
    },
}
"""Heads of the backbone's width and of others, norms of a set's own, and sets without adapters."""


def _tiny_backbone() -> nn.Module:
    """A small network whose statistics are not the defaults."""
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3)
    with torch.no_grad():
        model.train()(X)
    return model


tiny_backbone: Callable[[], Any] = seeded(_tiny_backbone)


def with_many_sets(seed: int, active: str | None, dropout: float = 0.0) -> Any:
    """A tiny backbone with all sets, whose numbers depend on the seed."""
    model = tiny_backbone()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, arguments in SETS.items():
            resadapt.inject_adapters(model, name=name, **copy.deepcopy(arguments), dropout=dropout)
    for number, slot in enumerate(
        module for module in model.modules() if type(module).__name__ == "AdapterSlot"
    ):
        _shake(slot, 100 * seed + number)
    resadapt.set_active_adapters(model, active)
    return model


def _shake(module: nn.Module, seed: int) -> None:
    """Moves every tensor a little: with wild weights training would overflow."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.add_(0.02 * torch.rand(tensor.shape, generator=generator))


def optimizer_of_all_sets(model: Any, active: str) -> torch.optim.Optimizer:
    """One optimizer for every set, as somebody has who trains them in turns."""
    groups = []
    for name in SETS:
        resadapt.set_active_adapters(model, name)
        groups += resadapt.parameter_groups(model, 1e-3)
    resadapt.set_active_adapters(model, active)
    return torch.optim.AdamW(groups)


@torch.no_grad()
def outputs_of_all(model: Any) -> dict[str | None, Tensor]:
    """What each set, and the plain backbone, returns in evaluation; the model is left as it was."""
    (active,) = [info.name for info in resadapt.list_adapters(model) if info.active] or [None]
    training, found = model.training, {}
    model.eval()
    for name in (None, *SETS):
        resadapt.set_active_adapters(model, name)
        found[name] = model(X)
    resadapt.set_active_adapters(model, active)
    model.train(training)
    return found


def assert_all_sets_give(model: Any, expected: dict[str | None, Tensor]) -> None:
    """Asks for the bits of every set, and for the backbone that was injected into."""
    for name, output in outputs_of_all(model).items():
        assert torch.equal(output, expected[name]), name
    assert resadapt.check_backbone(model).ok
    plain = tiny_backbone()
    assert backbone_bytes(model) == backbone_bytes(plain)
    assert torch.equal(expected[None], plain.eval()(X))


def assert_same_sets(model: Any, other: Any) -> None:
    """Asks for the same bits in every tensor of every set, and in what the sets return."""
    for name in SETS:
        one, two = (resadapt.adapter_state_dict(each, name) for each in (model, other))
        assert one.keys() == two.keys()
        assert [key for key in one if not torch.equal(one[key], two[key])] == [], name
    assert_all_sets_give(model, outputs_of_all(other))


def assert_the_file_gives(model: Any, name: str, path: Path) -> None:
    """Saves one set with proof, and asks for its bits in a fresh backbone."""
    report = resadapt.save_adapters(model, path, name=name, probe=X, rebuild=tiny_backbone)
    assert all(
        report[line].outcome == "passed"
        for line in PROVEN
        if line != "sites" or SETS[name]["layers"]
    ), report
    reloaded = resadapt.load_adapters(tiny_backbone(), path).eval()
    with torch.no_grad():
        assert torch.equal(reloaded(X), outputs_of_all(model)[name])


def moved_sets(model: Any, before: dict[str, dict[str, Tensor]]) -> set[str]:
    """The sets in which something is not as it was."""
    return {
        name
        for name, tensors in kept_sets(model).items()
        if any(not torch.equal(t, before[name][k]) for k, t in tensors.items())
    }


def kept_sets(model: Any) -> dict[str, dict[str, Tensor]]:
    return {name: resadapt.adapter_state_dict(model, name) for name in SETS}
