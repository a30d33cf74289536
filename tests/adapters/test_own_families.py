"""Families of the user's own: registered, used, saved, loaded, and their mistakes told early."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import images, picture, small_resnet, train
from torch import Tensor, nn

import resadapt
from resadapt.adapters import FAMILIES, Adapter, Site


@pytest.fixture(autouse=True)
def _no_families_stay() -> Iterator[None]:
    before = dict(FAMILIES)
    yield
    FAMILIES.clear()
    FAMILIES.update(before)


class Own(Adapter):
    """What the others vary: a number that is added."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Any:
        return x + self.beta


class Weighted(Own):
    """With an option, a tuple."""

    def __init__(self, site: Site, *, weights: Any = (1, 2)) -> None:
        super().__init__(site)
        self.weights = weights

    def forward(self, x: Tensor) -> Any:
        return x + self.beta * sum(self.weights)


def test_options_are_what_the_file_gives_back(tmp_path: Path) -> None:
    resadapt.register_family("own")(Weighted)
    model, x = small_resnet(), images()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    resadapt.inject_adapters(model, "layer4", family="own", weights=(3, 4))
    train(model, torch.optim.SGD(resadapt.trainable_parameters(model), lr=0.1))
    assert resadapt.save_adapters(model, tmp_path / "own").ok
    fresh = small_resnet(seed=3)
    fresh.load_state_dict(weights)
    for _ in range(2):  # injected as described, then loaded into what is there
        resadapt.load_adapters(fresh, tmp_path / "own")
    resadapt.load_adapters(model, tmp_path / "own")
    assert torch.equal(fresh.eval()(x), model.eval()(x))


class KeepsModule(Own):
    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.kept = site.module


class KeepsParameter(Own):
    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.kept = site.module.conv2.weight  # type: ignore[union-attr]


class KeepsBuffer(Own):
    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.register_buffer("kept", site.module.bn2.running_mean)  # type: ignore[union-attr, arg-type]


class Fails(Own):
    def __init__(self, site: Site) -> None:
        super().__init__(site)
        raise KeyError("a")


class Forgets(Own):
    def __init__(self, site: Site) -> None:
        pass


class ReadsAll(Own):
    reads = "everything"


class ReadsWeight(Own):
    reads = "weight"


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        (KeepsModule, {}, "stores a module or tensor of its site"),
        (KeepsParameter, {}, "stores a module or tensor of its site"),
        (KeepsBuffer, {}, "stores a module or tensor of its site"),
        (Fails, {}, "cannot build an adapter for site 'layer4.1': KeyError: 'a'"),
        (Forgets, {}, r"Forgets does not call super\(\).__init__\(\)"),
        (ReadsAll, {}, "reads='everything'"),
        (ReadsWeight, {}, "reads a weight and a bias, but BasicBlock has none"),
        (Weighted, {"weights": torch.ones(2)}, r"weights=tensor\(\[1., 1.\]\) is not a JSON value"),
        (Weighted, {"weights": [float("nan")]}, r"weights=\[nan\] is not a JSON value"),
    ],
)
def test_what_is_refused_at_injection(family: Any, options: dict[str, Any], message: str) -> None:
    resadapt.register_family("own")(family)
    model = small_resnet()
    before = picture(model)
    with pytest.raises(resadapt.InjectionError, match=message):
        resadapt.inject_adapters(model, "layer4.1", family="own", **options)
    assert picture(model) == before


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (
            lambda x: x.mean((2, 3), keepdim=True),
            r"returned shape \[2, 512, 1, 1\], but its site returned shape \[2, 512, 2, 2\]",
        ),
        (lambda x: (x, x), "returned tuple"),
    ],
)
def test_another_shape_is_refused_in_the_forward(
    result: Callable[[Tensor], Any], message: str
) -> None:
    class Reshapes(Own):
        def forward(self, x: Tensor) -> Any:
            return result(x + self.beta)

    resadapt.register_family("own")(Reshapes)
    model = resadapt.inject_adapters(small_resnet(), "layer4", family="own")
    with pytest.raises(resadapt.InjectionError, match=message):
        model(images(size=64))


def test_state_besides_tensors_is_not_left_out_of_a_file(tmp_path: Path) -> None:
    class Counts(Own):
        def get_extra_state(self) -> Any:
            return {"steps": 3}

    resadapt.register_family("own")(Counts)
    model = resadapt.inject_adapters(small_resnet(), "layer4", family="own")
    with pytest.raises(
        resadapt.AdapterFileError, match=r"adapter at 'layer4' .*has '_extra_state'"
    ):
        resadapt.save_adapters(model, tmp_path / "own")
    assert not (tmp_path / "own").exists()


class Lazy(Own):
    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.inside = nn.LazyConv2d(site.channels, 1)


class ReadsValues(Own):
    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.steps = torch.linspace(0, 1, 3).tolist()


class OnMeta(Own):
    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.inside = nn.Conv2d(site.channels, 1, 1, device="meta")


class Expanded(Own):
    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.wide = nn.Parameter(torch.zeros(1).expand(4))


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (Lazy, r"'inside.weight' has no size yet\. Lazy modules cannot be used"),
        (ReadsValues, "on the meta device, where the constructor must run too"),
        (OnMeta, "'inside.weight' is created on the meta device"),
        (Expanded, "elements of 'wide' share memory, as after expand. Clone the tensor"),
    ],
)
def test_what_could_not_be_saved_is_refused_at_injection(family: Any, message: str) -> None:
    resadapt.register_family("own")(family)
    model = resadapt.inject_adapters(small_resnet(), "layer3", 4, name="there")
    before = picture(model)
    with pytest.raises(resadapt.InjectionError, match=message):
        resadapt.inject_adapters(model, "layer4", family="own")
    assert picture(model) == before
    resadapt.remove_adapters(model)


def test_two_tensors_of_one_name_are_refused() -> None:
    class Nested(Own):
        def __init__(self, site: Site) -> None:
            super().__init__(site)
            self.extend(nn.Module())

        def extend(self, child: nn.Module) -> None:
            child.beta = nn.Parameter(torch.zeros(1))
            self.add_module("0", child)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("0", nn.Conv2d(3, 3, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.get_submodule("0")(x) + x

    resadapt.register_family("own")(Nested)
    model = nn.Sequential(Block(), nn.Conv2d(3, 3, 1))
    before = picture(model)
    with pytest.raises(resadapt.InjectionError, match=r"both have a tensor '0\.0\.beta'"):
        resadapt.inject_adapters(model, ["0", "0.0"], family="own", example_input=images())
    assert picture(model) == before


class Tied(Own):
    """Two convolutions with one weight, and one module under two names."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.down, self.up = (
            nn.Conv2d(site.channels, site.channels, 1, bias=False) for _ in range(2)
        )
        self.up.weight = self.down.weight
        self.again = self.down

    def forward(self, x: Tensor) -> Any:
        return x + self.up(torch.relu(self.again(x)))


def test_what_is_tied_stays_trained_and_tied(tmp_path: Path) -> None:
    resadapt.register_family("own")(Tied)
    model, x = small_resnet(), images()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    resadapt.inject_adapters(model, "layer4", family="own")
    for _ in range(2):
        with resadapt.adapters_disabled(model):
            pass
        resadapt.inject_adapters(model, "layer3", 2, name="other")
        resadapt.set_active_adapters(model, "default")
        resadapt.remove_adapters(model, "other")
    assert all(parameter.requires_grad for parameter in resadapt.trainable_parameters(model))
    counted = resadapt.count_parameters(model)
    assert counted.trainable == counted.adapters == 512 * 512 + 1
    train(model, torch.optim.SGD(resadapt.trainable_parameters(model), lr=0.1))
    assert resadapt.save_adapters(model, tmp_path / "own").ok
    fresh = small_resnet(seed=3)
    fresh.load_state_dict(weights)
    assert torch.equal(resadapt.load_adapters(fresh, tmp_path / "own").eval()(x), model.eval()(x))


class Caching(Own):
    """With a buffer that is not saved, and changes its size."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.register_buffer("cache", torch.zeros(1), persistent=False)
        self.phase = nn.Parameter(torch.full((site.channels, 1, 1), 1j))

    def forward(self, x: Tensor) -> Any:
        self.cache = torch.zeros(x.shape[0])
        return x * self.phase.abs() + self.beta


def test_caches_are_not_saved_and_complex_numbers_stay_so(tmp_path: Path) -> None:
    resadapt.register_family("own")(Caching)
    model, x = small_resnet(), images(3)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    resadapt.inject_adapters(model, "layer4", family="own")
    train(model, torch.optim.SGD(resadapt.trainable_parameters(model), lr=0.1))
    state = resadapt.adapter_state_dict(model)
    assert {key: tensor.dtype for key, tensor in state.items()} == {
        "adapters.layer4.beta": torch.float32,
        "adapters.layer4.phase": torch.complex64,
    }
    assert resadapt.save_adapters(model, tmp_path / "own").ok
    fresh = small_resnet(seed=3)
    fresh.load_state_dict(weights)
    assert torch.equal(resadapt.load_adapters(fresh, tmp_path / "own").eval()(x), model.eval()(x))


class Taking(Own):
    """Changes the option that it was given."""

    def __init__(self, site: Site, *, steps: Any = None) -> None:
        super().__init__(site)
        self.first = steps["sizes"].pop() if steps else 0


def test_options_are_those_that_were_given() -> None:
    resadapt.register_family("own")(Taking)
    model = resadapt.inject_adapters(
        small_resnet(), ["layer3", "layer4"], family="own", steps={"sizes": [1, 2, 3]}
    )
    assert [module.first for module in model.modules() if isinstance(module, Taking)] == [3, 3]
    with pytest.raises(resadapt.InjectionError, match="would be loaded as"):
        resadapt.inject_adapters(small_resnet(), "layer4", family="own", steps={"sizes": [1], 2: 3})
