"""Turning blocks with their labels, proven on partitions drawn by hand."""

from __future__ import annotations

import pytest
import torch
from av1partition.data.symmetries import SYMMETRIES, Symmetry, turn, turn_at_random, turned_classes
from av1partition.data.tasks import AB, KINDS, PARTITIONS, RECT, STAGE1, STAGE2, Task
from torch import Tensor

# Each partition as AV1 cuts it, a letter for each part, a character for each 4x4 pixels.
DRAWN = {
    "NONE": "aaaa aaaa aaaa aaaa",
    "HORZ": "aaaa aaaa bbbb bbbb",
    "VERT": "aabb aabb aabb aabb",
    "SPLIT": "aabb aabb ccdd ccdd",
    "HORZ_A": "aabb aabb cccc cccc",
    "HORZ_B": "aaaa aaaa bbcc bbcc",
    "VERT_A": "aacc aacc bbcc bbcc",
    "VERT_B": "aabb aabb aacc aacc",
    "HORZ_4": "aaaa bbbb cccc dddd",
    "VERT_4": "abcd abcd abcd abcd",
}
BY_HAND = {
    (True, False, False): {"HORZ_A": "HORZ_B", "HORZ_B": "HORZ_A"},
    (False, True, False): {"VERT_A": "VERT_B", "VERT_B": "VERT_A"},
    (False, False, True): {
        "HORZ": "VERT",
        "VERT_4": "HORZ_4",
        "HORZ_A": "VERT_A",
        "VERT_B": "HORZ_B",
    },
    # Top to bottom and then transposed: a quarter turn clockwise.
    (True, False, True): {
        "HORZ_A": "VERT_B",
        "VERT_B": "HORZ_B",
        "HORZ_B": "VERT_A",
        "VERT_A": "HORZ_A",
        "HORZ": "VERT",
    },
}


def drawing(kind: str) -> Tensor:
    parts = torch.tensor([[ord(letter) for letter in row] for row in DRAWN[kind].split()])
    return parts.repeat_interleave(4, 0).repeat_interleave(4, 1)[None, None]


def same_cuts(one: Tensor, other: Tensor) -> bool:
    """Whether two drawings have the same parts, whatever their letters."""
    one, other = one.flatten(), other.flatten()
    return torch.equal(one[:, None] == one, other[:, None] == other)


@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_a_turned_drawing_is_the_drawing_of_the_turned_kind(symmetry: Symmetry) -> None:
    after = turned_classes(KINDS, symmetry)
    for before, kind in enumerate(PARTITIONS):
        turned = turn(drawing(kind), symmetry)
        alike = [each for each in PARTITIONS if same_cuts(turned, drawing(each))]
        assert alike == [PARTITIONS[after[before]]]


@pytest.mark.parametrize(("symmetry", "expected"), BY_HAND.items())
def test_by_hand(symmetry: Symmetry, expected: dict[str, str]) -> None:
    after = turned_classes(KINDS, symmetry)
    for before, kind in expected.items():
        assert PARTITIONS[after[PARTITIONS.index(before)]] == kind


def test_a_quarter_turn_is_one() -> None:
    block = torch.rand(2, 1, 16, 16)
    assert torch.equal(turn(block, (True, False, True)), block.rot90(-1, (2, 3)))


@pytest.mark.parametrize("task", [STAGE1, STAGE2, RECT, AB])
@pytest.mark.parametrize("symmetry", SYMMETRIES)
def test_the_classes_of_a_task_follow_the_kinds(task: Task, symmetry: Symmetry) -> None:
    kinds, classes = turned_classes(KINDS, symmetry), turned_classes(task, symmetry)
    asked = task.of(torch.arange(10)) >= 0
    assert torch.equal(classes[task.of(torch.arange(10))[asked]], task.of(kinds)[asked])


def test_augmentation_turns_each_block_with_its_label() -> None:
    torch.manual_seed(0)
    labels = torch.arange(10).repeat(80)
    samples = torch.cat([drawing(kind) for kind in PARTITIONS]).repeat(80, 1, 1, 1)
    turned, after = turn_at_random(KINDS)(samples, labels)
    assert all(
        same_cuts(block[0], drawing(PARTITIONS[label]))
        for block, label in zip(turned, after, strict=True)
    )
    ways = {
        tuple(block.flatten().tolist())
        for block, label in zip(turned, labels, strict=True)
        if PARTITIONS[label] == "HORZ_A"
    }
    assert len(ways) == 8, "every symmetry occurs"
