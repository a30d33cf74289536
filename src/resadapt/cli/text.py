"""Text for a terminal: aligned columns, in which a file's content cannot move the cursor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["columns", "one_line", "show", "visible"]


def visible(text: str) -> str:
    """Returns a text with escapes in place of control characters, which may come from a file."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def one_line(text: str) -> str:
    """Returns a text on one line."""
    return visible(" ".join(text.split()))


def show(line: str = "") -> None:
    """Prints a line at once, so that it is seen while the next step runs."""
    print(visible(line), flush=True)


def columns(rows: Iterable[Sequence[str]]) -> list[str]:
    """Returns rows of cells as aligned lines."""
    rows = list(rows)
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
