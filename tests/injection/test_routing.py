"""The place of a head or norm runs the active set's private module, of whatever class."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from support import images, picture, private, small_net
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import resadapt

X = images(4)


def deep_head() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


class Meta(type):
    pass


class OwnMetaclass(nn.Linear, metaclass=Meta):
    def __init__(self) -> None:
        super().__init__(4, 2)


class OwnSlots(nn.Linear):
    __slots__ = ("extra",)

    def __init__(self) -> None:
        super().__init__(4, 2)
        self.extra = 3


@pytest.mark.parametrize("build", [OwnMetaclass, OwnSlots, deep_head, lambda: nn.Linear(4, 2)])
def test_places_of_any_class(build: Any) -> None:
    model = small_net(head=build()).eval()
    before, plain, kind = picture(model), model(X), type(model.head)
    resadapt.inject_adapters(model, (), head="head")
    assert type(model.head).__name__ == kind.__name__
    assert isinstance(model.head, kind)
    with torch.no_grad():
        for parameter in private(model, "head").parameters():
            parameter.zero_()
    assert not model.eval()(X).any()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other.head) is type(model.head)
        assert not other(X).any()
        resadapt.set_active_adapters(other, None)
        assert torch.equal(other(X), plain)
        resadapt.set_active_adapters(other, "default")
    assert picture(resadapt.remove_adapters(model)) == before


def test_a_slice_of_a_head_is_the_backbones() -> None:
    model = small_net(head=deep_head())
    resadapt.inject_adapters(model, (), head={"head": nn.Linear(4, 7)}).eval()
    h = torch.randn(2, 4)
    assert model.head(h).shape == (2, 7)
    assert [type(each).__name__ for each in model.head] == ["Linear", "ReLU", "Linear"]
    assert model.head[1:](h).shape == (2, 2)
    assert torch.equal(
        model.head[0](h), nn.functional.linear(h, model.head[0].weight, model.head[0].bias)
    )


def test_a_container_that_has_lost_its_last_module_says_so() -> None:
    model = small_net(head=deep_head())
    resadapt.inject_adapters(model, (), head={"head": nn.Linear(4, 7)}).eval()
    model.head.append(nn.Identity())
    with pytest.raises(resadapt.InjectionError, match="'head' has lost the private modules"):
        model(X)
    del model.head[3]
    assert model(X).shape == (4, 7)


@pytest.mark.parametrize("early", [False, True])
def test_a_parametrized_place(early: bool) -> None:
    model = small_net()
    if early:
        parametrizations.weight_norm(model.head)
    resadapt.inject_adapters(model, "c2", 2, head="head").eval()
    expected = model(X)
    if not early:  # of the backbone's module, which does not run
        parametrizations.weight_norm(model.head)
    assert torch.equal(model(X), expected)
    assert torch.equal(copy.deepcopy(model)(X), expected)
    parametrize.remove_parametrizations(model.head, "weight")
    assert torch.equal(model(X), expected)
    resadapt.remove_adapters(model)
    assert type(model.head) is nn.Linear


class CannotBeSubclassed(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 2)

    def __init_subclass__(cls) -> None:
        raise TypeError("final")


def replaced_forward() -> nn.Linear:
    head = nn.Linear(4, 2)
    forward = head.forward
    head.forward = lambda x: forward(x)  # type: ignore[method-assign]
    return head


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (CannotBeSubclassed, "cannot be subclassed: final"),
        (replaced_forward, "was replaced on the instance"),
        (lambda: torch.fx.symbolic_trace(deep_head()), "is an fx.GraphModule"),
        (lambda: nn.ParameterList([torch.zeros(2)]), "has no forward"),
    ],
)
def test_what_cannot_route_is_refused(head: Any, message: str) -> None:
    model = small_net(head=head())
    before = picture(model)
    with pytest.raises(resadapt.InjectionError, match=message):
        resadapt.inject_adapters(model, (), head="head")
    assert picture(model) == before


def test_a_forward_that_is_replaced_later_wraps_the_routed_one() -> None:
    model = small_net()
    resadapt.inject_adapters(model, (), head={"head": nn.Linear(4, 7)}).eval()
    expected, forward = model(X), model.head.forward
    model.head.forward = lambda x: 2 * forward(x)
    torch.testing.assert_close(model(X), 2 * expected)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)
        self.heads = nn.ModuleList([nn.Linear(4, 2), nn.Dropout(), nn.Linear(4, 3)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.conv(x).mean((2, 3))
        return self.heads[0](h), self.heads[2](self.heads[1](h))


def test_a_container_that_never_runs_stands_for_the_modules_inside(path: Any) -> None:
    model = resadapt.inject_adapters(Heads(), "conv", 2, head="heads").eval()
    assert resadapt.list_adapters(model)[0].head == ("heads.0", "heads.2")
    assert resadapt.save_adapters(model, path, rebuild=Heads).ok
    loaded = resadapt.load_adapters(Heads(), path).eval()
    assert all(torch.equal(one, other) for one, other in zip(model(X), loaded(X), strict=True))


@pytest.mark.parametrize("optimized", [False, True])
def test_a_forward_that_was_taken_from_a_module_outlives_the_injection(optimized: bool) -> None:
    """accelerate's hooks keep the forward that they find, and put it back later."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    plain = copy.deepcopy(model)
    resadapt.inject_adapters(model, (), norm="affine")
    if optimized:
        resadapt.optimize_backbone(model)
    model[1].forward = model[1].forward  # type: ignore[method-assign]
    resadapt.inject_adapters(model, (), name="second", norm="affine+stats", example_input=X)
    resadapt.remove_adapters(model)
    assert torch.equal(model.train()(X), plain.train()(X))
    assert model[1].num_batches_tracked == 1


def test_a_norm_whose_forward_was_replaced_before_is_frozen_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model[1].forward = model[1].forward  # type: ignore[method-assign]
    resadapt.inject_adapters(model, "0", 2).train()(X)
    assert resadapt.check_backbone(model).ok
    assert model[1].num_batches_tracked == 0


def test_an_empty_sequential_is_a_head_too() -> None:
    """A Sequential without modules is false in a condition."""
    model = small_net().eval()
    resadapt.inject_adapters(model, (), name="features", head={"head": nn.Sequential()}).eval()
    features = model(X)
    assert features.shape == (4, 4)
    with resadapt.adapters_for(model, ["features", None, "features", None]):
        assert [len(row) for row in model(X)] == [4, 2, 4, 2]
    assert torch.equal(resadapt.forward_all(model, X)["features"], features)
    resadapt.optimize_backbone(model, fold_norms=False)
    assert torch.equal(model(X), features)
