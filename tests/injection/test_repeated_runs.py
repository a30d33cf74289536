"""A module that runs several times in one forward shares its adapter among the runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.detection import fcos_resnet50_fpn, retinanet_resnet50_fpn
from torchvision.models.optical_flow import raft_small
from torchvision.models.resnet import BasicBlock

import resadapt
from tests.support import images, picture


class Siamese(nn.Module):
    """An encoder for both pictures, a layer that runs three times, and an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3), BasicBlock(8, 8), BasicBlock(8, 8))
        self.again = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())
        self.act = nn.ReLU()
        self.fc = nn.Linear(8, 3)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        x = self.act(self.encoder(first)) - self.encoder(second)
        for _ in range(3):
            x = self.again(x)
        return self.fc(self.act(x).mean((2, 3)))


def siamese(**sets: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = Siamese().double()
    for name, arguments in sets.items():
        resadapt.inject_adapters(model, name=name, **arguments)
        with torch.no_grad():
            for parameter in resadapt.trainable_parameters(model):
                parameter.normal_(0, 0.3)
    return model


SITES: dict[str, Any] = {
    "layers": ["encoder.*", "again"],
    "bottleneck": 4,
    "family": "bottleneck",
    "head": "fc",
}
LORA: dict[str, Any] = {"layers": "again.0", "bottleneck": 2, "family": "lora", "norm": "affine"}
PAIR = (images(4, 8).double(), images(4, 8, seed=2).double())


def test_outputs_and_gradients_are_those_of_calls_by_hand() -> None:
    model, plain = siamese(a=SITES).train(), siamese().eval()
    plain.fc.load_state_dict(model.fc.resadapt._modules["a@fc"].state_dict())
    adapters = {
        site.name: model.get_submodule(site.owner).resadapt.a
        for site in resadapt.list_adapters(model)[0].sites
    }

    def encode(x: Tensor) -> Tensor:
        for number, block in enumerate(plain.encoder):
            x = adapters[f"encoder.{number}"](block(x))
        return x

    def by_hand(first: Tensor, second: Tensor) -> Tensor:
        x = plain.act(encode(first)) - encode(second)
        for _ in range(3):
            x = adapters["again"](plain.again(x))
        return plain.fc(plain.act(x).mean((2, 3)))

    parameters = [each for adapter in adapters.values() for each in adapter.parameters()]
    found, wanted = model(*PAIR), by_hand(*PAIR)
    torch.testing.assert_close(found, wanted)
    for one, other in zip(
        torch.autograd.grad(found.square().sum(), parameters),
        torch.autograd.grad(wanted.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_the_report_says_how_often(tmp_path: Path) -> None:
    model = siamese(a=SITES)
    report = resadapt.save_adapters(model, tmp_path / "a.pt", probe=PAIR, rebuild=siamese)
    assert report["sites"].detail == (
        "all 4 adapters ran on the probe; 'encoder.0' 2 times; 'encoder.1' 2 times; "
        "'encoder.2' 2 times; 'again' 3 times"
    )
    loaded = resadapt.load_adapters(siamese(), tmp_path / "a.pt").eval()
    assert torch.equal(loaded(*PAIR), model.eval()(*PAIR))


def test_an_example_input_shows_every_run() -> None:
    model = siamese(a=SITES | {"example_input": PAIR})
    assert len(resadapt.list_adapters(model)[0].sites) == 4


def test_an_activation_in_several_places_is_refused() -> None:
    model = siamese()
    before = picture(model)
    message = r"Site 'act' ran more than once in one forward, and has no weights"
    with pytest.raises(resadapt.InjectionError, match=message):
        resadapt.inject_adapters(model, "act", 2, example_input=PAIR)
    assert picture(model) == before
    model.act = nn.Sequential(nn.InstanceNorm2d(8))  # declares its channels, so nothing runs yet
    resadapt.inject_adapters(model, "act", 2)
    for _ in range(2):  # it goes on saying so
        with pytest.raises(resadapt.InjectionError, match=message):
            model(*PAIR)


def test_mixed_batches_and_all_sets_at_once() -> None:
    model = siamese(a=SITES, b=LORA).eval()
    separate = {}
    for name in ("a", "b", None):
        resadapt.set_active_adapters(model, name)
        separate[name] = model(*PAIR)
    names = ["b", "a", None, "a"]
    with resadapt.adapters_for(model, names):
        mixed = model(*PAIR)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], separate[name][row])
    for name, output in resadapt.forward_all(model, PAIR, ["a", "b", None]).items():
        assert torch.equal(output, separate[name])


@pytest.mark.parametrize("site", ["again", "encoder.2"])
def test_cached_features(site: str) -> None:
    class Mirrored(Siamese):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, x.flip(-1))

    torch.manual_seed(0)
    model, x = Mirrored(), images(6, 8)
    resadapt.inject_adapters(model, site, 4, family="bottleneck", head="fc", init="normal")
    cache = resadapt.cache_prefix(model, TensorDataset(x, torch.arange(6)), batch_size=2)
    for features, labels in DataLoader(cache, batch_size=3):
        assert torch.equal(cache.forward(features), model(x[labels]))


def test_a_head_that_runs_again_and_again() -> None:
    model = siamese(a={"layers": (), "head": "again"}, b=SITES).eval()
    separate = {}
    for name in ("a", "b", None):
        resadapt.set_active_adapters(model, name)
        separate[name] = model(*PAIR)
    names = ["a", None, "b", "a"]
    with resadapt.adapters_for(model, names):
        mixed = model(*PAIR)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], separate[name][row])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_calls(reentrant: bool) -> None:
    def gradients(run: Callable[[Any], Any]) -> list[Any]:
        model = siamese(a=SITES, b=LORA).train()
        encoder = model.encoder.forward
        model.encoder.forward = lambda x: run(lambda: encoder)(x)
        resadapt.set_active_adapters(model, "a")
        loss = model(*(each.clone().requires_grad_() for each in PAIR)).square().sum()
        with torch.no_grad(), resadapt.adapters_disabled(model):
            model(*PAIR)
        loss.backward()
        return [parameter.grad for parameter in resadapt.trainable_parameters(model)]

    found = gradients(lambda get: lambda x: checkpoint(get(), x, use_reentrant=reentrant))
    for one, other in zip(found, gradients(lambda get: get()), strict=True):
        torch.testing.assert_close(one, other)


def test_copies_folds_and_removal() -> None:
    model, plain = siamese(b=LORA).eval(), siamese()
    expected = model(*PAIR)
    assert torch.equal(resadapt.inference_copy(model)(*PAIR), expected)
    torch.testing.assert_close(resadapt.fold_adapters(model)(*PAIR), expected)
    resadapt.remove_adapters(model)
    assert torch.equal(model.eval()(*PAIR), plain.eval()(*PAIR))


@pytest.mark.parametrize("build", [retinanet_resnet50_fpn, fcos_resnet50_fpn])
def test_a_detection_head_runs_once_a_level(build: Any, tmp_path: Path) -> None:
    def backbone() -> Any:
        torch.manual_seed(0)
        return build(weights=None, weights_backbone=None, min_size=64, max_size=64, num_classes=3)

    picture_ = [images(1, 64)[0]]
    model = resadapt.inject_adapters(backbone(), "head.classification_head.conv.0", 4)
    target = [{"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])}]
    optimizer = torch.optim.SGD(resadapt.trainable_parameters(model), lr=0.01)
    sum(model.train()(picture_, target).values()).backward()
    assert all(each.grad.any() for each in resadapt.trainable_parameters(model))
    optimizer.step()
    report = resadapt.save_adapters(
        model, tmp_path / "head.pt", probe=(picture_,), rebuild=backbone
    )
    assert "'head.classification_head.conv.0' 5 times" in report["sites"].detail
    assert report.ok


def test_an_optical_flow_is_refined_again_and_again() -> None:
    model = raft_small(weights=None).eval()
    resadapt.inject_adapters(model, "update_block.flow_head.conv2", family="lora", bottleneck=1)
    frames = images(2, 128)
    flows = model(frames[:1], frames[1:], num_flow_updates=3)
    flows[-1].sum().backward()
    assert all(each.grad is not None for each in resadapt.trainable_parameters(model))
