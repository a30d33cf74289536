"""Partitions drawn on the picture that they divide."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure

from av1partition.data.blocks import BLOCK
from av1partition.data.tasks import PARTITIONS

Point = tuple[float, float]
Segment = tuple[Point, Point]
Array = npt.NDArray[np.int64]

_MIDDLE_ROW, _MIDDLE_COL = ((0.0, 0.5), (1.0, 0.5)), ((0.5, 0.0), (0.5, 1.0))
_LINES: dict[str, tuple[Segment, ...]] = {
    "NONE": (),
    "HORZ": (_MIDDLE_ROW,),
    "VERT": (_MIDDLE_COL,),
    "SPLIT": (_MIDDLE_ROW, _MIDDLE_COL),
    "HORZ_A": (_MIDDLE_ROW, ((0.5, 0.0), (0.5, 0.5))),
    "HORZ_B": (_MIDDLE_ROW, ((0.5, 0.5), (0.5, 1.0))),
    "VERT_A": (_MIDDLE_COL, ((0.0, 0.5), (0.5, 0.5))),
    "VERT_B": (_MIDDLE_COL, ((0.5, 0.5), (1.0, 0.5))),
    "HORZ_4": tuple(((0.0, at), (1.0, at)) for at in (0.25, 0.5, 0.75)),
    "VERT_4": tuple(((at, 0.0), (at, 1.0)) for at in (0.25, 0.5, 0.75)),
}
# Light on photographs and apart from each other for most kinds of colour blindness; what differs is
# filled besides.
_EDGE, _LINE, _DIFFERENT = "#ffffff", "#ffd23f", "#ff3d7f"
_DPI = 100


def partition_lines(kind: int) -> list[Segment]:
    """The lines inside a block that a partition draws, in units of the block.

    Args:
        kind: AV1 id 0..9.

    Returns:
        Segments from (x, y) to (x, y); x grows to the right and y downwards, both from 0 to 1.

    Example:
        >>> partition_lines(1)
        [((0.0, 0.5), (1.0, 0.5))]
    """
    return list(_LINES[PARTITIONS[kind]])


def draw_partitions(
    luma: npt.NDArray[np.uint8],
    nodes: Array,
    kinds: Array,
    different: npt.NDArray[np.bool_] | None = None,
    *,
    path: Path | None = None,
    scale: float = 2.0,
) -> Figure:
    """Draw the partition of each block on its frame: the picture alone, without axes or margins.

    Args:
        luma: The frame, [height, width].
        nodes: Row and col of each block's upper left corner, in pixels, [N, 2].
        kinds: AV1 ids, [N].
        different: Blocks to fill with a colour, a mask [N].
        path: Where to save it; the suffix says as what.
        scale: Pixels of the drawing for one of the frame.

    Raises:
        ValueError: Not as many kinds, or marks, as blocks.
    """
    if not len(nodes) == len(kinds) == len(kinds if different is None else different):
        marks = "no" if different is None else len(different)
        raise ValueError(
            f"{len(nodes)} blocks, {len(kinds)} kinds, {marks} marks; expected as many of each"
        )
    height, width = luma.shape
    figure = Figure(figsize=(width * scale / _DPI, height * scale / _DPI), dpi=_DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    # The quantizer's artefacts are not in the frame, and grey between black and white is what the
    # encoder saw.
    axes.imshow(
        luma, cmap="gray", vmin=0, vmax=255, extent=(0, width, height, 0), interpolation="bilinear"
    )
    corners = nodes[:, ::-1].astype(float)
    outlines = corners[:, None] + BLOCK * np.array([(0, 0), (1, 0), (1, 1), (0, 1)])
    axes.add_collection(
        PolyCollection(
            outlines, facecolor="none", edgecolor=_EDGE, linewidth=0.35 * scale, alpha=0.4
        )
    )
    if different is not None:
        axes.add_collection(
            PolyCollection(outlines[different], facecolor=_DIFFERENT, edgecolor="none", alpha=0.38)
        )
    lines = [
        [(x + BLOCK * at_x, y + BLOCK * at_y) for at_x, at_y in segment]
        for (x, y), kind in zip(corners, kinds, strict=True)
        for segment in partition_lines(int(kind))
    ]
    axes.add_collection(
        LineCollection(lines, colors=_LINE, linewidths=0.7 * scale, capstyle="butt")
    )
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    if path is not None:
        figure.savefig(path, dpi=_DPI)
    return figure


def webp(figure: Figure, quality: int = 60) -> bytes:
    """A drawing as WebP, which for photographs is a few times smaller than PNG."""
    file = io.BytesIO()
    figure.savefig(file, format="webp", dpi=_DPI, pil_kwargs={"quality": quality, "method": 6})
    return file.getvalue()
