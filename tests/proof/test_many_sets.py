"""The cost of a set does not depend on how many other sets the model has."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from support import images, small_net

import resadapt

OPTIONS: dict[str, Any] = {"layers": "c2", "bottleneck": 2, "head": "head", "norm": "stats"}


def calls_in(function: Callable[[], object]) -> int:
    """Counts the calls of Python functions: the work without a clock."""
    calls = 0

    def count(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(before)
    return calls


def test_cost_of_a_set_does_not_grow_with_the_number_of_sets(tmp_path: Path) -> None:
    path, costs = tmp_path / "set.pt", {}
    for count in (2, 17):
        model = small_net()
        for number in range(count):
            resadapt.inject_adapters(model.eval(), name=f"set{number}", **OPTIONS)
        resadapt.save_adapters(model, path, name="set0")
        model(images())
        costs[count] = {
            "forward": calls_in(lambda: model(images())),
            "switch": calls_in(lambda: resadapt.set_active_adapters(model, "set0")),
            "load": calls_in(lambda: resadapt.load_adapters(model, path, name="more")),
            "save": calls_in(lambda: resadapt.save_adapters(model, path)),
        }
    growth = {what: costs[17][what] / costs[2][what] for what in costs[2]}
    # A save and a load walk over all modules a few times, which counts in so small a network.
    limits = {"forward": 1.0, "switch": 1.0, "load": 1.2, "save": 1.3}
    assert not {what: found for what, found in growth.items() if found > limits[what]}, growth
