"""Families of the user's own: registered, used, saved and loaded, and what they get wrong told before anything changes."""

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
        (KeepsModule, {}, "keeps a module or tensor of its site"),
        (KeepsParameter, {}, "keeps a module or tensor of its site"),
        (KeepsBuffer, {}, "keeps a module or tensor of its site"),
        (Fails, {}, "no adapter can be made for site 'layer4.1': KeyError: 'a'"),
        (Forgets, {}, r"Forgets does not call super\(\).__init__\(\)"),
        (ReadsAll, {}, "reads='everything'"),
        (ReadsWeight, {}, "reads a weight and a bias, and BasicBlock has none"),
        (Weighted, {"weights": torch.ones(2)}, r"weights=tensor\(\[1., 1.\]\) is no JSON value"),
        (Weighted, {"weights": [float("nan")]}, r"weights=\[nan\] is no JSON value"),
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
        (lambda x: x.mean((2, 3), keepdim=True), r"returned shape \[2, 512, 1, 1\] where its site returned shape \[2, 512, 2, 2\]"),
        (lambda x: (x, x), "returned tuple"),
    ],
)
def test_another_shape_is_refused_in_the_forward(result: Callable[[Tensor], Any], message: str) -> None:
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
    with pytest.raises(resadapt.AdapterFileError, match=r"adapter at 'layer4' .*keeps '_extra_state'"):
        resadapt.save_adapters(model, tmp_path / "own")
    assert not (tmp_path / "own").exists()
