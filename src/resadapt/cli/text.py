"""Text for a terminal: aligned columns, in which a file's content cannot move the cursor."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence

__all__ = ["FILE", "columns", "one_line", "shortened", "show", "show_json", "visible"]

FILE = "adapter file, directory or hf://user/name"
"""What a command takes for an adapter file, for its help."""


def visible(text: str) -> str:
    """Returns a text with escapes in place of control characters, which may come from a file."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def one_line(text: str) -> str:
    """Returns a text on one line."""
    return visible(" ".join(text.split()))


def shortened(text: str, most: int = 300) -> str:
    """Returns the beginning of a text, without the period at its end."""
    text = text.rstrip(". ")
    return text if len(text) <= most else f"{text[:most]}..."


def show(line: str = "") -> None:
    """Prints a line at once, so that it is seen while the next step runs.

    Characters that the terminal does not have are shown as escapes. If the reader of a pipe has
    stopped, as ``head`` does, the command goes on without output: its status is still wanted, and
    so is a file that it writes.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(visible(line).encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show_json(value: object) -> None:
    """Prints a value as JSON."""
    for line in json.dumps(value, indent=2).splitlines():
        show(line)


def columns(rows: Iterable[Sequence[str]]) -> list[str]:
    """Returns rows of cells as aligned lines."""
    rows = [[visible(cell) for cell in row] for row in rows]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
