"""Sets with heads of their own: of any width and form, switched, saved, and built again."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support import images, picture, private, small_net, small_resnet, train
from torch import nn

import resadapt
from resadapt.base.spec import blueprint_of, build_from

WIDE = {"fc": nn.Linear(512, 10)}


def train_steps(model: nn.Module) -> None:
    train(model, torch.optim.SGD(resadapt.trainable_parameters(model), lr=0.1))


def deep_head() -> nn.Module:
    return nn.Sequential(nn.Linear(512, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 7))


def test_sets_with_heads_of_different_width_live_on_one_backbone() -> None:
    model, x = small_resnet().eval(), images()
    plain = model(x)
    before = picture(model)
    head = model.fc
    resadapt.inject_adapters(model, name="three", head="fc")
    resadapt.inject_adapters(model, (), name="ten", head=WIDE)
    resadapt.inject_adapters(model, "layer4", name="seven", head={"fc": deep_head()})
    model.eval()
    for name, width in (("ten", 10), ("three", 3), (None, 3), ("seven", 7), ("ten", 10)):
        resadapt.set_active_adapters(model, name)
        assert model(x).shape == (2, width)
        assert model.fc is head, "the module stays, its content changes places"
    with resadapt.adapters_disabled(model):
        assert torch.equal(model(x), plain)
    assert resadapt.check_backbone(model).ok
    resadapt.remove_adapters(model)
    assert picture(model) == before


def test_a_given_head_is_copied() -> None:
    given = nn.Linear(512, 10)
    weight = given.weight.detach().clone()
    model = resadapt.inject_adapters(small_resnet(), "layer4", head={"fc": given})
    assert torch.equal(private(model, "fc").weight, weight)
    train_steps(model)
    resadapt.set_active_adapters(model, None)
    assert given.out_features == 10
    assert torch.equal(given.weight, weight)
    assert isinstance(given.weight, nn.Parameter)


def test_only_the_active_head_is_trained_and_optimizers_keep_their_set() -> None:
    model = resadapt.inject_adapters(small_resnet(), (), name="a", head="fc")
    optimizer = torch.optim.SGD(resadapt.trainable_parameters(model), lr=0.1)
    trained = list(resadapt.trainable_parameters(model))
    resadapt.inject_adapters(model, (), name="b", head={"fc": deep_head()})
    b = resadapt.adapter_state_dict(model, "b")
    resadapt.set_active_adapters(model, "a")
    assert [id(p) for p in resadapt.trainable_parameters(model)] == [id(p) for p in trained]
    before = resadapt.adapter_state_dict(model, "a")
    model(images()).square().mean().backward()
    optimizer.step()
    assert not torch.equal(
        before["head.fc.weight"], resadapt.adapter_state_dict(model, "a")["head.fc.weight"]
    )
    assert all(
        torch.equal(value, b[key]) for key, value in resadapt.adapter_state_dict(model, "b").items()
    )


def test_files_build_heads_that_the_backbone_does_not_have(tmp_path: Path) -> None:
    model, x = small_resnet(), images()
    weights = copy.deepcopy(model.state_dict())
    for name, head in (("linear", nn.Linear(512, 10)), ("deep", deep_head())):
        resadapt.inject_adapters(model, "layer4", name=name, head={"fc": head})
        train_steps(model)
        report = resadapt.save_adapters(model, tmp_path / name, probe=x, rebuild=small_resnet)
        assert report.ok
        assert report["outputs"].outcome == "passed"
    fresh = small_resnet(seed=9)
    fresh.load_state_dict(weights)
    for name in ("deep", "linear"):
        resadapt.load_adapters(fresh, tmp_path / name)
        resadapt.set_active_adapters(model, name)
        assert torch.equal(fresh.eval()(x), model.eval()(x))
    assert resadapt.verify_adapters(fresh, tmp_path / "linear", probe=x).ok


class OwnLinear(nn.Linear):
    """No layer of torch's."""


def own_resnet() -> Any:
    model: Any = small_resnet()
    torch.manual_seed(3)
    model.fc = OwnLinear(512, 10)
    return model


def test_a_head_that_cannot_be_told_as_data_must_be_there(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", resadapt.AdapterWarning)
        model, x = resadapt.inject_adapters(own_resnet(), "layer4", head="fc"), images()
    train_steps(model)
    assert resadapt.save_adapters(model, tmp_path / "own", rebuild=own_resnet).ok
    info = resadapt.read_adapter_info(tmp_path / "own")
    assert info.set.blueprints == {"fc": {"classes": ["OwnLinear"]}}
    assert torch.equal(
        resadapt.load_adapters(own_resnet(), tmp_path / "own").eval()(x), model.eval()(x)
    )
    with pytest.raises(
        resadapt.AdapterKeyError,
        match=r"'head\.fc\.weight' has shape \[10, 512\], the model has \[3, 512\].*Replace the "
        r"model's head by a head of the saved form.*load_adapters\(model, path, head=",
    ):
        resadapt.load_adapters(small_resnet(), tmp_path / "own")


WARNING = (
    r"cannot describe the head \{'fc': OwnLinear\(...\)\}.*load_adapters\(model, path, "
    r"head=\{'fc': OwnLinear\(...\)\}\), or a backbone that has one.*rebuild=.*Sequential of "
)


@pytest.mark.parametrize("rebuilt", [False, True])
def test_a_given_head_of_ones_own_class_is_told_at_the_injection(
    rebuilt: bool, tmp_path: Path
) -> None:
    """Two heads of another width than the backbone's: both files load into one fresh backbone."""
    outputs, heads, x = {}, {"ten": OwnLinear(512, 10), "four": OwnLinear(512, 4)}, images()

    def rebuild() -> Any:
        model: Any = small_resnet()
        model.fc = copy.deepcopy(heads[name])
        return model

    for name, head in heads.items():
        with pytest.warns(resadapt.AdapterWarning, match=WARNING):
            model = resadapt.inject_adapters(small_resnet(), "layer4", name=name, head={"fc": head})
        train_steps(model)
        report = resadapt.save_adapters(
            model, tmp_path / name, probe=x, rebuild=rebuild if rebuilt else None
        )
        assert report.ok
        assert report["outputs"].outcome == "passed"
        line = report["reconstruction"]
        assert line.outcome == ("passed" if rebuilt else "not checked")
        assert rebuilt or "its head 'fc' (load_adapters needs head=)" in line.detail
        assert resadapt.verify_adapters(model, tmp_path / name, probe=x).ok
        assert resadapt.check_backbone(model).ok
        outputs[name] = model.eval()(x)
    fresh = small_resnet()
    for name, head in heads.items():
        before = picture(fresh)
        with pytest.raises(resadapt.AdapterKeyError, match=r"load_adapters\(model, path, head="):
            resadapt.load_adapters(fresh, tmp_path / name)
        assert picture(fresh) == before
        given = OwnLinear(512, head.out_features)
        resadapt.load_adapters(fresh, tmp_path / name, head={"fc": given})
        assert torch.equal(fresh.eval()(x), outputs[name])
        assert not torch.equal(given.weight, private(fresh, "fc", name).weight)
        assert resadapt.verify_adapters(fresh, tmp_path / name, probe=x).ok
        with pytest.raises(resadapt.AdapterError, match="Remove head="):
            resadapt.load_adapters(fresh, tmp_path / name, head={"fc": given})
    for name in heads:
        resadapt.set_active_adapters(fresh, name)
        assert torch.equal(fresh.eval()(x), outputs[name])
        resadapt.load_adapters(fresh, tmp_path / name)


class Doubling(nn.Linear):
    """The tensors of a Linear, and other outputs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("rebuilt", [False, True])
def test_a_head_of_another_class_with_the_same_tensors(rebuilt: bool, tmp_path: Path) -> None:
    def doubling() -> Any:
        model: Any = small_resnet()
        model.fc = Doubling(512, 3)
        return model

    x = images()
    with pytest.warns(resadapt.AdapterWarning, match=r"'fc': Doubling\(...\)"):
        model = resadapt.inject_adapters(small_resnet(), "layer4", head={"fc": Doubling(512, 3)})
    rebuild = doubling if rebuilt else None
    assert resadapt.save_adapters(model, tmp_path / "own", probe=x, rebuild=rebuild).ok
    expected = model.eval()(x)
    for given in (None, {"fc": nn.Linear(512, 3)}, {"fc": OwnLinear(512, 3)}):
        fresh = small_resnet()
        with pytest.raises(
            resadapt.AdapterKeyError, match=r"'fc' is with the classes \['Doubling'\], but the"
        ):
            resadapt.load_adapters(fresh, tmp_path / "own", head=given)
    resadapt.load_adapters(fresh, tmp_path / "own", head={"fc": Doubling(512, 3)})
    assert torch.equal(fresh.eval()(x), expected)
    assert torch.equal(resadapt.load_adapters(doubling(), tmp_path / "own").eval()(x), expected)
    plain = resadapt.inject_adapters(small_resnet(), "layer4", head="fc")
    resadapt.save_adapters(plain, tmp_path / "plain")
    with pytest.raises(resadapt.AdapterError, match=r"made of torch.nn layers, .* but the given"):
        resadapt.load_adapters(small_resnet(), tmp_path / "plain", head={"fc": Doubling(512, 3)})


@pytest.mark.parametrize(
    ("head", "error", "message"),
    [
        ("fc", resadapt.AdapterError, "give a mapping"),
        ({"layer4": nn.Identity()}, resadapt.AdapterError, "'layer4' is not in the head of"),
        ({"fc": OwnLinear(512, 7)}, resadapt.AdapterKeyError, r"has shape \[10, 512\]"),
        ({"fc": 7}, resadapt.AdapterError, "not a torch.nn.Module"),
    ],
)
def test_heads_that_do_not_fit_a_file(
    head: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    resadapt.save_adapters(resadapt.inject_adapters(own_resnet(), head="fc"), tmp_path / "own")
    fresh = small_resnet()
    before = picture(fresh)
    with pytest.raises(error, match=message):
        resadapt.load_adapters(fresh, tmp_path / "own", head=head)
    assert picture(fresh) == before


def test_a_file_that_names_no_classes_still_loads(tmp_path: Path) -> None:
    """As 0.2 wrote it: only shapes are compared."""
    model, x = resadapt.inject_adapters(own_resnet(), "layer4", head="fc"), images()
    spec = model._resadapt.sets["default"].spec
    spec.blueprints.clear()
    resadapt.save_adapters(model, tmp_path / "old", rebuild=own_resnet)
    assert resadapt.read_adapter_info(tmp_path / "old").set.blueprints == {}
    expected = model.eval()(x)
    fresh = resadapt.inject_adapters(own_resnet(), "layer4", head="fc").eval()
    for each in (own_resnet().eval(), fresh):
        assert torch.equal(resadapt.load_adapters(each, tmp_path / "old")(x), expected)
    linear = resadapt.inject_adapters(small_resnet(), "layer4", head={"fc": nn.Linear(512, 10)})
    with pytest.raises(resadapt.AdapterKeyError, match="differs from the file's in 'blueprints'"):
        resadapt.load_adapters(linear, tmp_path / "old")


def test_two_box_predictors_on_one_detector(tmp_path: Path) -> None:
    from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

    def detector() -> Any:
        torch.manual_seed(0)
        model = fasterrcnn_mobilenet_v3_large_320_fpn(
            weights=None, weights_backbone=None, num_classes=4
        )
        return model.eval()

    place, x = "roi_heads.box_predictor", [torch.rand(3, 64, 64)]
    outputs: dict[str, Any] = {}
    for name, classes in (("cars", 3), ("birds", 7)):
        with pytest.warns(resadapt.AdapterWarning, match=r"FastRCNNPredictor\(...\)"):
            model = resadapt.inject_adapters(
                detector(),
                "backbone.fpn.layer_blocks.*",
                4,
                family="bottleneck",
                name=name,
                head={place: FastRCNNPredictor(1024, classes)},
            )
        assert resadapt.save_adapters(model, tmp_path / name).ok
        outputs[name] = model.eval()(x)
    fresh = detector()
    for name, classes in (("cars", 3), ("birds", 7)):
        head = {place: FastRCNNPredictor(1024, classes)}
        resadapt.load_adapters(fresh, tmp_path / name, head=head)
    for name, expected in outputs.items():
        resadapt.set_active_adapters(fresh, name)
        (found,), (wanted,) = fresh.eval()(x), expected
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"fc": 10}, "not a torch.nn.Module"),
        ({"fcc": nn.Linear(512, 10)}, "matches no module"),
        ("its own", "a module that is part of the model"),
    ],
)
def test_unsuitable_heads_are_refused(head: Any, message: str) -> None:
    model = small_resnet()
    before = picture(model)
    with pytest.raises(resadapt.InjectionError, match=message):
        resadapt.inject_adapters(model, head={"fc": model.fc} if head == "its own" else head)
    assert picture(model) == before


def test_a_set_must_have_something() -> None:
    with pytest.raises(resadapt.InjectionError, match="layers is empty"):
        resadapt.inject_adapters(small_resnet(), ())


def test_keep_head_of_another_width() -> None:
    model, x = resadapt.inject_adapters(small_resnet(), (), head=WIDE).eval(), images()
    adapted = model(x)
    resadapt.remove_adapters(model, keep_head=True)
    assert torch.equal(model.eval()(x), adapted)
    assert model.fc.out_features == 10


def test_copies_and_pickles_keep_every_head() -> None:
    model, x = small_resnet(), images()
    resadapt.inject_adapters(model, (), name="a", head=WIDE)
    resadapt.inject_adapters(model, (), name="b", head={"fc": deep_head()}).eval()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for name in ("a", "b"):
            resadapt.set_active_adapters(model, name)
            resadapt.set_active_adapters(other, name)
            assert torch.equal(model(x), other(x))
        with torch.no_grad():
            next(private(other, "fc", name).parameters()).add_(1)
        assert not torch.equal(model(x), other(x))


def test_parked_heads_follow_the_model() -> None:
    model = resadapt.inject_adapters(
        resadapt.inject_adapters(small_resnet(), (), name="a", head=WIDE), (), name="b", head="fc"
    )
    model.double().eval()
    resadapt.set_active_adapters(model, "a")
    assert (
        private(model, "fc", "a").weight.dtype
        is private(model, "fc", "b").weight.dtype
        is torch.float64
    )
    assert model(images().double()).shape == (2, 10)


def test_a_recurrent_head_is_trained_where_it_computes() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.head = nn.LSTM(4, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.conv(x).mean(3).transpose(1, 2))[0]

    model = resadapt.inject_adapters(Net(), "conv", 2, head="head")
    model(images()).square().mean().backward()
    assert all(
        p.grad is not None
        for name, p in resadapt.named_trainable_parameters(model)
        if name.startswith("head.")
    )


@pytest.mark.parametrize("there", [nn.utils.weight_norm, nn.utils.spectral_norm, None])
@pytest.mark.parametrize(
    "wrap",
    [nn.utils.weight_norm, nn.utils.spectral_norm, nn.utils.parametrizations.weight_norm, None],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_what_computes_a_heads_weight_goes_where_it_goes(there: Any, wrap: Any) -> None:
    model, x = small_net(), images()
    if there:
        there(model.head)
    model.eval()
    plain, before = model(x), picture(model)
    given = nn.Linear(4, 2)
    resadapt.inject_adapters(model, (), name="own", head={"head": wrap(given) if wrap else given})
    train_steps(model)
    assert all(parameter.grad is not None for parameter in resadapt.trainable_parameters(model))
    own = model.eval()(x)
    resadapt.set_active_adapters(model, None)
    assert torch.equal(model(x), plain)
    with resadapt.adapters_for(model, ["own", None]):
        torch.testing.assert_close(model(x), torch.stack([own[0], plain[1]]))
    assert resadapt.check_backbone(model).ok
    assert picture(resadapt.remove_adapters(model)) == before


@pytest.mark.parametrize("head", [nn.LazyLinear(2), nn.Sequential(nn.Linear(4, 2, device="meta"))])
def test_a_head_without_values_is_refused(head: nn.Module) -> None:
    with pytest.raises(resadapt.InjectionError, match="weight' has no values yet"):
        resadapt.inject_adapters(small_net(), (), head={"head": head})


class TwoNames(nn.Module):
    """A head with two names, or two heads."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.h1 = nn.Linear(4, 2)
        self.h2 = self.h1 if shared else nn.Linear(4, 2)

    def forward(self, x: Any) -> Any:
        x = self.conv(x).mean((2, 3))
        return self.h1(x) - 2 * self.h2(x)


def test_a_head_with_two_names_is_one_in_the_file_too(tmp_path: Path) -> None:
    model, x, one = TwoNames(shared=True).eval(), images(), nn.Linear(4, 5)
    weights, plain = copy.deepcopy(model.state_dict()), model(x)
    resadapt.inject_adapters(model, (), head={"h1": one, "h2": one})
    train_steps(model)
    assert resadapt.save_adapters(model, tmp_path / "a").ok
    fresh = TwoNames(shared=True)
    fresh.load_state_dict(weights)
    resadapt.load_adapters(fresh, tmp_path / "a")
    assert torch.equal(fresh.eval()(x), model.eval()(x))
    resadapt.set_active_adapters(fresh, None)
    assert torch.equal(fresh(x), plain)


@pytest.mark.parametrize(
    "head", [{"h1": nn.Linear(4, 2), "h2": nn.Linear(4, 2)}, {"h?": nn.Linear(4, 2)}]
)
def test_each_place_has_a_module_of_its_own(head: Any) -> None:
    model = TwoNames(shared="h1" in head)
    before = picture(model)
    with pytest.raises(
        resadapt.InjectionError, match="Give each module of the backbone its own replacement"
    ):
        resadapt.inject_adapters(model, (), head=head)
    assert picture(model) == before


@pytest.mark.parametrize(
    "arguments",
    [
        {"layers": "layer4"},
        {"layers": (), "head": "layer4.1.bn2"},
        {"layers": (), "norm": "affine"},
    ],
)
@pytest.mark.parametrize("first", ["inner", "outer"])
def test_a_head_without_the_modules_of_another_set(arguments: dict[str, Any], first: str) -> None:
    model, x = small_resnet().eval(), images()
    head = {"layer4": nn.Conv2d(256, 512, 3, padding=1)}
    sets: list[dict[str, Any]] = [
        {"name": "inner", **arguments},
        {"name": "outer", "layers": (), "head": head},
    ]
    sets.sort(key=lambda each: each["name"] != first)
    before, alone = picture(model), {}
    for each in sets:
        torch.manual_seed(0)
        alone[each["name"]] = resadapt.inject_adapters(copy.deepcopy(model), **each)(x)
        torch.manual_seed(0)
        resadapt.inject_adapters(model, **each)
    for name in ("inner", "outer", "inner"):
        resadapt.set_active_adapters(model, name)
        assert torch.equal(model(x), alone[name])
    assert picture(resadapt.remove_adapters(model)) == before


def test_a_set_that_adapts_what_is_another_sets_head(tmp_path: Path) -> None:
    model = resadapt.inject_adapters(small_resnet(), "fc", 2, family="lora", name="lora")
    state = resadapt.adapter_state_dict(model, "lora")
    resadapt.inject_adapters(model, "layer4", name="wide", head=WIDE)
    assert all(
        torch.equal(tensor, state[key])
        for key, tensor in resadapt.adapter_state_dict(model, "lora").items()
    )
    assert resadapt.save_adapters(model, tmp_path / "lora", name="lora").ok


def test_blueprints_build_the_same_module_again() -> None:
    module = nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2, bias=False, padding_mode="reflect"),
        nn.Sequential(nn.BatchNorm2d(8, affine=False), nn.LeakyReLU(0.2), nn.MaxPool2d(3, 2, 1)),
        nn.AdaptiveAvgPool2d((1, 2)),
        nn.Flatten(),
        nn.LayerNorm(16, bias=False),
        nn.Dropout(0.3),
        nn.GELU("tanh"),
        nn.Linear(16, 3, bias=False),
    )
    told = blueprint_of(module)
    built = build_from(told)
    assert repr(built) == repr(module)
    built.load_state_dict(module.state_dict())
    x = torch.randn(2, 4, 9, 9)
    assert torch.equal(built.eval()(x), module.eval()(x))
    assert blueprint_of(nn.Sequential(nn.Linear(2, 2), OwnLinear(2, 2))) is None
    assert blueprint_of(nn.MultiheadAttention(4, 2)) is None


@pytest.mark.parametrize(
    "told",
    [
        None,
        {"type": "eval", "settings": {}},
        {"type": "Linear", "settings": {"in_features": 2, "out_features": 2}},
        {"type": "Linear", "settings": {"in_features": [[2]], "out_features": 2, "bias": True}},
        {"type": "Linear", "settings": {"in_features": -2, "out_features": 2, "bias": True}},
        {"type": "Linear", "settings": {"in_features": 2**70, "out_features": 2, "bias": True}},
        {
            "type": "GroupNorm",
            "settings": {**blueprint_of(nn.GroupNorm(2, 4))["settings"], "num_groups": 0},
        },  # type: ignore[index]
        {"type": "Sequential", "children": {"0": None}},
        {"type": "Sequential", "children": {"a.b": {"type": "Identity", "settings": {}}}},
    ],
)
def test_a_blueprint_is_not_trusted(told: Any) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        build_from(told)


def test_a_blueprint_cannot_be_endlessly_deep() -> None:
    told: dict[str, Any] = {"type": "Identity", "settings": {}}
    for _ in range(100):
        told = {"type": "Sequential", "children": {"0": told}}
    with pytest.raises(ValueError, match="not a module description"):
        build_from(told)


def test_other_norms_and_heads_switch_too() -> None:
    model, x = small_net().eval(), images()
    plain = model(x)
    resadapt.inject_adapters(
        model, (), name="group", head={"head": nn.Linear(4, 9), "bn": nn.GroupNorm(2, 4)}
    )
    assert model.eval()(x).shape == (2, 9)
    assert type(private(model, "bn", "group")) is nn.GroupNorm
    assert type(model.bn).__name__ == "FrozenBatchNorm2d"
    resadapt.set_active_adapters(model, None)
    assert torch.equal(model.eval()(x), plain)
