"""Pictures as an encoder is given them: found, cropped, in luma and chroma."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from av1partition.data.blocks import DatasetError
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


# What Pillow reads as 8 bits, though the file has more.

SAMPLES = np.random.default_rng(0).integers(0, 1024, (64, 64, 4), dtype=np.uint16)


def png(values: npt.NDArray[np.uint16], colour_type: int) -> bytes:
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", 64, 64, 16, colour_type, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )


def tiff(values: npt.NDArray[np.uint16], planar: bool = False) -> bytes:
    """Uncompressed; one strip, or one for each colour."""
    channels = values.shape[2]
    strips = [values[..., c] for c in range(channels)] if planar else [values]
    size, extra = strips[0].size * 2, 8 + 2 + 11 * 12 + 4
    bits, offsets, counts = extra, extra + 8, extra + 8 + 4 * channels
    start = extra + 8 + 8 * channels
    count = len(strips)
    one = count == 1
    entries = [
        (256, 3, 1, 64), (257, 3, 1, 64), (258, 3, channels, bits), (259, 3, 1, 1), (262, 3, 1, 2),
        (273, 4, count, start if one else offsets), (277, 3, 1, channels), (278, 3, 1, 64),
        (279, 4, count, size if one else counts), (284, 3, 1, 2 if planar else 1),
        (339, 3, 1, 1),
    ]  # fmt: skip
    directory = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    tail = struct.pack("<4H", 16, 16, 16, 16)
    tail += struct.pack(f"<{channels}I", *(start + k * size for k in range(channels)))
    tail += struct.pack(f"<{channels}I", *[size] * channels)
    data = b"".join(strip.astype("<u2").tobytes() for strip in strips)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4) + tail + data


def jpeg2000_of_16_bits(folder: Path) -> bytes:
    save(folder / "8.jp2", 64, 64, colour=True)
    content = bytearray((folder / "8.jp2").read_bytes())
    for component in range(3):
        content[content.index(b"\xff\x4f\xff\x51") + 42 + 3 * component] = 15
    (folder / "8.jp2").unlink()
    return bytes(content)


RGB, RGBA, LA = SAMPLES[..., :3], SAMPLES, SAMPLES[..., :2]
SGI = struct.pack(">HBBHHHHII", 474, 0, 2, 3, 64, 64, 3, 0, 65535).ljust(512, b"\0")
DEEP = {
    "a.png": png(RGB, 2),
    "with_alpha.png": png(RGBA, 6),
    "grey_with_alpha.png": png(LA, 4),
    "a.tif": tiff(RGB),
    "planes.tif": tiff(RGB, planar=True),
    "a.ppm": b"P6 64 64 65535\n" + RGB.astype(">u2").tobytes(),
    "ten.ppm": b"P6 64 64 1023\n" + RGB.astype(">u2").tobytes(),
    "text.ppm": f"P3 64 64 1023\n{' '.join(map(str, RGB.flatten()))}\n".encode(),
    "a.rgb": SGI + RGB.transpose(2, 0, 1)[:, ::-1].astype(">u2").tobytes(),
    "a.jp2": b"",
}


@pytest.mark.parametrize("name", DEEP)
def test_more_than_8_bits_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(DEEP[name] or jpeg2000_of_16_bits(tmp_path))
    with Image.open(tmp_path / name) as image:
        assert image.mode in ("RGB", "RGBA"), "Pillow does not tell"
    with pytest.raises(
        DatasetError,
        match=rf"{name}: has values of more than 8 bits \(mode RGBA?\); convert it to 8 bits first: "
        r"divide values of 0\.\.1023 by 4, values of 0\.\.65535 by 256$",
    ):
        crop_of(tmp_path / name, 1)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jpg", "a.ppm", "a.sgi", "a.jp2", "a.bmp",
                                  "a.gif", "a.webp"])  # fmt: skip
@pytest.mark.parametrize("colour", [False, True])
def test_8_bits_are_read(tmp_path: Path, name: str, colour: bool) -> None:
    path = save(tmp_path / name, 64, 64, colour)
    assert read_planes(path, crop_of(path, 1))[0].std() > 10


def test_pixels_of_16_bits_and_small_maxima_are_read(tmp_path: Path) -> None:
    """A BMP with 5, 6 and 5 bits of the colours, and values up to 100."""
    pixels = np.random.default_rng(0).integers(0, 65536, 64 * 64, dtype="<u2").tobytes()
    head = struct.pack("<IiiHHIIiiII", 40, 64, 64, 1, 16, 3, len(pixels), 0, 0, 0, 0)
    head += struct.pack("<III", 0xF800, 0x7E0, 0x1F)
    start = 14 + len(head)
    (tmp_path / "a.bmp").write_bytes(
        b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + head + pixels
    )
    values = np.random.default_rng(0).integers(0, 101, (64, 64, 3), dtype=np.uint8)
    (tmp_path / "a.ppm").write_bytes(b"P6 64 64 100\n" + values.tobytes())
    for path in tmp_path.iterdir():
        assert read_planes(path, crop_of(path, 1))[0].std() > 10
