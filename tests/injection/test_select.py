"""What `layers`, `bottleneck` and `head` mean, and clear answers to what they cannot mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import images, picture, small_resnet
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50
from torchvision.models.segmentation import fcn_resnet50

import resadapt
from resadapt.injection.select import RESNET_STAGES


def sites(model: nn.Module) -> dict[str, int]:
    return {site.name: site.bottleneck for site in resadapt.list_adapters(model)[0].sites}


@pytest.mark.parametrize(
    ("layers", "bottleneck", "expected"),
    [
        ("layer4", 8, {"layer4": 8}),
        (["layer4", "layer1"], 8, {"layer1": 8, "layer4": 8}),
        ("layer[34]", 8, {"layer3": 8, "layer4": 8}),
        ("layer[34].*", 8, {"layer3.0": 8, "layer3.1": 8, "layer4.0": 8, "layer4.1": 8}),
        ({"layer1": 4, "layer[34]": 0.25}, 64, {"layer1": 4, "layer3": 64, "layer4": 128}),
        (("layer?",), 0.5, {"layer1": 32, "layer2": 64, "layer3": 128, "layer4": 256}),
        ("bn1", 0.001, {"bn1": 1}),
        ("layer1.0.downsample", 8, None),
        ("layer2.0.downsample", 8, {"layer2.0.downsample": 8}),
        ("conv1", 3, {"conv1": 3}),
        ("fc", 3, {"fc": 3}),
    ],
)
def test_layers(layers: Any, bottleneck: Any, expected: dict[str, int] | None) -> None:
    model = small_resnet()
    if expected is None:
        with pytest.raises(resadapt.InjectionError):
            resadapt.inject_adapters(model, layers, bottleneck)
    else:
        assert sites(resadapt.inject_adapters(model, layers, bottleneck)) == expected


def test_every_block() -> None:
    assert len(sites(resadapt.inject_adapters(small_resnet(), "layer*.*", 4))) == 8
    assert len(sites(resadapt.inject_adapters(resnet50(), "layer*.*", 4))) == 16


def test_container_is_owned_by_its_last_block() -> None:
    model = resadapt.inject_adapters(small_resnet(), ["layer2.0.downsample", "layer4"])
    assert [s.owner for s in resadapt.list_adapters(model)[0].sites] == [
        "layer2.0.downsample.1",
        "layer4.1",
    ]
    assert isinstance(model.layer4[-1], type(model.layer4[0]))
    assert len(model.layer4) == 2


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 3, 1)
        self.b = self.a
        self.pair = nn.ModuleList([nn.Conv2d(3, 3, 1)])
        self.empty = nn.Sequential()
        self.two = Two()
        self.norm = nn.InstanceNorm2d(3)
        self.never = nn.Conv2d(3, 3, 1)
        self.named = Named()
        self.own = OwnSequential(nn.Conv2d(3, 3, 1))
        self.iterates = Iterates()

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x))
        x = self.pair[0](self.empty(x))
        x = self.two(x)[0]
        return self.iterates(self.own(self.named(self.norm(self.norm(x)))))


class Two(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.resadapt = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.resadapt(x)


class OwnSequential(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            x = module(x)
        return x


class Iterates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            x = module(x)
        return x


X = images(2, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": "layr4"}, r"layers: 'layr4' matches no module of ResNet.*'layer4'"),
        ({"layers": "*.layer9"}, r"matches no module"),
        ({"layers": "layer4", "head": "fcc"}, r"head: 'fcc' matches no module.*'fc'"),
        ({"head": nn.Linear(2, 2)}, r"head takes names.*a mapping from names"),
        (
            {"layers": "layer4", "head": "classifier"},
            r"no module of ResNet. There .*'layer3', 'layer4' and",
        ),
        ({"layers": []}, r"layers is empty"),
        ({"layers": [4]}, r"layers takes names of modules, found 4 \(int\)"),
        (
            {"layers": ["layer4", "layer4.1"]},
            r"'layer4' and 'layer4.1'.*both adapt the output of 'layer4.1'",
        ),
        ({"layers": ["layer4", "layer[4]"]}, r"both adapt the output"),
        ({"bottleneck": 0}, r"bottleneck for 'layer1' is 0"),
        ({"bottleneck": 1.5}, r"bottleneck for 'layer1' is 1.5"),
        ({"bottleneck": True}, r"is True"),
        ({"bottleneck": float("nan")}, r"is nan"),
        ({"layers": {"layer4": "8"}}, r"bottleneck for 'layer4' is '8'"),
        ({"family": "nothing"}, r"family='nothing' does not exist; there is '.*'pooled'"),
        ({"norm": "train"}, r"norm='train' does not exist; there is 'frozen'"),
        ({"dropout": 1.0}, r"dropout=1.0"),
        ({"dropout": float("nan")}, r"dropout=nan"),
        ({"dropout": "much"}, r"dropout='much'"),
        ({"init": "zeros"}, r"init='zeros' is not known"),
        ({"gamma": 3}, r"does not take these options.*gamma.*It takes 'bottleneck', 'dropout'"),
        ({"name": "a.b"}, r"name='a.b' cannot name a set"),
        ({"name": "train"}, r"name='train' cannot name a set"),
        ({"name": ""}, r"name='' cannot name a set"),
        ({"name": 3}, r"name=3 is int, not a string"),
        ({"head": "relu"}, r"'relu' has no parameters"),
        ({"layers": "fc", "head": "fc"}, r"Site 'fc' is inside the head"),
        (
            {"layers": "relu", "example_input": torch.zeros(1, 1, 8, 8)},
            r"cannot be called with example_input: RuntimeError",
        ),
        (
            {"layers": "layer1.0.relu", "example_input": images()},
            r"Site 'layer1.0.relu' ran more than once",
        ),
        (
            {"layers": "layer4", "example_input": torch.zeros(1, 1, 8, 8)},
            r"cannot be called with example_input: RuntimeError",
        ),
    ],
)
def test_bad_arguments_leave_the_model_as_it_was(arguments: dict[str, Any], message: str) -> None:
    model = small_resnet()
    before = picture(model)
    with pytest.raises(resadapt.InjectionError, match=message):
        resadapt.inject_adapters(model, **arguments)
    assert picture(model) == before
    resadapt.inject_adapters(model)


@pytest.mark.parametrize(
    ("layers", "example", "message"),
    [
        (RESNET_STAGES, None, r"'layer1' matches.*default.*stages of a ResNet, so pass layers=\. "),
        ("a", None, r"'a' is shared: it is also 'b'"),
        ("pair", None, r"'pair' \(ModuleList\) is never called"),
        ("empty", None, r"'empty' is an empty container"),
        ("two", None, r"Site 'two' returned tuple"),
        ("two", X, r"Site 'two' returned tuple"),
        ("never", X, r"Site 'never' did not run on the example input"),
        ("named", X, r"child or attribute named 'resadapt'"),
        ("own", None, r"container with a custom forward"),
        ("iterates", X, r"iterates over its children"),
        ("iterates", None, r"iterates over its children"),
    ],
)
def test_modules_that_cannot_be_sites(layers: Any, example: Any, message: str) -> None:
    model = Shared()
    before = picture(model)
    with pytest.raises(resadapt.InjectionError, match=message):
        resadapt.inject_adapters(model, layers, 2, example_input=example)
    assert picture(model) == before


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("norm", r"Site 'norm' ran more than once in one forward, and has no weights"),
        ("iterates.conv", None),
    ],
)
def test_what_only_the_first_forward_can_tell(layers: str, message: str | None) -> None:
    model = Shared()
    before = picture(model)
    resadapt.inject_adapters(model, layers, 2)
    if message is None:
        model(X)
    else:
        for _ in range(2):  # it goes on saying so
            with pytest.raises(resadapt.InjectionError, match=message):
                model(X)
    resadapt.remove_adapters(model)
    assert picture(model) == before


def test_first_forward_tells_about_shapes() -> None:
    class Lies(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input)[:, :2]

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lies = Lies(3, 4, 1)

        def forward(self, x: Tensor, factor: float) -> Tensor:
            return factor * self.lies(x)

    model = resadapt.inject_adapters(Two(), "lies", 2)  # no input can be generated
    with pytest.raises(
        resadapt.InjectionError,
        match=r"returned shape \[2, 2, 8, 8\], but its adapter was built for \[N, 4, \*, \*\]",
    ):
        model(X, 1.0)
    model = resadapt.inject_adapters(nn.Sequential(Lies(3, 4, 1)), "0", 2)  # measured
    model(X)
    model = resadapt.inject_adapters(nn.Sequential(nn.Linear(8, 4)), "0", 2)
    with pytest.raises(resadapt.InjectionError, match=r"built for \[N, 4\]"):
        model(X)


def test_backbone_dictionary_is_no_site() -> None:
    model = fcn_resnet50(weights=None, weights_backbone=None)
    with pytest.raises(resadapt.InjectionError, match="container with a custom forward"):
        resadapt.inject_adapters(model, "backbone", 4)


def test_example_input_leaves_no_trace() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.conv = nn.Conv2d(3, 4, 1)
            self.noise = nn.Dropout(0.5)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            self.calls += 1
            return self.noise(self.conv(x) + y + torch.rand(()))

    for example in ((X, X[:, :1]), {"x": X, "y": X[:, :1]}):
        model = Counts()
        model.noise.eval()
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        resadapt.injection.select.select_sites(
            model, resadapt.adapters.PooledAdapter, "conv", 2, example
        )
        assert torch.equal(torch.rand(3), expected)
        assert model.calls == 0
        assert (model.training, model.noise.training) == (True, False)


def test_tied_head() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.two.weight = self.one.weight

    with pytest.raises(resadapt.InjectionError, match=r"'two' shares the tensor 'one.weight'"):
        resadapt.inject_adapters(Tied(), "one", 2, head="two")
    model = Tied()
    model.two.weight = nn.Parameter(model.one.weight)  # another parameter, the same memory
    with pytest.raises(resadapt.InjectionError, match=r"'two' shares the tensor 'one.weight'"):
        resadapt.inject_adapters(model, "one", 2, head="two")


def test_wrapped_and_nested_models() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = small_resnet()

        def forward(self, x: Tensor) -> Tensor:
            return self.backbone(x)

    with pytest.raises(resadapt.InjectionError, match="DataParallel wraps the model"):
        resadapt.inject_adapters(nn.DataParallel(small_resnet()))
    with pytest.raises(resadapt.InjectionError, match="OptimizedModule wraps the model"):
        resadapt.inject_adapters(torch.compile(small_resnet()))
    with pytest.raises(resadapt.InjectionError, match=r"not a torch.nn.Module"):
        resadapt.inject_adapters("resnet18")  # type: ignore[type-var]
    net = Net()
    with pytest.raises(resadapt.InjectionError, match=r"Did you mean .*'backbone.layer4'"):
        resadapt.inject_adapters(net, "layer4")
    resadapt.inject_adapters(net.backbone, "layer4")
    with pytest.raises(
        resadapt.InjectionError, match=r"'backbone' was: pass model.get_submodule\('backbone'\)"
    ):
        resadapt.summary(net)
    with pytest.raises(resadapt.InjectionError, match="'backbone' was injected into separately"):
        resadapt.inject_adapters(net, "backbone.layer3")
    with pytest.raises(resadapt.InjectionError, match="part of an injected model"):
        resadapt.inject_adapters(net.backbone.layer4, "0")
    with pytest.raises(resadapt.InjectionError, match="pass the whole model"):
        resadapt.remove_adapters(net.backbone.layer4)
    with pytest.raises(resadapt.InjectionError, match="Call inject_adapters"):
        resadapt.check_backbone(small_resnet())
    assert resadapt.list_adapters(small_resnet()) == []


@pytest.mark.parametrize("model", [nn.Sequential(nn.LazyConv2d(4, 1), nn.Conv2d(4, 4, 1))])
def test_a_model_that_is_not_there_yet(model: nn.Module) -> None:
    with pytest.raises(resadapt.InjectionError, match=r"'0.weight' has no values yet"):
        resadapt.inject_adapters(model, "1", 2)
    with torch.device("meta"):
        empty = nn.Sequential(nn.Conv2d(3, 4, 1))
    with pytest.raises(resadapt.InjectionError, match=r"'0.weight' has no values yet"):
        resadapt.inject_adapters(empty, "0", 2)


def test_torchscript_cannot_be_frozen() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), torch.jit.script(nn.BatchNorm2d(4)))
    with pytest.raises(resadapt.InjectionError, match="'1' is compiled TorchScript"):
        resadapt.inject_adapters(model, "0", 2)


def test_an_injected_module_that_was_replaced() -> None:
    model = resadapt.inject_adapters(small_resnet(), ["layer3", "layer4"])
    model.layer4[1] = small_resnet().layer4[1]
    before = picture(model)
    for call in (
        lambda: resadapt.adapter_state_dict(model),
        lambda: resadapt.set_active_adapters(model, None),
        lambda: resadapt.remove_adapters(model),
    ):
        with pytest.raises(resadapt.InjectionError, match=r"'layer4.1' has lost its adapter"):
            call()
        assert picture(model) == before


def test_a_head_that_was_replaced() -> None:
    model = resadapt.inject_adapters(small_resnet(), head="fc")
    model.fc = nn.Sequential(nn.Dropout(), nn.Linear(512, 3))
    before = picture(model)
    with pytest.raises(
        resadapt.InjectionError, match=r"The set 'default' has lost 'fc': it was replaced"
    ):
        resadapt.remove_adapters(model)
    assert picture(model) == before


def test_a_forward_of_its_own_on_one_sequential() -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1)))
    model[0].forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(resadapt.InjectionError, match="container with a custom forward"):
        resadapt.inject_adapters(model, "0", 2)


def test_a_resnet_block_with_other_parts() -> None:
    model = resnet18()
    model.layer4[1].conv2 = nn.Sequential(nn.Conv2d(512, 512, 3, padding=1))
    resadapt.inject_adapters(model, "layer4", 2)
    assert resadapt.list_adapters(model)[0].sites[0].channels == 512


def test_a_name_that_looks_like_a_glob() -> None:
    model = nn.Sequential()
    model.add_module("[x]", nn.Conv2d(3, 4, 1))
    assert (
        resadapt.list_adapters(resadapt.inject_adapters(model, "[x]", 2))[0].sites[0].name == "[x]"
    )
