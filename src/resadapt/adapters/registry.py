"""The families, told as a table."""

from dataclasses import dataclass

from resadapt.adapters.family import FAMILIES, Adapter

__all__ = ["FamilyInfo", "list_families"]


@dataclass(frozen=True)
class FamilyInfo:
    """What a family is.

    Args:
        name: Its name, for ``inject_adapters(family=)``.
        formula: What the adapted output is; x is the module's output, h its input, W its weight.
        reads: What of the module it reads, unless an option changes that: ``"output"``, ``"input"``
            (and the output), or ``"weight"`` (and both).
        size: Number of parameters at a site with C channels.
        starts: How it starts.
        foldable: Whether it can be folded into the module's own tensors.
        source: Where it is from.
    """

    name: str
    formula: str
    reads: str
    size: str
    starts: str
    foldable: bool
    source: str


def list_families() -> list[FamilyInfo]:
    """Tells which families there are, those of your own included.

    Returns:
        One entry a family, in the order of registration.

    Example:
        >>> [info.formula for info in list_families() if info.name == "pooled"]
        ['x + up(dropout(relu(down(mean x))))']
    """
    return [
        FamilyInfo(
            name=name,
            formula=family.formula,
            reads=family.reads,
            size=family.size,
            starts=family.starts,
            foldable=family.folded is not Adapter.folded,
            source=family.source,
        )
        for name, family in FAMILIES.items()
    ]
