"""Inputs like a given one, of other sizes or with one more sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resadapt.base.inputs import named_in
from resadapt.base.other_inputs import batch_size, resized, with_one_more_sample

CONV, LINE, TOKENS = nn.Conv2d(3, 4, 1), nn.Conv1d(1, 4, 1), nn.Linear(5, 4)


@dataclass
class Wrapped:
    pixels: Tensor


def shapes(inputs: Any, *modules: nn.Module) -> list[list[tuple[int, ...]]]:
    return [
        [tuple(tensor.shape) for _, tensor in named_in(other)] for other in resized(inputs, modules)
    ]


@pytest.mark.parametrize(
    ("inputs", "layer", "expected"),
    [
        (torch.ones(2, 3, 224, 224), CONV, [(128, 128), (256, 256), (448, 448)]),
        (torch.ones(1, 3, 64, 32), CONV, [(32, 16), (96, 64), (128, 64)]),
        (torch.ones(1, 3, 8, 7), CONV, [(4, 4), (16, 14), (16, 14)]),
        (torch.ones(1, 3, 2, 1), CONV, [(1, 1), (4, 1), (4, 1)]),
        (torch.ones(1, 12, 4, 4), CONV, [(2, 2), (8, 8), (8, 8)]),  # folded into channels first
    ],
)
def test_images(inputs: Tensor, layer: nn.Module, expected: list[tuple[int, ...]]) -> None:
    assert shapes(inputs, layer) == [[(*inputs.shape[:2], *size)] for size in expected]


@pytest.mark.parametrize(
    ("inputs", "layer", "smaller"),
    [
        (torch.ones(2, 8, 8, 3), CONV, (2, 4, 4, 3)),  # the model permutes
        (torch.ones(2, 6, 3, 8, 8), CONV, (2, 6, 3, 4, 4)),  # frames of a video
        (torch.ones(2, 64), LINE, (2, 32)),  # a sound
        (torch.ones(2, 8, 5), TOKENS, (2, 4, 5)),
        (torch.ones(2, 8, 6, 5), TOKENS, (2, 4, 4, 5)),
        (torch.ones(2, 8, dtype=torch.int64), TOKENS, (2, 4)),
        (torch.ones(2, 3, 8, 8, dtype=torch.uint8), CONV, (2, 3, 4, 4)),
    ],
)
def test_other_layouts(inputs: Tensor, layer: nn.Module, smaller: tuple[int, ...]) -> None:
    assert shapes(inputs, nn.ReLU(), layer)[0] == [smaller]


@pytest.mark.parametrize(
    ("inputs", "layer"),
    [
        (torch.ones(2, 5), TOKENS),
        (torch.ones(2, 5, 6), TOKENS),
        (torch.ones(2, 3, 8, 8), nn.ReLU()),
        (torch.ones(2, 3, 1, 1), CONV),
        (torch.ones(2, dtype=torch.int64), TOKENS),
        (3.5, CONV),
        ("text", CONV),
        ((), CONV),
        (Wrapped(torch.ones(2, 3, 8, 8)), CONV),  # cannot be made again
    ],
)
def test_inputs_without_sizes(inputs: Any, layer: nn.Module) -> None:
    assert shapes(inputs, layer) == []


def test_tensors_of_one_size_change_together() -> None:
    inputs = {
        "pixels": torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6),
        "mask": torch.arange(2 * 4 * 6.0).reshape(2, 4, 6),
        "size": (torch.tensor([4, 6]), "name", 4),
    }
    smaller: Any = next(iter(resized(inputs, [CONV])))
    assert torch.equal(smaller["pixels"], inputs["pixels"][:, :, :2, :4])
    assert torch.equal(smaller["mask"], inputs["mask"][:, :2, :4])
    assert torch.equal(smaller["size"][0], inputs["size"][0])
    assert smaller["size"][1:] == ("name", 4)


def test_larger_inputs_repeat_values() -> None:
    x = torch.arange(3.0 * 2 * 2).reshape(1, 3, 2, 2)
    _, larger, double = resized(x, [CONV])
    for other in (larger, double):
        assert torch.equal(other, x.repeat(1, 1, 2, 2))


def test_integers_only_become_fewer() -> None:
    ids = torch.arange(8).reshape(1, 8)
    (smaller,) = resized({"ids": ids, "image": torch.ones(1, 3, 8, 8)}, [CONV])
    assert torch.equal(smaller["ids"], ids[:, :4])  # type: ignore[index]
    assert smaller["image"].shape == (1, 3, 4, 4)  # type: ignore[index]
    assert len(list(resized((torch.ones(1, 8, 5), ids > 3), [TOKENS]))) == 3  # a mask is no index


def test_one_more_sample() -> None:
    x, ids = torch.randn(2, 3, 4), torch.arange(2)
    inputs = {"x": x, "ids": ids, "table": torch.ones(5), "scale": torch.tensor(1.0)}
    more: Any = with_one_more_sample(inputs)
    assert torch.equal(more["x"], torch.cat([x, x[:1]]))
    assert more["ids"].tolist() == [0, 1, 0]
    assert more["table"].shape == (5,)
    assert more["scale"].shape == ()
    assert (batch_size(inputs), batch_size(3), batch_size(torch.tensor(1.0))) == (2, None, None)
