#!/usr/bin/env bash
# The partitions that a 16x16 node takes depend on the encoder and on its speed.
#
# Versions:  libaom 3.6.0 (good quality), SVT-AV1 1.4.1 and 2.3.0, rav1e 0.7.1, all as Debian has
#            them; libaom's decoder example `inspect` 3.6.0 reads every stream.
# Input:     four frames of examples/codec/data, two quantizers near base_q_idx 80 and 172, one key
#            frame a stream, 10 bits, one thread.
# Expected:  AV1 has ten partitions of a 16x16 node. A good engineer who has labels of an AV1
#            encoder expects all ten among them, and about the same shares from another encoder.
# Seen:      Only libaom at speeds 0 to 4 and SVT-AV1 2.3.0 at its debug preset -1 use all kinds.
#            SVT-AV1's presets 2, 4 and 10 never use the AB kinds, HORZ_A to VERT_B. rav1e uses
#            neither these nor the 1:4 kinds at any speed. The fast presets of both have only NONE
#            and SPLIT. libaom at 5 and 6 has no AB and no 1:4.
#            NONE is 18 to 59 % of the nodes.
# So:        A model that was trained on one encoder's labels says nothing about another's, and
#            some stages cannot be trained at all on some labels.
#
# Output, in percent of the nodes:
#
#   encoder and speed        nodes  NONE  SPLIT  HORZ+VERT    AB  1:4
#   libaom 3.6.0, 0           4332  17.7   31.7       17.0   8.9 24.7
#   libaom 3.6.0, 1           4540  19.7   38.7       14.1  10.5 16.9
#   libaom 3.6.0, 2           4584  20.2   39.4       13.5  10.6 16.4
#   libaom 3.6.0, 3           4440  28.8   46.9        7.7  10.1  6.4
#   libaom 3.6.0, 4           4484  38.8   49.9        5.0   3.8  2.5
#   libaom 3.6.0, 5           4472  38.9   54.8        6.3   0.0  0.0
#   libaom 3.6.0, 6           4864  44.8   46.6        8.6   0.0  0.0
#   SVT-AV1 1.4.1, 2          4444  20.7   41.1       23.5   0.0 14.7
#   SVT-AV1 1.4.1, 4          4460  31.9   45.4       13.2   0.0  9.5
#   SVT-AV1 1.4.1, 10         3944  55.4   44.6        0.0   0.0  0.0
#   SVT-AV1 2.3.0, -1         4344  18.5   30.3       18.7  10.0 22.5
#   SVT-AV1 2.3.0, 2          4324  22.5   34.9       25.8   0.0 16.8
#   SVT-AV1 2.3.0, 4          4400  31.7   36.9       19.8   0.0 11.6
#   SVT-AV1 2.3.0, 10         3928  58.9   41.1        0.0   0.0  0.0
#   rav1e 0.7.1, 0            4348  18.1   41.2       40.6   0.0  0.0
#   rav1e 0.7.1, 2            4616  39.4   60.6        0.0   0.0  0.0
#   rav1e 0.7.1, 6            3600  42.4   57.6        0.0   0.0  0.0
#
# $ findings/partition_kinds.sh        # about five minutes on two cores
#
# Needs Debian's apt, dpkg-dev, cmake, a C and C++ compiler, and python3 with venv. Everything is
# downloaded and built in a temporary folder; nothing is installed. When Debian's mirror has newer
# packages, MIRROR= takes a snapshot of it, from snapshot.debian.org.
#
# Exits 0 while the table holds, 1 when a share differs by more than half a percent.

set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

# An apt of its own, so that the machine's packages do not matter.
mkdir -p state/lists/partial cache/archives/partial parts
touch status
for suite in bookworm trixie; do
    signed=[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]
    echo "deb $signed ${MIRROR:-http://deb.debian.org/debian} $suite main"
    echo "deb-src $signed ${MIRROR:-http://deb.debian.org/debian} $suite main"
done > sources.list
cat > apt.conf <<END
Dir::State "$work/state"; Dir::State::status "$work/status"; Dir::Cache "$work/cache";
Dir::Etc::sourcelist "$work/sources.list"; Dir::Etc::sourceparts "$work/parts";
Dir::Etc::preferencesparts "$work/parts"; APT::Architecture "amd64"; APT::Sandbox::User "root";
Acquire::Check-Valid-Until "false";
END
export APT_CONFIG=$work/apt.conf

unpack() { # FOLDER PACKAGE=VERSION...
    local folder=$1
    shift
    mkdir "$folder"
    (cd "$folder" && apt-get -qq download "$@" && for deb in *.deb; do dpkg-deb -x "$deb" .; done)
}
{
    apt-get -qq update
    unpack aom aom-tools=3.6.0-1+deb12u2 libaom3=3.6.0-1+deb12u2 \
        libyuv0=0.0~git20230123.b2528b0-1 libjpeg62-turbo=1:2.1.5-2
    unpack svt1 svt-av1=1.4.1+dfsg-1 libsvtav1enc1=1.4.1+dfsg-1
    unpack svt2 svt-av1=2.3.0+dfsg-1 libsvtav1enc2=2.3.0+dfsg-1
    unpack rav1e rav1e=0.7.1-9+b2
    apt-get -qq source --download-only aom=3.6.0-1+deb12u2
    dpkg-source -x aom_3.6.0-1+deb12u2.dsc aom-source
    cmake -S aom-source -B inspect -DCMAKE_BUILD_TYPE=Release -DCONFIG_INSPECTION=1 \
        -DCONFIG_AV1_ENCODER=0 -DAOM_TARGET_CPU=generic -DCONFIG_LIBYUV=0 -DCONFIG_WEBM_IO=0 \
        -DENABLE_DOCS=0 -DENABLE_TESTS=0
    cmake --build inspect --target inspect --parallel 2
    python3 -m venv python
    python/bin/pip install --quiet --only-binary=:all: pillow==11.3.0
} > log 2>&1 || {
    tail -20 log
    exit 2
}

cat > kinds.py <<'END'
"""Code the frames, derive the kind of each 16x16 node, and compare the shares with the table."""

import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

FRAMES, SCRIPT = Path(sys.argv[1]), Path(sys.argv[2])
PICTURES = ("skimage-astronaut-0", "scipy-ascent-0", "gcompris-colosseum-0", "gcompris-hawamahal-0")
AOM = (
    "--ivf --limit=1 --good --passes=2 --threads=1 --row-mt=0 --tile-columns=0 --tile-rows=0 "
    "--input-bit-depth=10 --bit-depth=10 --end-usage=q --kf-max-dist=0 --lag-in-frames=0 "
    "--aq-mode=0 --deltaq-mode=0 --denoise-noise-level=0 --sb-size=64 --enable-rect-partitions=1 "
    "--enable-ab-partitions=1 --enable-1to4-partitions=1 --min-partition-size=4 "
    "--max-partition-size=64 -q"
)
SVT = (
    "-n 1 --rc 0 --aq-mode 0 --use-fixed-qindex-offsets 1 --lp 1 --input-depth 10 --keyint -1 "
    "--progress 0"
)
RAV1E = "--limit 1 --threads 1 --keyint 1 --min-keyint 1 -y -q"
# Folder, command, its two quantizers, speeds.
ENCODERS = {
    "libaom 3.6.0": ("aom", f"aomenc {AOM} --cpu-used=SPEED --cq-level=Q -o OUT IN", (20, 43),
                     (0, 1, 2, 3, 4, 5, 6)),
    "SVT-AV1 1.4.1": ("svt1", f"SvtAv1EncApp {SVT} --preset SPEED -q Q -b OUT -i IN", (20, 43),
                      (2, 4, 10)),
    "SVT-AV1 2.3.0": ("svt2", f"SvtAv1EncApp {SVT} --preset SPEED -q Q -b OUT -i IN", (20, 43),
                      (-1, 2, 4, 10)),
    "rav1e 0.7.1": ("rav1e", f"rav1e {RAV1E} -s SPEED --quantizer Q -o OUT IN", (100, 186),
                    (0, 2, 6)),
}
# Row, column, height and width of a kind's blocks, in quarters of the node's side.
BLOCKS = {
    "NONE": [(0, 0, 4, 4)],
    "HORZ": [(0, 0, 2, 4), (2, 0, 2, 4)],
    "VERT": [(0, 0, 4, 2), (0, 2, 4, 2)],
    "HORZ_A": [(0, 0, 2, 2), (0, 2, 2, 2), (2, 0, 2, 4)],
    "HORZ_B": [(0, 0, 2, 4), (2, 0, 2, 2), (2, 2, 2, 2)],
    "VERT_A": [(0, 0, 2, 2), (2, 0, 2, 2), (0, 2, 4, 2)],
    "VERT_B": [(0, 0, 4, 2), (0, 2, 2, 2), (2, 2, 2, 2)],
    "HORZ_4": [(k, 0, 1, 4) for k in range(4)],
    "VERT_4": [(0, k, 4, 1) for k in range(4)],
}
GROUPS = (("NONE",), ("SPLIT",), ("HORZ", "VERT"), ("HORZ_A", "HORZ_B", "VERT_A", "VERT_B"),
          ("HORZ_4", "VERT_4"))


def drawn(side, blocks):
    """Width and height of the block over each 4x4 cell of a node."""
    cells, quarter = {}, side // 4
    for row, column, height, width in blocks:
        for r in range(row * quarter // 4, (row + height) * quarter // 4):
            for c in range(column * quarter // 4, (column + width) * quarter // 4):
                cells[r, c] = (width * quarter, height * quarter)
    return cells


MAPS = {
    side: {kind: drawn(side, blocks) for kind, blocks in BLOCKS.items()} for side in (16, 32, 64)
}


def nodes(cells, row, column, side):
    """Kinds of the 16x16 nodes in a node; what is no undivided kind is SPLIT."""
    size = side // 4
    here = {(r, c): cells[row + r][column + c] for r in range(size) for c in range(size)}
    kind = next((kind for kind, map_ in MAPS[side].items() if map_ == here), "SPLIT")
    if side == 16:
        yield kind
    elif kind == "SPLIT":
        for r in (0, size // 2):
            for c in (0, size // 2):
                yield from nodes(cells, row + r, column + c, side // 2)


def write_y4m(name):
    """A frame as the encoders get it: 10 bits, neutral chroma."""
    with Image.open(FRAMES / f"{name}.png") as image:
        width, height, luma = *image.size, image.tobytes()
    with open(f"{name}.y4m", "wb") as file:
        header = f"YUV4MPEG2 W{width} H{height} F25:1 Ip A1:1 C420p10 XYSCSS=420P10\nFRAME\n"
        file.write(header.encode())
        file.write(b"".join((4 * value).to_bytes(2, "little") for value in luma))
        file.write((512).to_bytes(2, "little") * (width * height // 2))


def kinds(folder, command, speed, quantizer, name):
    """Code one frame; the number of nodes of each kind."""
    out = f"{folder}_{speed}_{quantizer}_{name}.ivf"
    values = {"SPEED": str(speed), "Q": str(quantizer), "OUT": out, "IN": f"{name}.y4m"}
    words = []
    for word in command.split():
        before, equals, value = word.rpartition("=")
        words.append(before + equals + values.get(value, value))
    words[0] = f"{folder}/usr/bin/{words[0]}"
    library = {"LD_LIBRARY_PATH": f"{folder}/usr/lib/x86_64-linux-gnu"}
    subprocess.run(words, check=True, capture_output=True, env={**os.environ, **library})
    text = subprocess.run(
        ["inspect/examples/inspect", out, "-bs"], check=True, capture_output=True
    ).stdout
    (frame,) = [frame for frame in json.loads(text) if frame]
    assert frame["frameType"] == 0, "not a key frame"
    # A block of 128 is as one of 64 here: no node of 16 is in it.
    size = {
        number: tuple(min(int(side), 64) for side in block.split("_")[1].split("X"))
        for block, number in frame["blockSizeMap"].items()
    }
    cells = [[size[number] for number in row] for row in frame["blockSize"]]
    return Counter(
        kind
        for row in range(0, len(cells), 16)
        for column in range(0, len(cells[0]), 16)
        for kind in nodes(cells, row, column, 64)
    )


for picture in PICTURES:
    write_y4m(picture)
expected = [
    line[2:].split() for line in SCRIPT.read_text().splitlines() if line.startswith("#   ")
]
found = []
for name, (folder, command, quantizers, speeds) in ENCODERS.items():
    for speed in speeds:
        with ThreadPoolExecutor(2) as pool:
            counts = list(pool.map(
                lambda job: kinds(folder, command, speed, *job),
                [(quantizer, picture) for picture in PICTURES for quantizer in quantizers],
            ))
        total = sum(counts, Counter())
        count = sum(total.values())
        shares = [100 * sum(total[kind] for kind in group) / count for group in GROUPS]
        row = f"  {f'{name}, {speed}':22} {count:7} {shares[0]:5.1f} {shares[1]:6.1f} " \
              f"{shares[2]:10.1f} {shares[3]:5.1f} {shares[4]:4.1f}"
        print(row, flush=True)
        found.append(row.split())
for row in found:
    before = next((each for each in expected if each[:3] == row[:3]), None)
    if before is None or any(
        abs(float(a) - float(b)) > 0.5 for a, b in zip(before[4:], row[4:], strict=True)
    ):
        raise SystemExit(f"changed: {' '.join(row)}, was {' '.join(before or ['not there'])}")
print("as before")
END
python/bin/python kinds.py "$here/../examples/codec/data/frames" "$here/$(basename "$0")"
