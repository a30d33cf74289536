"""Weighted sums of sets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import images, picture, private, small_net, small_resnet
from torch import Tensor, nn

import resadapt


def test_combined_sets_are_weighted_sums(tmp_path: Any) -> None:
    model = small_resnet()
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        torch.manual_seed(seed)
        resadapt.inject_adapters(
            model, "layer4", 4, name=name, head={"fc": nn.Linear(512, 5)}, norm="affine+stats"
        )
        model.train()(images(seed=seed))
    states = {name: resadapt.adapter_state_dict(model, name) for name in "abc"}
    assert resadapt.combine_adapters(model, {"a": 0.25, "b": -1, "c": 2.5}, "sum") is model
    for key, tensor in resadapt.adapter_state_dict(model).items():
        a, b, c = (states[name][key].double() for name in "abc")
        expected = (
            (0.25 * a - b + 2.5 * c).to(tensor.dtype)
            if tensor.is_floating_point()
            else states["a"][key]
        )
        assert torch.equal(tensor, expected)
    assert all(
        torch.equal(t, resadapt.adapter_state_dict(model, n)[k])
        for n in "abc"
        for k, t in states[n].items()
    )
    assert [info.name for info in resadapt.list_adapters(model) if info.active] == ["sum"]
    assert resadapt.save_adapters(model, tmp_path / "sum").ok
    resadapt.combine_adapters(model, {"a": 1}, "same")
    resadapt.set_active_adapters(model, "a")
    alone = model.eval()(images())
    resadapt.set_active_adapters(model, "same")
    assert torch.equal(model.eval()(images()), alone)


def test_a_variance_is_never_negative() -> None:
    model = small_net()
    for name, seed in (("a", 1), ("b", 2)):
        resadapt.inject_adapters(model, (), name=name, norm="stats")
        model.train()(images(seed=seed) * seed)
    before = picture(model)
    with pytest.raises(resadapt.AdapterError, match=r"'norms\.bn\.running_var' would be negative"):
        resadapt.combine_adapters(model, {"a": 1, "b": -1}, "c")
    assert picture(model) == before


def test_complex_tensors_are_summed() -> None:
    head = nn.Linear(4, 2, dtype=torch.complex64)
    model = small_net(head=head)
    for name in ("a", "b"):
        resadapt.inject_adapters(model, (), name=name, head="head")
        with torch.no_grad():
            private(model, "head", name).weight.add_(2j if name == "a" else 4j)
    resadapt.combine_adapters(model, {"a": 0.5, "b": 0.5}, "c")
    combined = private(model, "head", "c").weight
    torch.testing.assert_close(combined - model.head.weight, torch.full((2, 4), 3j))


@pytest.mark.parametrize(
    ("weights", "name", "error", "message"),
    [
        ({}, "s", resadapt.AdapterError, "give a mapping"),
        ({"a": float("nan")}, "s", resadapt.AdapterError, "not a finite number"),
        ({"a": True}, "s", resadapt.AdapterError, "not a finite number"),
        ({"x": 1}, "s", resadapt.AdapterKeyError, "no adapter set 'x'"),
        ({"a": 1, "b": 1}, "s", resadapt.AdapterKeyError, "differ in 'sites'"),
        ({"a": 1}, "b", resadapt.InjectionError, "set 'b' already"),
    ],
)
def test_sums_that_there_are_not(
    weights: Any, name: str, error: type[Exception], message: str
) -> None:
    model = resadapt.inject_adapters(
        resadapt.inject_adapters(small_resnet(), "layer4", name="a"), "layer3", name="b"
    )
    before = picture(model)
    with pytest.raises(error, match=message):
        resadapt.combine_adapters(model, weights, name)
    assert picture(model) == before


@pytest.mark.parametrize("active", ["a", "b", None])
def test_a_sum_has_the_head_of_its_sets_whichever_is_active(active: str | None) -> None:
    model, x = small_resnet(classes=5).eval(), images()
    for name in ("a", "b"):
        head = {"fc": nn.Sequential(nn.Linear(512, 4), nn.Sigmoid(), nn.Linear(4, 3))}
        resadapt.inject_adapters(model, "layer4", 4, name=name, head=head)
    resadapt.set_active_adapters(model, "a")
    expected = model.eval()(x)
    for order in (("a", "b"), ("b", "a")):
        resadapt.set_active_adapters(model, active)
        resadapt.combine_adapters(model, {name: float(name == "a") for name in order}, "sum")
        assert torch.equal(model.eval()(x), expected)
        assert [info.name for info in resadapt.list_adapters(model) if info.active] == ["sum"]
        resadapt.remove_adapters(model, "sum")


@pytest.mark.parametrize("name", ["a", "not a name", "train"])
def test_a_sum_that_cannot_be_put_in_leaves_the_model_as_it_was(name: str) -> None:
    model = resadapt.inject_adapters(small_resnet(), "layer4", 4, name="a", head="fc")
    before = picture(model)
    with pytest.raises(resadapt.AdapterError):
        resadapt.combine_adapters(model, {"a": 1.0}, name)
    assert picture(model) == before
    assert resadapt.list_adapters(model)[0].active


def test_a_sum_of_a_model_that_was_converted() -> None:
    for convert in (nn.Module.half, nn.Module.double):
        model = small_resnet()
        for name in ("a", "b"):
            resadapt.inject_adapters(model, "layer4", 4, name=name, head="fc", norm="affine")
        convert(model)
        states = [resadapt.adapter_state_dict(model, name) for name in ("a", "b")]
        assert {t.dtype for state in states for t in state.values() if t.is_floating_point()} == {
            model.conv1.weight.dtype
        }
        resadapt.combine_adapters(model, {"a": 0.3, "b": 0.7}, "sum")
        total = resadapt.adapter_state_dict(model, "sum")
        for key, tensor in total.items():
            if tensor.is_floating_point():
                expected = 0.3 * states[0][key].double() + 0.7 * states[1][key].double()
                assert torch.equal(tensor, expected.to(tensor.dtype)), key


def test_a_weight_of_a_sum_that_is_too_large() -> None:
    model = resadapt.inject_adapters(small_resnet(), "layer4", 4, name="a")
    with pytest.raises(resadapt.AdapterError, match="not a finite number"):
        resadapt.combine_adapters(model, {"a": 10**400}, "c")


class Geometries(nn.Module):
    """Layers whose weights are cut up in different ways."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(6, 4, 2, groups=2)
        self.line = nn.Conv1d(4, 4, 3, dilation=2, padding=2)
        self.head = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.line(self.up(self.conv(x)).flatten(2)).mean(2))


def two_sets(
    family: str, sizes: tuple[Any, Any], layers: tuple[str, ...], **options: Any
) -> tuple[Any, Tensor]:
    """A model in double precision with sets a and b, all their tensors drawn."""
    torch.manual_seed(0)
    model, x = Geometries().double().eval(), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    for name, size in zip("ab", sizes, strict=True):
        arguments = options | ({} if size is None else {"bottleneck": size})
        resadapt.inject_adapters(
            model, layers, family=family, name=name, example_input=x, **arguments
        )
        for parameter in resadapt.trainable_parameters(model):
            nn.init.normal_(parameter)
    return model.eval(), x


LINEAR = [
    ("lora", (2, 3), {}),
    ("lora", (2, 3), {"alpha": 8.0}),
    ("lora", (2, 2), {"alpha": 0.0}),
    ("parallel", (None, None), {"layers": ("conv", "up", "line")}),
    ("series", (None, None), {"layers": ("line", "head")}),
    ("ssf", (None, None), {}),
]


@pytest.mark.parametrize("sum_of", [None, "changes"])
@pytest.mark.parametrize(("family", "sizes", "options"), LINEAR)
@pytest.mark.parametrize("weights", [(1.0, -1.0), (0.5, 0.5), (0.3, 2.0)])
def test_summed_changes_are_the_sums_of_folded_weights(
    family: str, sizes: Any, options: Any, weights: Any, sum_of: Any, tmp_path: Any
) -> None:
    options = dict(options)
    layers = options.pop("layers", ("conv", "up", "line", "head"))
    model, x = two_sets(family, sizes, layers, **options)
    resadapt.combine_adapters(model, dict(zip("ab", weights, strict=True)), "sum", sum_of=sum_of)
    with torch.no_grad():
        folded = {
            name: dict(resadapt.fold_adapters(model, name).named_parameters())
            for name in ("a", "b", "sum")
        }
        for layer in layers:
            for key in (f"{layer}.weight", f"{layer}.bias"):
                base = model.get_parameter(key)
                expected = base + sum(
                    w * (folded[n][key] - base) for n, w in zip("ab", weights, strict=True)
                )
                torch.testing.assert_close(folded["sum"][key], expected, rtol=1e-9, atol=1e-9)
    report = resadapt.save_adapters(model, tmp_path / "sum", probe=x)
    assert report["outputs"].outcome == "passed"


@pytest.mark.parametrize("family", ["pooled", "bottleneck"])
def test_summed_changes_of_hidden_units(family: str) -> None:
    model, _ = two_sets(family, (2, 5), ("conv", "line", "head"))
    with pytest.raises(resadapt.AdapterKeyError, match="differ in 'sites'"):
        resadapt.combine_adapters(model, {"a": 1, "b": -2}, "sum")
    resadapt.combine_adapters(model, {"a": 1, "b": -2}, "sum", sum_of="changes")
    model.eval()
    for layer, shape in {"conv": (2, 6, 4, 4), "line": (2, 4, 7), "head": (2, 6)}.items():
        adapters = dict(model.get_submodule(layer).resadapt.named_children())
        y = torch.randn(shape, dtype=torch.float64)
        a, b, total = (adapters[name](y) - y for name in ("a", "b", "sum"))
        torch.testing.assert_close(total, a - 2 * b)
    assert {site.bottleneck for site in resadapt.list_adapters(model)[2].sites} == {7}


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("lora", {"dora": True}, "with dora=True the change is not a sum"),
        ("mona", {}, "no adapter of the family adds the sum"),
        ("conv", {}, "no adapter of the family adds the sum"),
        ("series", {"batch_norm": True}, r"one norm \(batch_norm=True\) cannot stand for two"),
    ],
)
def test_changes_that_cannot_be_summed(family: str, options: Any, message: str) -> None:
    layers, size = ("conv" if family == "mona" else "line",), None if family == "series" else 2
    model, _ = two_sets(family, (size, size), layers, **options)
    before = picture(model)
    sum_of = None if family in ("lora", "series") else "changes"
    with pytest.raises(resadapt.AdapterError, match=message) as error:
        resadapt.combine_adapters(model, {"a": 1, "b": 1}, "c", sum_of=sum_of)
    assert "sum_of='tensors' sums the tensors instead" in str(error.value)
    assert picture(model) == before
    resadapt.combine_adapters(model, {"a": 0.5, "b": 0.5}, "c", sum_of="tensors")


def test_the_tensors_of_lora_sets_are_summed_where_that_is_asked_for() -> None:
    model, _ = two_sets("lora", (2, 2), ("conv",))
    resadapt.combine_adapters(model, {"a": 0.5, "b": 0.5}, "c", sum_of="tensors")
    a, b, c = (resadapt.adapter_state_dict(model, name) for name in "abc")
    assert all(torch.equal(c[key], (a[key] + b[key]) / 2) for key in a)


def test_norms_are_summed_as_changes_and_heads_as_tensors() -> None:
    model = small_net()
    for name in "ab":
        resadapt.inject_adapters(
            model, "c2", 2, family="lora", name=name, head="head", norm="affine+stats"
        )
        for parameter in resadapt.trainable_parameters(model):
            nn.init.normal_(parameter)
    resadapt.combine_adapters(model, {"a": 1, "b": -1}, "c")
    a, b, c = (resadapt.adapter_state_dict(model, name) for name in "abc")
    norm, own = model.bn, {key: a[key] - b[key] for key in a if a[key].is_floating_point()}
    assert torch.equal(c["head.head.weight"], own["head.head.weight"])
    for key in ("weight", "bias", "running_var"):
        there = getattr(norm, key)
        torch.testing.assert_close(c[f"norms.bn.{key}"], there + own[f"norms.bn.{key}"])


def test_a_sum_of_something_else() -> None:
    model, _ = two_sets("lora", (2, 2), ("conv",))
    with pytest.raises(resadapt.AdapterError, match="give 'changes', 'tensors' or None"):
        resadapt.combine_adapters(model, {"a": 1}, "c", sum_of="factors")
