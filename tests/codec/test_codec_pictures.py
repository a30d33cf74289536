"""Pictures as an encoder is given them: found, cropped, in luma and chroma."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from av1partition.data.pictures import Crop, crop_of, find_pictures, read_planes, y4m_10bit
from PIL import Image


def save(path: Path, width: int, height: int, colour: bool = False) -> Path:
    shape = (height, width, 3) if colour else (height, width)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)).save(path)
    return path


@pytest.mark.parametrize(("width", "height", "downscale", "xywh", "size"), [
    (64, 64, 1, (0, 0, 64, 64), (64, 64)),
    (131, 200, 1, (1, 4, 128, 192), (128, 192)),
    (300, 131, 2, (22, 1, 256, 128), (128, 64)),
])  # fmt: skip
def test_the_middle_is_taken(
    tmp_path: Path,
    width: int,
    height: int,
    downscale: int,
    xywh: tuple[int, ...],
    size: tuple[int, int],
) -> None:
    crop = crop_of(save(tmp_path / "a.png", width, height), downscale)
    assert crop == Crop((width, height), (xywh[0], xywh[1], xywh[2], xywh[3]), size)


def test_colour_planes_equal_a_slow_conversion(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", 70, 66, colour=True)
    luma, cb, cr = read_planes(path, crop_of(path, 1))
    assert luma.shape == (64, 64)
    assert cb.shape == cr.shape == (32, 32)
    with Image.open(path) as image:
        for y, x in ((0, 0), (10, 7), (31, 31)):
            four = [image.getpixel((3 + 2 * x + k % 2, 1 + 2 * y + k // 2)) for k in range(4)]
            whites = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in four]
            corner = luma[2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
            assert corner.ravel().tolist() == [
                int(16 + 219 / 255 * white + 0.5) for white in whites
            ]
            blue = (
                sum(
                    128 + 224 / 255 * (b - white) / 1.8556
                    for (_, _, b), white in zip(four, whites, strict=True)
                )
                / 4
            )
            red = (
                sum(
                    128 + 224 / 255 * (r - white) / 1.5748
                    for (r, _, _), white in zip(four, whites, strict=True)
                )
                / 4
            )
            assert (cb[y, x], cr[y, x]) == (int(blue + 0.5), int(red + 0.5))


def test_grey_pictures_have_neutral_chroma_and_limited_range(tmp_path: Path) -> None:
    Image.fromarray(np.repeat(np.arange(64, dtype=np.uint8)[None] * 4 + 3, 64, axis=0)).save(
        tmp_path / "a.png"
    )
    luma, cb, cr = read_planes(tmp_path / "a.png", crop_of(tmp_path / "a.png", 1))
    assert luma[5, :2].tolist() == [19, 22]
    assert luma[5, 63] == 235
    assert (cb == 128).all()
    assert (cr == 128).all()


def test_downscaling_is_pillows_lanczos(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", 140, 128)
    luma, *_ = read_planes(path, crop_of(path, 2))
    with Image.open(path) as image:
        small = np.asarray(
            image.crop((6, 0, 134, 128)).resize((64, 64), Image.Resampling.LANCZOS),
            dtype=np.float64,
        )
    # A box without the crop may look at pixels beside it; inside, both are the same.
    assert (luma[:, 4:-4] == np.floor(16 + 219 / 255 * small + 0.5)[:, 4:-4]).all()


def test_pictures_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.repeat(np.arange(128, dtype=np.uint8)[None], 64, axis=0)).save(
        tmp_path / "a.png", exif=exif
    )
    crop = crop_of(tmp_path / "a.png", 1)
    assert crop.size_wh == (64, 128)
    luma, *_ = read_planes(tmp_path / "a.png", crop)
    assert luma[0, 0] < luma[127, 0]
    assert luma[0, 0] == luma[0, 63]


def test_y4m_holds_four_times_the_values() -> None:
    planes = [
        np.full(shape, value, dtype=np.uint8)
        for shape, value in (((2, 4), 255), ((1, 2), 1), ((1, 2), 128))
    ]
    header, frame = y4m_10bit(planes).split(b"FRAME\n")
    assert header == b"YUV4MPEG2 W4 H2 F25:1 Ip A1:1 C420p10 XYSCSS=420P10\n"
    assert np.frombuffer(frame, dtype="<u2").tolist() == [1020] * 8 + [4, 4, 512, 512]


def test_names_come_without_endings_and_other_files_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for path in ("in/b.png", "in/a.png", "lonely.JPG"):
        save(tmp_path / path, 64, 64)
    (tmp_path / "in" / "README.txt").write_text("pictures")
    found = find_pictures([tmp_path / "lonely.JPG", tmp_path / "in"])
    assert list(found.items()) == [
        ("a", tmp_path / "in" / "a.png"),
        ("b", tmp_path / "in" / "b.png"),
        ("lonely", tmp_path / "lonely.JPG"),
    ]
