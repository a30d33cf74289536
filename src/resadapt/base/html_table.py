"""Tables in HTML, which notebooks show in place of text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["html_table"]

# Colours are the page's, so that the table is readable in light and dark themes.
_TABLE = "border-collapse: collapse; color: inherit"
_CELL = "padding: 0.15em 0.7em; border-bottom: 1px solid rgba(128, 128, 128, 0.3)"


def html_table(
    heading: Sequence[str],
    rows: Iterable[Sequence[str | tuple[str, str]]],
    *,
    title: str = "",
    note: str = "",
) -> str:
    """Returns a table in HTML. All texts are escaped, and numbers are right-aligned.

    Args:
        heading: The heading of each column.
        rows: The cells of each row: a text, or a text and its CSS.
        title: A text above the table.
        note: A text below the table.
    """
    parts = [f"<div>{escape(title)}</div>"] if title else []
    # A table wider than the page is scrolled, and not cut off.
    parts.append(f'<div style="overflow-x: auto"><table style="{_TABLE}">')
    parts.append(f"<thead><tr>{''.join(_cell('th', text) for text in heading)}</tr></thead>")
    parts.append("<tbody>")
    for row in rows:
        cells = (cell if isinstance(cell, tuple) else (cell, "") for cell in row)
        parts.append(f"<tr>{''.join(_cell('td', *cell) for cell in cells)}</tr>")
    parts.append("</tbody></table></div>")
    parts += [f"<div>{escape(note)}</div>"] if note else []
    # A lone surrogate, which a file's JSON may have, cannot be sent to a notebook.
    return "\n".join(parts).encode(errors="backslashreplace").decode()


def _cell(tag: str, text: str, style: str = "") -> str:
    align = "right" if re.fullmatch(r"[\d.,]+(%| \w+)?", text) else "left"
    style = f"text-align: {align}; {_CELL}{style and '; '}{style}"
    return f'<{tag} style="{escape(style)}">{escape(text)}</{tag}>'
