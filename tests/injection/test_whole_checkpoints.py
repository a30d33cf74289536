"""A state_dict holds every set and the plain backbone, whichever set is active."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support import backbone_bytes, images, private, scramble, total
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torchvision.models.resnet import BasicBlock, ResNet

import resadapt

SETS: dict[str, dict[str, Any]] = {
    "pooled": {"layers": "layer4", "head": "fc"},
    "equal": {"layers": ("layer1.0.conv1", "fc"), "family": "lora", "bottleneck": 2},
    "wide": {"layers": (), "head": {"fc": nn.Linear(512, 10)}},
    "other class": {
        "layers": "layer2",
        "head": {"fc": nn.Sequential(nn.Linear(512, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))},
    },
    "affine": {"layers": (), "norm": "affine"},
    "stats": {"layers": "layer3", "family": "ssf", "norm": "stats", "head": "fc"},
    "affine_stats": {"layers": (), "norm": "affine+stats", "head": ["layer4.0", "fc"]},
}
ACTIVE: tuple[str | None, ...] = (None, *(name.replace(" ", "-") for name in SETS))
X = images(4)


def backbone() -> Any:
    torch.manual_seed(0)
    return scramble(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3))


def injected(seed: int) -> Any:
    """A model with every kind of set, of which the numbers of all sets, not of the backbone, depend
    on the seed.
    """
    model = backbone()
    for name, arguments in SETS.items():
        model = resadapt.inject_adapters(
            model, name=name.replace(" ", "-"), **copy.deepcopy(arguments)
        )
    for number, module in enumerate(
        m for m in model.modules() if type(m).__name__ == "AdapterSlot"
    ):
        scramble(module, 1000 * seed + number)
    return model.eval()


@pytest.fixture(scope="module")
def source() -> Any:
    return injected(1)


@pytest.fixture(scope="module")
def expected(source: Any) -> dict[str | None, Tensor]:
    return outputs(source)


@torch.no_grad()
def outputs(model: nn.Module) -> dict[str | None, Tensor]:
    found = {}
    for name in ACTIVE:
        resadapt.set_active_adapters(model, name)
        found[name] = model(X)
    return found


def assert_same(model: nn.Module, expected: dict[str | None, Tensor]) -> None:
    for name, output in outputs(model).items():
        assert torch.equal(output, expected[name]), name
    assert resadapt.check_backbone(model).ok


def test_sets_give_what_they_give_alone(expected: dict[str | None, Tensor]) -> None:
    assert len({tuple(output.flatten().tolist()) for output in expected.values()}) == len(ACTIVE)
    assert torch.equal(expected[None], backbone().eval()(X))


def test_loaded_with_every_combination_of_active_sets(
    source: Any, expected: dict[str | None, Tensor]
) -> None:
    target, fresh = injected(2), copy.deepcopy(injected(2).state_dict())
    for one, other in itertools.product(ACTIVE, ACTIVE):
        resadapt.set_active_adapters(source, one)
        target.load_state_dict(fresh)
        resadapt.set_active_adapters(target, other)
        target.load_state_dict(source.state_dict())
        with torch.no_grad():
            assert torch.equal(target(X), expected[other])
            resadapt.set_active_adapters(target, one)
            assert torch.equal(target(X), expected[one])
    assert_same(target, expected)


@pytest.mark.parametrize("active", ACTIVE)
def test_the_backbones_keys_hold_the_backbone(source: Any, active: str | None) -> None:
    resadapt.set_active_adapters(source, active)
    assert backbone_bytes(source) == backbone_bytes(backbone())
    state = source.state_dict()
    plain = backbone().state_dict()
    assert [key for key in state if ".resadapt." not in key] == list(plain)
    assert all(torch.equal(state[key], plain[key]) for key in plain)
    assert source.fc.out_features == 3


def by_torch_save(model: nn.Module, path: Path) -> nn.Module:
    torch.save(model.state_dict(), path / "all.pt")
    other = injected(2)
    other.load_state_dict(torch.load(path / "all.pt", weights_only=True))
    return other


def by_distributed_checkpoint(model: nn.Module, path: Path) -> nn.Module:
    dcp.save(model.state_dict(), checkpoint_id=path / "dcp")
    other = injected(2)
    state = other.state_dict()
    dcp.load(state, checkpoint_id=path / "dcp")
    other.load_state_dict(state)
    return other


def by_averaging(model: nn.Module, path: Path) -> nn.Module:
    averaged = AveragedModel(model, use_buffers=True)
    averaged.update_parameters(model)
    other = AveragedModel(injected(2), use_buffers=True)
    other.load_state_dict(averaged.state_dict())
    return other.module


def by_torch_save_whole(model: nn.Module, path: Path) -> nn.Module:
    torch.save(model, path / "model.pt")
    whole: nn.Module = torch.load(path / "model.pt", weights_only=False)
    return whole


WAYS: list[Callable[[nn.Module, Path], nn.Module]] = [
    *(by_torch_save, by_distributed_checkpoint, by_averaging, by_torch_save_whole),
    lambda model, path: copy.deepcopy(model),
    lambda model, path: pickle.loads(pickle.dumps(model)),
]


@pytest.mark.parametrize("active", ["wide", "affine_stats", None])
@pytest.mark.parametrize(
    "way", WAYS, ids=["torch.save", "dcp", "average", "torch.save whole", "deepcopy", "pickle"]
)
def test_every_set_comes_back(
    source: Any, expected: Any, active: str | None, way: Any, tmp_path: Path
) -> None:
    resadapt.set_active_adapters(source, active)
    other = way(source, tmp_path)
    if way is not by_averaging:
        assert_same(other, expected)
    # a float average of a number with itself is that number; the target's active set is its own
    else:
        for name, output in outputs(other).items():
            torch.testing.assert_close(output, expected[name], msg=str(name))
    resadapt.set_active_adapters(other, "wide")
    with torch.no_grad():
        private(other, "fc", "wide").weight.add_(1)
    assert_same(source, expected)


def test_one_optimizer_for_all_sets_trains_the_active_one_and_resumes() -> None:
    names = ("pooled", "wide", "affine", "affine_stats")

    def built() -> tuple[Any, torch.optim.Optimizer]:
        model, groups = injected(3), []
        for name in names:
            resadapt.set_active_adapters(model, name)
            groups += resadapt.parameter_groups(model, 0.01)
        return model, torch.optim.AdamW(groups)

    def steps(model: Any, optimizer: torch.optim.Optimizer, order: tuple[str, ...]) -> None:
        for name in order:
            resadapt.set_active_adapters(model, name)
            before = {other: resadapt.adapter_state_dict(model, other) for other in ACTIVE if other}
            optimizer.zero_grad()
            torch.manual_seed(0)  # of dropout
            total(model.train()(X)).backward()
            optimizer.step()
            for other, tensors in before.items():
                same = all(
                    torch.equal(t, tensors[key])
                    for key, t in resadapt.adapter_state_dict(model, other).items()
                )
                assert same is (other != name), (name, other)

    model, optimizer = built()
    steps(model, optimizer, ("pooled", "wide", "affine"))
    resumed, again = built()
    resumed.load_state_dict(copy.deepcopy(model.state_dict()))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, its in ((model, optimizer), (resumed, again)):
        steps(each, its, ("affine_stats", "pooled", "wide", "pooled"))
    for name in names:
        one, other = (resadapt.adapter_state_dict(each, name) for each in (model, resumed))
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert resadapt.check_backbone(model).ok


class Functional(nn.Module):
    """Reads the weight of its head in place of calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.batch_norm(
            self.conv(x), self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias
        )
        return nn.functional.linear(h.mean((2, 3)), self.fc.weight, self.fc.bias)


def test_a_head_whose_weight_is_read_elsewhere_is_named() -> None:
    model = resadapt.inject_adapters(Functional(), (), head="fc", norm="affine")
    with pytest.warns(
        resadapt.AdapterWarning, match=r"head or norms 'fc', 'bn' of set 'default' did not run"
    ):
        model(X)
    model = resadapt.inject_adapters(Functional(), "conv", 2).train()
    model(X)  # a set without a head has nothing to say about it


def test_attention_layers_that_read_the_weights_of_their_norms_do_not(source: Any) -> None:
    """In evaluation torch has one kernel for a whole encoder layer, which reads the weights of its
    modules.
    """
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    plain = layer(x)
    model = resadapt.inject_adapters(nn.Sequential(layer), (), norm="affine").eval()
    with torch.no_grad():
        assert torch.equal(model(x), layer(x))
        private(model, "0.norm2").bias.add_(1)
        torch.testing.assert_close(model(x), plain + 1)
