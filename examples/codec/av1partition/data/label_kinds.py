"""Which kinds of partition labels have, and which stages cannot be trained on them.

It depends on the encoder and its speed: fast ones never try some kinds.
"""

from __future__ import annotations

from av1partition.data.blocks import BlockSet
from av1partition.data.tasks import AB, PARTITIONS, RECT, STAGE1, STAGE2

RARE = 0.01  # share of a stage's blocks, below which a class is hardly learned


def describe_kinds(blocks: BlockSet, *, learn: bool) -> list[str]:
    """Lines about the labels, for people.

    Args:
        blocks: Of one split.
        learn: Also say which stages cannot be trained on them.

    Example:
        >>> import torch
        >>> labels = torch.tensor([0, 0, 1, 2, 3, 3, 3, 3])
        >>> blocks = BlockSet(torch.zeros(8, 1, 16, 16), labels, torch.full((8,), 80))
        >>> for line in describe_kinds(blocks, learn=True):
        ...     print(line)
        NONE 2 (25.0%), HORZ 1 (12.5%), VERT 1 (12.5%), SPLIT 4 (50.0%); no HORZ_A, HORZ_B, \
VERT_A, VERT_B, HORZ_4, VERT_4
        Stage 2 cannot be trained: no block is AB
        Stage 3 AB cannot be trained: no block is HORZ_A, HORZ_B, VERT_A or VERT_B
    """
    if not len(blocks):
        return []
    counts = blocks.labels_stage0.bincount(minlength=len(PARTITIONS)).tolist()
    named = list(zip(PARTITIONS, counts, strict=True))
    there = [f"{name} {count} ({count / len(blocks):.1%})" for name, count in named if count]
    missing = [name for name, count in named if not count]
    lines = [", ".join(there) + (f"; no {', '.join(missing)}" if missing else "")]
    for task in (STAGE1, STAGE2, RECT, AB) if learn else ():
        labels = blocks.of(task).labels(task)
        shares = labels.bincount(minlength=len(task.classes)) / max(len(labels), 1)
        of_class = list(zip(task.classes, shares.tolist(), strict=True))
        absent = [name for name, share in of_class if not share]
        rare = [f"{name} ({share:.1%})" for name, share in of_class if 0 < share < RARE]
        if absent:
            lines.append(f"{task.title} cannot be trained: no block is {_or(absent)}")
        elif rare:
            lines.append(
                f"{task.title} will hardly learn {_or(rare)}: too few of its {len(labels)} blocks"
            )
    return lines


def _or(names: list[str]) -> str:
    *before, last = names
    return f"{', '.join(before)} or {last}" if before else last
