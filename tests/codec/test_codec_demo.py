"""What the demo says of its figures."""

from __future__ import annotations

import re

import demo
import pytest
from av1partition.evaluation.spread import over_seeds


@pytest.mark.parametrize(
    ("adapters", "said"),
    [
        ((0.46, 0.461, 0.459), r"\+6.00 points .* the adapters add something here"),
        ((0.40, 0.401, 0.399), r"\+0.00 points .* within the seeds' spread"),
        ((0.36, 0.361, 0.359), "-4.00 points .* the adapters do harm here"),
        ((0.30, 0.55, 0.40), r"\+1.67 points .* within the seeds' spread"),
    ],
)
def test_adapters_against_the_frozen_head_in_words(adapters: tuple[float, ...], said: str) -> None:
    scores = {
        demo.FROZEN: (0.40, 0.40, 0.40),
        demo.ADAPTERS: adapters,
        "trees-q": (0.5, 0.52, 0.54),
    }
    validation = {
        name: {"about": f"about {name}", "macro_f1": over_seeds(values)}
        for name, values in scores.items()
    }
    text = demo.said_of(validation)
    assert re.search(said, text), text
    assert "Best of these: about trees-q, 0.5200." in text
