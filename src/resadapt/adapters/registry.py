"""Descriptions of the registered families."""

from dataclasses import dataclass

from resadapt.adapters.family import FAMILIES, Adapter

__all__ = ["FamilyInfo", "list_families"]


@dataclass(frozen=True)
class FamilyInfo:
    """Description of a family.

    Args:
        name: Name of the family, for ``inject_adapters(family=)``.
        formula: The adapted output, where x is the module's output, h its input, W its weight.
        reads: What adapters read, unless an option changes it: the module's ``"output"``;
            ``"input"``: input and output; ``"weight"``: input, output, weight and bias.
        size: Number of parameters at a site with C channels.
        starts: Initialization.
        foldable: Whether adapters can be merged into the module's weight and bias.
        source: Paper or code of the family.
    """

    name: str
    formula: str
    reads: str
    size: str
    starts: str
    foldable: bool
    source: str


def list_families() -> list[FamilyInfo]:
    """Lists the registered families, custom families included.

    Returns:
        One entry per family, in the order of registration.

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
