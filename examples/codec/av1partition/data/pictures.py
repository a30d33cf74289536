"""Pictures as an encoder is given them: upright, cropped to whole superblocks, luma and chroma."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from av1partition.data.blocks import DatasetError
from av1partition.data.partition_trees import SUPERBLOCK

Plane = npt.NDArray[np.uint8]
LUMA = (
    "BT.709, limited range, on gamma-encoded R'G'B' in 0..255: "
    "Y = round(16 + 219/255 * (0.2126 R + 0.7152 G + 0.0722 B))"
)
# Bits of a sample in the file. Pillow's mode does not tell: of a colour's 16 bits Pillow keeps the
# upper 8. Other formats have 8 at most, or as AVIF 10 or 12, which Pillow scales.
_BITS: dict[str, Callable[[Any, bytes], int]] = {
    "PNG": lambda image, content: content[24],
    "TIFF": lambda image, content: max(image.tag_v2.get(258, (1,))),
    # Its values go to a maximum, which Pillow gives its decoder where it is not 255.
    "PPM": lambda image, content: max(
        (each for each in image.tile[0][3] if isinstance(each, int)), default=255
    ).bit_length(),
    "SGI": lambda image, content: 8 * content[3],
    # In the codestream's first segment.
    "JPEG2000": lambda image, content: (content[content.index(b"\xff\x4f\xff\x51") + 42] & 127) + 1,
}


@dataclass(frozen=True)
class Crop:
    """What of a picture becomes a frame.

    Attributes:
        source_wh: Size of the picture, upright.
        xywh: The part of it that is taken: its middle.
        size_wh: Size of the frame, in multiples of 64.
    """

    source_wh: tuple[int, int]
    xywh: tuple[int, int, int, int]
    size_wh: tuple[int, int]


def find_pictures(sources: Sequence[Path]) -> dict[str, Path]:
    """Pictures by name (the file's, without its ending), in order.

    Args:
        sources: Files, and folders of which all files that end as pictures do are taken.

    Raises:
        DatasetError: There are none, one is not there, or two have the same name.
    """
    Image.init()
    endings = {ending for ending, kind in Image.EXTENSION.items() if kind in Image.OPEN}
    paths: list[Path] = []
    for source in sources:
        if not source.exists():
            raise DatasetError(f"{source}: is not there; pass pictures, or folders of pictures")
        paths += (
            sorted(path for path in source.iterdir() if path.suffix.lower() in endings)
            if source.is_dir()
            else [source]
        )
    pictures: dict[str, Path] = {}
    for path in paths:
        # Not every system tells names apart by case.
        twin = next(
            (other for name, other in pictures.items() if name.casefold() == path.stem.casefold()),
            None,
        )
        if twin is not None:
            raise DatasetError(
                f"{path} and {twin}: two pictures with the name {path.stem!r}; rename one, frames "
                "are named by it"
            )
        pictures[path.stem] = path
    if not pictures:
        raise DatasetError(
            f"no picture in {[str(source) for source in sources]}; pass PNG files or the like"
        )
    return dict(sorted(pictures.items()))


def crop_of(path: Path, downscale: int) -> Crop:
    """Read a picture and say what can be used of it.

    Raises:
        DatasetError: It cannot be read, or is too small.
    """
    width, height = _open(path).size
    unit = SUPERBLOCK * downscale
    w, h = width // unit * unit, height // unit * unit
    if not (w and h):
        mend = "leave it out" if downscale == 1 else "leave it out, or pass a smaller --downscale"
        raise DatasetError(
            f"{path}: is {width}x{height}, expected {unit}x{unit} or more (--downscale "
            f"{downscale}); {mend}"
        )
    return Crop(
        (width, height),
        ((width - w) // 2, (height - h) // 2, w, h),
        (w // downscale, h // downscale),
    )


def read_planes(path: Path, crop: Crop) -> tuple[Plane, Plane, Plane]:
    """Luma of a frame, and both its chroma planes averaged 2x2, 8 bits each.

    The chroma of a grey picture is neutral.
    """
    x, y, w, h = crop.xywh
    image = _open(path)
    if (w, h) == crop.size_wh:
        image = image.crop((x, y, x + w, y + h))
    else:
        image = image.resize(crop.size_wh, Image.Resampling.LANCZOS, box=(x, y, x + w, y + h))
    colours = np.asarray(image, dtype=np.float64)
    if colours.ndim == 2:
        neutral = np.full((colours.shape[0] // 2, colours.shape[1] // 2), 128, dtype=np.uint8)
        return _to_bytes(16 + 219 / 255 * colours), neutral, neutral
    red, green, blue = colours[..., 0], colours[..., 1], colours[..., 2]
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    chroma = (128 + 224 / 255 * (blue - luma) / 1.8556, 128 + 224 / 255 * (red - luma) / 1.5748)
    halved = [
        plane.reshape(plane.shape[0] // 2, 2, plane.shape[1] // 2, 2).mean(axis=(1, 3))
        for plane in chroma
    ]
    return _to_bytes(16 + 219 / 255 * luma), _to_bytes(halved[0]), _to_bytes(halved[1])


def y4m_10bit(planes: Sequence[Plane]) -> bytes:
    """A Y4M file of one 4:2:0 frame; each 10-bit value is four times the 8-bit one."""
    height, width = planes[0].shape
    header = f"YUV4MPEG2 W{width} H{height} F25:1 Ip A1:1 C420p10 XYSCSS=420P10\nFRAME\n"
    return header.encode() + b"".join((plane.astype("<u2") << 2).tobytes() for plane in planes)


def _open(path: Path) -> Image.Image:
    """A picture, upright, as grey values or RGB."""
    try:
        with Image.open(path) as image:
            bits = _BITS.get(image.format or "")
            deep = bits is not None and bits(image, path.read_bytes()) > 8
            if deep or image.mode.startswith(("I", "F")):
                raise DatasetError(
                    f"{path}: has values of more than 8 bits (mode {image.mode}); convert it to 8 "
                    "bits first: divide values of 0..1023 by 4, values of 0..65535 by 256"
                )
            upright = ImageOps.exif_transpose(image)
            return upright.copy() if upright.mode == "L" else upright.convert("RGB")
    except DatasetError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DatasetError(
            f"{path}: cannot read the picture ({error}); repair it or leave it out"
        ) from error


def _to_bytes(values: npt.NDArray[np.float64]) -> Plane:
    # Half goes up, as in the formula; numpy's own rounding goes to the even neighbour.
    return np.clip(np.floor(values + 0.5), 0, 255).astype(np.uint8)
