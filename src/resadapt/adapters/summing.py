"""Tensors of an adapter whose change of the output is a weighted sum of other adapters' changes."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["Terms", "concatenated", "weighted_sum"]

Terms = Sequence[tuple[float, Mapping[str, Tensor]]]
"""A weight, and the tensors by name, of each adapter."""


def weighted_sum(terms: Terms) -> dict[str, Tensor]:
    """Returns the sum of the tensors, for changes that are linear in them.

    Integer tensors, such as counters, are those of the first term. Other terms may lack tensors of
    the first.
    """
    total = {}
    for key, first in terms[0][1].items():
        total[key] = first
        if first.is_floating_point() or first.is_complex():
            total[key] = torch.zeros_like(first)
            for weight, tensors in terms:
                if key in tensors:
                    total[key] += weight * tensors[key]
    return total


def concatenated(terms: Terms, groups: int = 1, hidden_dim: int = 0) -> dict[str, Tensor]:
    """Returns the tensors of the layers `down` and `up` with the hidden units of all terms.

    The hidden units must not affect each other between `down` and `up`.

    Args:
        terms: The terms.
        groups: Number of groups of both layers.
        hidden_dim: Dimension of the hidden units in the weight of `down`.
    """
    down = {
        key: torch.cat(
            [torch.unflatten(each[key], hidden_dim, (groups, -1)) for _, each in terms],
            hidden_dim + 1,
        ).flatten(hidden_dim, hidden_dim + 1)
        for key in terms[0][1]
        if key.startswith("down.")
    }
    up = {"up.weight": torch.cat([weight * tensors["up.weight"] for weight, tensors in terms], 1)}
    biases = [(weight, {"up.bias": t["up.bias"]}) for weight, t in terms if "up.bias" in t]
    return down | up | (weighted_sum(biases) if biases else {})
