"""How sure a figure is: over seeds, and between two ways of doing the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation (of a sample; 0 of one value)."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {
        "mean": float(np.mean(values)),
        "deviation": deviation,
        "values": [float(value) for value in values],
    }


def paired_difference(
    ours: Sequence[float], theirs: Sequence[float], confidence: float = 0.95
) -> dict[str, float]:
    """The mean difference of two ways that were tried with the same seeds, and its interval.

    The interval is a confidence interval by Student's t.

    Args:
        ours: A figure for each seed.
        theirs: The same of the other way, in the same order.
        confidence: Of the interval.

    Raises:
        ValueError: Not the same number of seeds, or fewer than two.

    Example:
        >>> round(paired_difference([0.52, 0.55, 0.54], [0.50, 0.51, 0.52])["mean"], 4)
        0.0267
    """
    if len(ours) != len(theirs) or len(ours) < 2:
        raise ValueError(
            f"{len(ours)} and {len(theirs)} values, expected the same number, at least two"
        )
    differences = np.subtract(ours, theirs)
    mean, error = float(np.mean(differences)), float(stats.sem(differences))
    reach = error * float(stats.t.ppf((1 + confidence) / 2, len(differences) - 1))
    return {"mean": mean, "low": mean - reach, "high": mean + reach, "confidence": confidence}
