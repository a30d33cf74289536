"""Sites and widths for a budget, and the list of families."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import images, picture, small_resnet
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet18

import resadapt
import resadapt.adapters.conv

MODEL = small_resnet()


@settings(max_examples=15, deadline=None)
@given(st.integers(1_600, 2_000_000), st.sampled_from(["pooled", "bottleneck", "mona"]))
def test_the_largest_widths_within_the_budget(budget: int, family: str) -> None:
    try:
        layers = resadapt.suggest_layers(MODEL, budget, family=family)
    except resadapt.AdapterError as error:
        assert "No adapter fits the budget" in str(error)
        return
    model = resadapt.inject_adapters(small_resnet(), layers, family=family)
    count = resadapt.count_parameters(model).adapters
    assert count == sum(layers.parameters.values()) <= budget
    if len(layers) == 4:
        wider = {name: width + 1 for name, width in layers.items()}
        model = resadapt.inject_adapters(small_resnet(), wider, family=family)
        assert resadapt.count_parameters(model).adapters > budget, "one more everywhere is too much"


def test_a_share_of_the_model_and_its_table() -> None:
    before = picture(MODEL)
    layers = resadapt.suggest_layers(MODEL, 0.01)
    assert picture(MODEL) == before
    total = sum(p.numel() for p in MODEL.parameters())
    assert sum(layers.parameters.values()) <= 0.01 * total < 1.1 * sum(layers.parameters.values())
    assert "0.99% of the model's. Widths are the same fraction" in str(layers)
    shares = [
        layers[name] / channels for name, channels in zip(layers, (64, 128, 256, 512), strict=True)
    ]
    assert max(shares) - min(shares) < 1 / 64


def test_families_without_a_width_get_the_last_sites() -> None:
    layers = resadapt.suggest_layers(MODEL, 3000, family="ssf", layers="layer*.*.bn2")
    assert list(layers) == ["layer3.0.bn2", "layer3.1.bn2", "layer4.0.bn2", "layer4.1.bn2"][1:]
    model = resadapt.inject_adapters(small_resnet(), layers, family="ssf")
    assert (
        resadapt.count_parameters(model).adapters
        == sum(layers.parameters.values())
        == 2 * (256 + 512 + 512)
    )


def test_operations_are_counted_and_limited() -> None:
    x = images(1, 64)
    free = resadapt.suggest_layers(MODEL, 100_000, family="bottleneck", example_input=x)
    half = sum(free.flops.values()) // 2
    layers = resadapt.suggest_layers(
        MODEL, 100_000, family="bottleneck", example_input=x, flops=half
    )
    assert sum(layers.flops.values()) <= half
    assert sum(layers.parameters.values()) < sum(free.parameters.values())
    assert "FLOPs" in str(layers)
    model = resadapt.inject_adapters(small_resnet(), layers, family="bottleneck").eval()
    with FlopCounterMode(display=False) as adapted, torch.no_grad():
        model(x)
    with (
        FlopCounterMode(display=False) as plain,
        torch.no_grad(),
        resadapt.adapters_disabled(model),
    ):
        model(x)
    assert adapted.get_total_flops() - plain.get_total_flops() == sum(layers.flops.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 0}, "budget=0: pass an int"),
        ({"budget": 1.5}, "budget=1.5"),
        ({"budget": True}, "budget=True"),
        ({"budget": 10}, r"the adapter at 'layer4' has 1,537 parameters"),
        ({"budget": 10_000, "flops": 1000}, "requires example_input"),
        ({"budget": 10_000, "family": "x"}, "family='x' does not exist"),
        ({"budget": 10_000, "layers": "layer9"}, "matches no module"),
    ],
)
def test_unsuitable_budgets(arguments: Any, message: str) -> None:
    with pytest.raises(resadapt.AdapterError, match=message):
        resadapt.suggest_layers(MODEL, **arguments)


def test_families_are_listed_with_all_that_is_known_of_them() -> None:
    families = {info.name: info for info in resadapt.list_families()}
    assert {"pooled", "series", "bottleneck", "ssf", "mona"} <= families.keys()
    for info in families.values():
        assert info.reads in ("output", "input", "weight")
        assert info.formula
    assert not families["pooled"].foldable
    assert families["ssf"].foldable


def test_a_family_that_does_not_take_every_width_is_asked_for_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once all widths below 64 times the channels were built, one by one: minutes."""
    built = []
    inside = resadapt.adapters.conv.ConvAdapter.__init__

    @functools.wraps(inside)
    def counted(self: Any, *args: Any, **options: Any) -> None:
        built.append(args)
        inside(self, *args, **options)

    monkeypatch.setattr(resadapt.adapters.conv.ConvAdapter, "__init__", counted)
    options = {"family": "conv", "layers": "layer*.*", "scheme": "residual-sequential"}
    layers = resadapt.suggest_layers(MODEL, 2_000_000, **options)
    assert [layers[f"layer{n}.0"] for n in (1, 2, 3, 4)] == [64, 128, 256, 512], (
        "as wide as the family allows"
    )
    assert len(built) < 500
    layers = resadapt.suggest_layers(MODEL, 110_000, **options)
    assert all(512 % width == 0 for width in layers.values())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"bottleneck": 3}, resadapt.InjectionError, "'bottleneck' is not a family option"),
        ({"init": "bogus"}, resadapt.InjectionError, "init='bogus' is not known"),
        ({"layers": {"layer1": 3}}, resadapt.AdapterError, "suggest_layers chooses the widths"),
    ],
)
def test_what_would_be_ignored_is_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        resadapt.suggest_layers(resnet18(), 0.01, **arguments)


def test_a_model_without_parameters() -> None:
    chosen = resadapt.suggest_layers(
        nn.Sequential(nn.ReLU()),
        500,
        layers="0",
        example_input=torch.randn(1, 3, 4, 4),
        channel_dim={"0": 1},
    )
    assert sum(chosen.parameters.values()) <= 500
