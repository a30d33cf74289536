"""Attributes and hooks that a first forward sets are taken off again."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from typing import Any

import pytest
import torch
from support import images, picture
from torch import Tensor, nn

import resadapt
from resadapt.base.attributes import attributes_kept


class Installs(nn.Module):
    """Sets hooks, attributes, a child and elements of its containers in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.act = nn.Softsign()
        self.log: list[Any] = [{"sizes": {3}}]
        self.by_name: dict[str, Any] = defaultdict(list, a=[1])
        self.ordered = OrderedDict(b=1, a=2)
        self.log.append(self.log)  # contains itself
        self.gone = 1

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "ready"):
            self.ready = True
            self.conv.register_forward_hook(lambda *_: None)
            self.act.register_forward_pre_hook(lambda *_: None, with_kwargs=True)
            self.act.register_full_backward_hook(lambda *_: None)
            self.conv.seen = True  # type: ignore[assignment]
            self.late = nn.ReLU()
            self.register_buffer("made", torch.zeros(1))
            del self.gone
        self.log[0]["sizes"].add(x.shape[-1])
        self.log.append(x)
        self.by_name["a"].append(x)
        self.by_name["new"].append(x)
        self.ordered.move_to_end("b")
        return self.act(self.conv(x))  # may raise


def content(model: Any) -> Any:
    return (
        picture(model),
        copy.deepcopy(model.log[0]),
        [id(each) for each in model.log],
        copy.deepcopy(model.by_name),
        [*model.ordered],
        model.gone,
    )


@pytest.mark.parametrize("dim", [None, -1, 1])
def test_an_injection_removed_or_refused_leaves_no_trace(dim: int | None) -> None:
    model = Installs()
    expected = content(model)
    for example in (images(2, 4), None):
        if dim == -1:
            with pytest.raises(resadapt.InjectionError, match="channel_dim=-1 is wrong"):
                resadapt.inject_adapters(model, "act", 2, example_input=example, channel_dim=dim)
        else:
            resadapt.inject_adapters(model, "act", 2, example_input=example, channel_dim=dim)
            resadapt.remove_adapters(model)
        assert content(model) == expected
    resadapt.suggest_layers(model, 100, layers="act", example_input=images(2, 4))
    assert content(model) == expected
    model(images(2, 4))
    assert model.ready


def test_what_the_body_leaves_alone_stays_as_it_is() -> None:
    model = Installs()
    objects = {key: id(value) for key, value in model.__dict__.items()}
    handle = model.register_forward_hook(lambda *_: None)
    with attributes_kept(model):
        model.eval()
    assert model.training
    handle.remove()
    assert {key: id(value) for key, value in model.__dict__.items()} == objects


def test_errors_in_the_body() -> None:
    model = Installs()
    expected = content(model)
    with pytest.raises(RuntimeError), attributes_kept(model):
        model(images(2, 4, channels=2))
    assert content(model) == expected
