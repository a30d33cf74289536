"""What a report page is made of.

Sections of facts, tables, pictures and notes, and plots as SVG that suits the page.
"""

from __future__ import annotations

import base64
import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import matplotlib as mpl
from cycler import cycler
from markupsafe import Markup
from matplotlib.figure import Figure

OUTCOMES = ("passed", "failed", "not checked")
SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
# Ink of the plots: a colour that nothing else has. In the page it becomes the colour of the text,
# light or dark.
_INK = "#0a0b0c"
# Any, because newer matplotlibs type the keys one by one.
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    # A name with dollar signs is a name, not a formula.
    "text.parse_math": False,
    **dict.fromkeys(
        (
            "text.color",
            "axes.edgecolor",
            "axes.labelcolor",
            "xtick.color",
            "ytick.color",
            "grid.color",
        ),
        _INK,
    ),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor"), "none"),
    "grid.linewidth": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.framealpha": 0.0,
    # Told apart with most kinds of colour blindness, and neither too dark for a dark page nor too
    # light for a light one.
    "axes.prop_cycle": cycler(color=["#2f82c9", "#d9801a", "#2a9d76", "#cf4a63"]),
}


@dataclass(frozen=True)
class Facts:
    """A few figures that stand out: name and value."""

    kind: ClassVar[str] = "facts"
    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Note:
    """A sentence or two; one with a heading starts a sub-section."""

    kind: ClassVar[str] = "note"
    text: str
    heading: str = ""


@dataclass(frozen=True)
class Table:
    """A table with its caption.

    Attributes:
        caption: What it shows.
        header: A name for each column.
        columns: A letter for each column: l text, r numbers (with equally many decimals), c code, o
            one of three outcomes.
        rows: The cells. The first of each row names the row.
        words: What the outcomes are called here: passed, failed, not checked.
    """

    kind: ClassVar[str] = "table"
    caption: str
    header: Sequence[str]
    columns: str
    rows: Sequence[Sequence[str]]
    words: Sequence[str] = OUTCOMES

    def __post_init__(self) -> None:
        """A row of another length, or an outcome that is none, would be shown wrongly."""
        for row in (self.header, *self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"{list(row)} has {len(row)} cells, expected {len(self.columns)}")
        for row in self.rows:
            for column, cell in zip(self.columns, row, strict=True):
                if column == "o" and cell not in OUTCOMES:
                    raise ValueError(f"outcome {cell!r}, expected one of {OUTCOMES}")


@dataclass(frozen=True)
class Picture:
    """A picture: a plot as SVG, or bytes of an image file.

    Attributes:
        alt: What it shows, for those who do not see it.
        caption: Under it.
        svg: The plot's markup.
        source: A data: URL, where it is not a plot.
        size: Width and height in pixels of the page.
    """

    alt: str
    caption: str
    svg: Markup | None = None
    source: str = ""
    size: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Pictures:
    """Pictures beside each other where there is room, below each other where there is none."""

    kind: ClassVar[str] = "pictures"
    pictures: Sequence[Picture]
    caption: str = ""


Part = Facts | Note | Table | Pictures


@dataclass(frozen=True)
class Section:
    """One thing that a folder holds.

    Attributes:
        title: Its heading.
        lead: What it is, in a sentence.
        parts: What is shown of it.
        scores: For the overview: accuracy, macro-F1, what it is, on which blocks; empty if it has
            no such scores.
    """

    title: str
    lead: str
    parts: Sequence[Part]
    scores: Sequence[str] = field(default=())


@contextmanager
def page_style() -> Iterator[None]:
    """Figures made and turned into SVG inside are in the page's style."""
    with mpl.rc_context(_STYLE):
        yield


def plot(figure: Figure, number: str, alt: str, caption: str) -> Picture:
    """A figure as SVG to stand inside a page.

    Args:
        figure: Made inside `page_style`.
        number: Put before all its ids, which are those of every other figure too.
        alt: What it shows, for those who do not see it.
        caption: Under it.
    """
    file = io.BytesIO()
    figure.savefig(
        file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
    )
    ET.register_namespace("", SVG)
    ET.register_namespace("xlink", XLINK)
    root = ET.fromstring(file.getvalue())
    for parent in root.iter():
        # A style sheet would hold for the entire page; its one rule is given to the root instead.
        for child in [
            child for child in parent if child.tag in {f"{{{SVG}}}style", f"{{{SVG}}}metadata"}
        ]:
            parent.remove(child)
    for element in root.iter():
        for key, value in element.attrib.items():
            element.set(key, _in_page(key, value, number))
    width, height = (
        round(float(root.attrib.pop(key).removesuffix("pt")) * 4 / 3) for key in ("width", "height")
    )
    root.attrib |= {
        "role": "img",
        "aria-label": alt,
        "stroke-linejoin": "round",
        "stroke-linecap": "butt",
    }
    # Wide enough that text stays readable: a phone scrolls it in its frame.
    root.set("style", f"max-width: {width}px; min-width: {round(0.78 * width)}px")
    return Picture(
        alt, caption, svg=Markup(ET.tostring(root, encoding="unicode")), size=(width, height)
    )


def image(
    content: bytes, media_type: str, size: tuple[int, int], alt: str, caption: str
) -> Picture:
    """An image file inside a page."""
    return Picture(
        alt,
        caption,
        source=f"data:{media_type};base64,{base64.b64encode(content).decode()}",
        size=size,
    )


def _in_page(key: str, value: str, number: str) -> str:
    if key == "id":
        return f"{number}-{value}"
    if key == "d":  # Hundredths of a point are enough for a curve.
        return re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", value)
    if key == f"{{{XLINK}}}href" and value.startswith("#"):
        return f"#{number}-{value[1:]}"
    return value.replace("url(#", f"url(#{number}-").replace(_INK, "currentColor")
