"""libaom's programs: ``aomenc`` codes a frame, ``inspect`` says how it was divided into blocks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from av1partition.data.blocks import DatasetError

HIGHEST_CQ_LEVEL = 63
# aomenc's --cpu-used in good quality. The example's data are of the default.
CPU_USED, HIGHEST_CPU_USED = 1, 6
ENCODER = "AOMedia Project AV1 Encoder"
HOW_TO_GET = {
    "aomenc": "on Debian or Ubuntu: apt-get install aom-tools",
    # Without libyuv and webm, which it does not need and for which Debian's source asks the system;
    # without assembler.
    "inspect": "it is an example program of libaom's source; on Debian or Ubuntu, with deb-src "
    "among the package sources:\n"
    "  apt-get install cmake g++ dpkg-dev && apt-get source aom\n"
    "  cmake -S aom-*/ -B inspect-build -DCMAKE_BUILD_TYPE=Release -DCONFIG_INSPECTION=1 "
    "-DCONFIG_AV1_ENCODER=0 -DAOM_TARGET_CPU=generic -DCONFIG_LIBYUV=0 -DCONFIG_WEBM_IO=0 "
    "-DENABLE_DOCS=0 -DENABLE_TESTS=0\n  cmake --build inspect-build --target inspect\n"
    "  and pass --inspect inspect-build/examples/inspect",
}


@dataclass(frozen=True)
class Libaom:
    """Both programs, found and tried.

    Attributes:
        aomenc: The encoder.
        inspect: The decoder that prints what it decoded.
        version: The encoder's, as it says.
        cpu_used: The encoder's speed: the faster, the fewer kinds of partition it tries.
    """

    aomenc: str
    inspect: str
    version: str
    cpu_used: int = CPU_USED

    @property
    def flags(self) -> tuple[str, ...]:
        """Of the encoder, all but the cq level and the files.

        One key frame in a stream: then the constant-quality mode uses the cq level itself as the
        frame's quantizer.
        """
        return (
            *("--ivf", "--limit=1", "--good", "--passes=2", f"--cpu-used={self.cpu_used}"),
            *("--threads=1", "--row-mt=0", "--tile-columns=0", "--tile-rows=0"),
            *("--input-bit-depth=10", "--bit-depth=10"),
            *("--end-usage=q", "--kf-max-dist=0", "--lag-in-frames=0"),
            *("--aq-mode=0", "--deltaq-mode=0", "--denoise-noise-level=0", "--sb-size=64"),
            *("--enable-rect-partitions=1", "--enable-ab-partitions=1"),
            *("--enable-1to4-partitions=1", "--min-partition-size=4", "--max-partition-size=64"),
        )

    def encode(self, y4m: bytes, cq_level: int, stream: Path) -> None:
        """Code one frame; the stream is there whole or not at all.

        Raises:
            DatasetError: The encoder fails.
        """
        with tempfile.TemporaryDirectory(prefix="encoding-", dir=stream.parent) as folder:
            source, partial = Path(folder) / "frame.y4m", Path(folder) / "frame.ivf"
            source.write_bytes(y4m)
            _run(
                [
                    self.aomenc,
                    *self.flags,
                    f"--cq-level={cq_level}",
                    "-q",
                    "-o",
                    str(partial),
                    str(source),
                ]
            )
            os.replace(partial, stream)

    def block_sizes(self, stream: Path) -> tuple[npt.NDArray[np.uint8], int]:
        """Read back how a frame was divided.

        Returns:
            For each 4x4 cell the height and width of its block in pixels, [rows, columns, 2]; and
            ``base_q_idx``.

        Raises:
            DatasetError: The stream cannot be read, or is not one key frame with one quantizer.
        """
        return read_inspection(_run([self.inspect, str(stream), "-bs"]), stream)


def find_libaom(aomenc: str, inspect: str, cpu_used: int = CPU_USED) -> Libaom:
    """Look for both programs, and let them code and read a small grey frame.

    Raises:
        DatasetError: One is missing, cannot be executed, is another program, or lacks what is
            needed.
    """
    programs = {"aomenc": _find("aomenc", aomenc), "inspect": _find("inspect", inspect)}
    shown = _run([programs["aomenc"], "--help"], refuse_failure=False).decode(errors="replace")
    version = next((line for line in shown.splitlines() if ENCODER in line), None)
    if version is None:
        raise DatasetError(f"--aomenc {aomenc}: is not libaom's aomenc; {HOW_TO_GET['aomenc']}")
    libaom = Libaom(
        programs["aomenc"], programs["inspect"], version[version.index(ENCODER) :].strip(), cpu_used
    )
    frame = b"YUV4MPEG2 W64 H64 F25:1 Ip A1:1 C420p10 XYSCSS=420P10\nFRAME\n" + bytes([0, 2]) * (
        64 * 64 * 3 // 2
    )
    with tempfile.TemporaryDirectory() as folder:
        stream = Path(folder) / "probe.ivf"
        libaom.encode(frame, 32, stream)
        try:
            libaom.block_sizes(stream)
        except DatasetError as error:
            raise DatasetError(
                f"--inspect {inspect}: cannot read a stream of this aomenc ({error}); "
                f"{HOW_TO_GET['inspect']}"
            ) from error
    return libaom


def read_inspection(text: bytes, stream: Path) -> tuple[npt.NDArray[np.uint8], int]:
    """Read what ``inspect -bs`` printed; see :meth:`Libaom.block_sizes`."""
    try:
        frames: list[dict[str, Any]] = [frame for frame in json.loads(text) if frame]
        plain = (
            len(frames) == 1 and frames[0]["frameType"] == 0 and frames[0]["deltaQPresentFlag"] == 0
        )
        if not plain:
            raise DatasetError(
                f"{stream}: {len(frames)} frames, or not a plain key frame; expected one, with one "
                "quantizer"
            )
        (frame,) = frames
        # Names such as BLOCK_16X8, width before height.
        sides = {
            number: name.split("_")[1].split("X") for name, number in frame["blockSizeMap"].items()
        }
        table = np.zeros((max(sides) + 1, 2), dtype=np.uint8)
        for number, (width, height) in sides.items():
            table[number] = int(height), int(width)
        return table[np.array(frame["blockSize"], dtype=np.int64)], int(frame["baseQIndex"])
    except DatasetError:
        raise
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise DatasetError(
            f"{stream}: 'inspect -bs' printed no block sizes ({type(error).__name__}: {error})"
        ) from error


def _find(what: str, given: str) -> str:
    found = shutil.which(given)
    if found is None:
        why = "may not be executed (chmod +x)" if Path(given).is_file() else "is not there"
        raise DatasetError(f"--{what} {given}: {why}; {HOW_TO_GET[what]}")
    return found


def _run(command: list[str], refuse_failure: bool = True) -> bytes:
    """Run a program and return what it printed; what it complained about goes into the error."""
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except OSError as error:
        raise DatasetError(
            f"{command[0]}: cannot be run ({error}); is it built for this machine?"
        ) from error
    if refuse_failure and done.returncode:
        complaint = done.stderr.decode(errors="replace").strip()[-500:] or "it says nothing"
        raise DatasetError(
            f"{' '.join(command)}: failed with status {done.returncode} ({complaint})"
        )
    return done.stdout
