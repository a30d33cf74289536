"""Saving and loading sets whose dtypes are not those of the backbone, bit for bit."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import images, picture, private, scramble, small_net, train
from torch import Tensor, nn

import resadapt
from resadapt.base.tensors import same_bits
from resadapt.injection.walk import slots_of

X = images(2, 16)


def injected(of: torch.dtype, family: str = "bottleneck", **options: Any) -> Any:
    model = small_net().to(of)
    sizes = {} if family in ("parallel", "series", "ssf", "offset") else {"bottleneck": 2}
    options = {"norm": "affine+stats", "head": "head", **sizes, **options}
    resadapt.inject_adapters(model, "c2", family=family, **options)
    for slot in slots_of(model):
        scramble(slot)
    return model


def assert_saves(model: nn.Module, path: Path, rebuild: Callable[[], nn.Module]) -> nn.Module:
    """Checks that a saved set is verified, and loaded bit for bit; returns the loaded model."""
    state = resadapt.adapter_state_dict(model)
    report = resadapt.save_adapters(model, path, rebuild=rebuild)
    assert report["tensors"].outcome == report["outputs"].outcome == "passed"
    assert resadapt.save_adapters(model, path).ok, "on a copy of the model too"
    assert resadapt.verify_adapters(model, path).ok
    loaded = resadapt.load_adapters(rebuild(), path).eval()
    again = resadapt.adapter_state_dict(loaded)
    assert state.keys() == again.keys()
    assert all(same_bits(state[key], again[key]) for key in state)
    x = X.to(next(model.parameters()).dtype)
    assert torch.equal(loaded(x), model.eval()(x))
    return loaded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("pooled", {"norm": "frozen", "dtype": torch.float64}),
        ("lora", {"norm": "affine"}),
        ("lora", {"dora": True, "norm": "stats"}),
        (
            "parallel",
            {"head": {"head": nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 5))}},
        ),
        ("series", {"batch_norm": True}),
        ("ssf", {"dtype": None}),
        ("mona", {}),
        ("bottleneck", {"head": ()}),
        ("conv", {}),
    ],
)
def test_a_set_in_a_half_precision_backbone_is_saved_bit_for_bit(
    family: str, options: dict[str, Any], dtype: torch.dtype, path: Path
) -> None:
    model = injected(dtype, family, **options)
    optimizer = torch.optim.SGD(resadapt.trainable_parameters(model), lr=0.01)
    train(model, optimizer, 2, X.to(dtype))
    assert_saves(model, path, lambda: small_net().to(dtype))


class Offset(resadapt.Adapter):
    """Has a constant that is not saved, and that rounding changes."""

    constant: Tensor

    def __init__(self, site: resadapt.Site) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.register_buffer("constant", torch.full((1,), 0.1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight * 3 + self.constant


CASTS: dict[str, Callable[[Any], object]] = {
    "up": lambda model: [slot.double() for slot in slots_of(model)],
    "down": lambda model: [slot.bfloat16() for slot in slots_of(model)],
    "an adapter": lambda model: model.c2.resadapt.default.bfloat16(),
    "a head": lambda model: private(model, "head").half(),
    "a part": lambda model: private(model, "head")[0].double(),
    "a parameter": lambda model: setattr(
        model.c2.resadapt.default, "weight", nn.Parameter(torch.ones(1, dtype=torch.float64))
    ),
}


class Joined(nn.Sequential):
    """Takes parts of different dtypes."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x.to(layer.weight.dtype))
        return x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_a_set_that_was_converted_by_hand_is_saved(
    cast: Callable[[Any], object],
    dtype: torch.dtype,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(resadapt.adapters.FAMILIES, "offset", Offset)

    def backbone() -> nn.Module:
        torch.manual_seed(0)
        return small_net(head=Joined(nn.Linear(4, 3), nn.Linear(3, 2))).to(dtype)

    model = backbone()
    resadapt.inject_adapters(model, "c2", family="offset", head="head", norm="affine+stats")
    cast(model)
    assert_saves(model, path, backbone)


def test_a_conversion_of_the_whole_model_can_be_saved_once_accepted(path: Path) -> None:
    model = injected(torch.float32).half()
    with pytest.raises(resadapt.BackboneDriftError, match="accept_backbone"):
        resadapt.save_adapters(model, path)
    resadapt.accept_backbone(model)
    assert_saves(model, path, lambda: small_net().half())
    model = injected(torch.bfloat16).bfloat16()  # the backbone does not change
    assert_saves(model, path, lambda: small_net().bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, None])
def test_a_wider_backbone_takes_a_set_that_is_as_wide(
    dtype: torch.dtype | None, path: Path
) -> None:
    model = injected(torch.bfloat16, dtype=dtype)
    resadapt.save_adapters(model, path)
    wide = resadapt.load_adapters(small_net().bfloat16().double(), path)
    for key, tensor in resadapt.adapter_state_dict(model).items():
        again = resadapt.adapter_state_dict(wide)[key]
        assert again.dtype in (torch.float64, torch.int64)
        assert torch.equal(again, tensor.to(again.dtype))
    assert resadapt.verify_adapters(wide, path).ok


def test_a_set_in_the_model_keeps_its_dtype_and_every_bit(path: Path) -> None:
    wide, narrow = injected(torch.bfloat16), injected(torch.bfloat16, dtype=None)
    resadapt.save_adapters(wide, path)
    before = picture(narrow)
    with pytest.raises(
        resadapt.AdapterKeyError,
        match=r"is float32 and would lose precision in the model's bfloat16.*"
        r"remove_adapters\(model, 'default'\)",
    ):
        resadapt.load_adapters(narrow, path)
    assert picture(narrow) == before
    resadapt.save_adapters(narrow, path)
    resadapt.load_adapters(wide, path)
    states = [resadapt.adapter_state_dict(model) for model in (wide, narrow)]
    for key, tensor in states[0].items():
        assert tensor.dtype in (torch.float32, torch.int64)
        assert torch.equal(tensor, states[1][key].to(tensor.dtype))


@pytest.mark.parametrize("sum_of", ["changes", "tensors"])
def test_a_sum_of_sets_has_the_widest_dtype(sum_of: str) -> None:
    model = small_net().bfloat16()
    for number, (name, dtype) in enumerate({"a": None, "b": torch.float32}.items()):
        resadapt.inject_adapters(
            model, "c2", 2, family="lora", name=name, norm="affine", head="head", dtype=dtype
        )
        for each in (model.c2.resadapt, model.bn.resadapt, model.head.resadapt):
            for key in each._modules:
                if key.partition("@")[0] == name:
                    scramble(each._modules[key], number)
    resadapt.combine_adapters(model, {"a": 0.5, "b": 0.5}, "sum", sum_of=sum_of)
    states = {name: resadapt.adapter_state_dict(model, name) for name in ("a", "b", "sum")}
    key = "head.head.weight"
    expected = (states["a"][key].double() + states["b"][key].double()) / 2
    assert torch.equal(states["sum"][key], expected.float())
    assert {each.dtype for each in states["sum"].values()} == {torch.float32, torch.int64}
    resadapt.combine_adapters(model, {"a": 2}, "twice", sum_of=sum_of)
    narrow = resadapt.adapter_state_dict(model, "twice")
    assert {each.dtype for each in narrow.values()} == {torch.bfloat16, torch.int64}
    resadapt.set_active_adapters(model, "sum")
    assert model(X.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["lora", "ssf", "series", "parallel"])
def test_folding_says_what_rounding_costs(family: str) -> None:
    model, x = injected(torch.bfloat16, family), X.bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folded = resadapt.fold_adapters(model)
    assert {p.dtype for p in folded.parameters()} == {torch.bfloat16}
    small_net().bfloat16().load_state_dict(folded.state_dict())
    assert torch.allclose(folded(x), model.eval()(x), rtol=0.05, atol=0.05)
    with torch.no_grad():
        for key, parameter in model.c2.resadapt.default.named_parameters():
            parameter.mul_(1e-3) if key != "gamma" else parameter.sub_(1).mul_(1e-3).add_(1)
    with pytest.warns(
        resadapt.AdapterWarning,
        match=r"'c2\.weight' loses \d+% of its change in bfloat16.*deepcopy\(model\)\.float\(\)",
    ):
        resadapt.fold_adapters(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wide = resadapt.fold_adapters(copy.deepcopy(model).float())
    assert torch.allclose(wide(x.float()), model(x).float(), rtol=0.05, atol=0.05)
