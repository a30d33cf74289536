"""Which split a sequence or a picture goes into: whole, so that validation does not leak."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from av1partition.data.blocks import SPLITS, DatasetError


def split_by_name(
    names: Sequence[str], val: Sequence[str], test: Sequence[str], noun: str
) -> dict[str, list[str]]:
    """Say of each name in which split it is.

    Args:
        names: All there are.
        val: Names in "val", or patterns such as "crowd_*".
        test: The same for "test".
        noun: What is named, for errors.

    Returns:
        The names of "train", which are the others, of "val" and of "test", each in order.

    Raises:
        DatasetError: A pattern fits no name, or a name is in two splits.

    Example:
        >>> split_by_name(["crowd_1", "crowd_2", "sea", "park"], ["crowd_*"], ["sea"], "sequence")
        {'train': ['park'], 'val': ['crowd_1', 'crowd_2'], 'test': ['sea']}
    """
    in_val, in_test = (
        {name for pattern in patterns for name in _fitting(names, pattern, noun)}
        for patterns in (val, test)
    )
    if both := sorted(in_val & in_test):
        raise DatasetError(f"{noun}s {both} are in val and in test; name each in one of them")
    return {
        "train": sorted(set(names) - in_val - in_test),
        "val": sorted(in_val),
        "test": sorted(in_test),
    }


def split_by_name_or_share(
    names: Sequence[str], val: Sequence[str], test: Sequence[str], seed: int, noun: str
) -> dict[str, list[str]]:
    """As :func:`split_by_name`, but "val" and "test" may each be a share of all names instead.

    A share is a text such as "0.15". It takes at least one name, unless it is 0, of those that the
    other split does not name. Which ones depends on the seed; a name's place in the draw does not
    depend on the other names or their order.

    Raises:
        DatasetError: See :func:`split_by_name`; or the shares leave nothing for "train".

    Example:
        >>> split_by_name_or_share(["a", "b", "c", "d"], ["0.25"], ["a"], seed=0, noun="picture")
        {'train': ['b', 'c'], 'val': ['d'], 'test': ['a']}
    """
    shares = {"test": _share(test), "val": _share(val)}
    named = split_by_name(
        names, val if shares["val"] is None else [], test if shares["test"] is None else [], noun
    )
    left = sorted(
        named["train"], key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()
    )
    for split, share in shares.items():
        count = max(1, round(share * len(names))) if share else 0
        if share and count >= len(left):
            raise DatasetError(
                f"a share of {share:g} for {split} leaves none of {len(names)} {noun}s for train; "
                f"pass more {noun}s, or smaller shares (0: none), or names"
            )
        named[split], left = sorted([*named[split], *left[:count]]), left[count:]
    return {**named, "train": sorted(left)}


def check_not_empty(splits: dict[str, list[str]], noun: str) -> None:
    """Refuse splits with which nothing can be trained.

    Raises:
        DatasetError: "train" or "val" is empty.
    """
    for split in SPLITS[:2]:
        if not splits[split]:
            every = sorted(name for members in splits.values() for name in members)
            raise DatasetError(f"no {noun} is left for {split}; there are {len(every)}: {every}")


def _fitting(names: Sequence[str], pattern: str, noun: str) -> list[str]:
    fitting = [name for name in names if name == pattern] or [
        name for name in names if fnmatchcase(name, pattern)
    ]
    if not fitting:
        raise DatasetError(f"no {noun} is named {pattern!r}; there are {sorted(names)}")
    return fitting


def _share(values: Sequence[str]) -> float | None:
    try:
        share = float(values[0]) if len(values) == 1 else -1.0
    except ValueError:
        return None
    return share if 0 <= share < 1 else None
