"""From pictures to data with libaom's programs, where they are given.

RESADAPT_AOMENC=aomenc RESADAPT_INSPECT=inspect-build/examples/inspect python -m pytest
tests/codec/test_codec_libaom.py
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from av1partition.data.blocks import DATA_DIR, DatasetError
from av1partition.data.libaom import read_inspection
from av1partition.data.partition_trees import labels_of_nodes
from av1partition.data.study_layout import load_dataset
from encode_pictures import main
from PIL import Image

NAMES = ("RESADAPT_AOMENC", "RESADAPT_INSPECT")
AOMENC, INSPECT = (os.environ.get(name, "") for name in NAMES)
pytestmark = pytest.mark.skipif(
    not (AOMENC and INSPECT), reason=f"{' and '.join(NAMES)} do not say where libaom's programs are"
)
RECORDED = Path(__file__).parent / "inspect_camera_cq32.json.gz"
Node = tuple[int, int, int]


@pytest.fixture
def grey(tmp_path: Path) -> Path:
    """A piece of a grey frame of the example and the whole of another, in full range.

    They become the same luma again.
    """
    (tmp_path / "in").mkdir()
    for name, box in (
        ("skimage-camera-0", (128, 256, 256, 320)),
        ("skimage-grass-0", (0, 0, 256, 256)),
    ):
        with Image.open(DATA_DIR / "frames" / f"{name}.png") as image:
            luma = np.asarray(image.crop(box), dtype=np.float64)
        Image.fromarray(np.round((luma - 16) * 255 / 219).astype(np.uint8)).save(
            tmp_path / "in" / f"{name}.png"
        )
    return tmp_path / "in"


def run(
    folder: Path, *options: str, inspect: str = INSPECT, cq_levels: Sequence[str] = ("55", "32")
) -> Path:
    output = folder.parent / "out"
    main([str(folder), "--output-dir", str(output), "--aomenc", AOMENC, "--inspect", inspect, "--val", "*camera*", "--test", "0",
          "--cq-level", *cq_levels, *options])  # fmt: skip
    return output


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def nodes_in(folder: Path, frame: str, cq_level: int) -> set[Node]:
    with gzip.open(folder / "nodes.csv.gz", "rt") as file:
        return {(int(n["row"]), int(n["col"]), int(n["label"])) for n in csv.DictReader(file)
                if (n["frame"], n["cq_level"]) == (frame, str(cq_level))}  # fmt: skip


def test_labels_are_those_of_the_examples_data(grey: Path) -> None:
    output = run(grey)
    version = json.loads((output / "MANIFEST.json").read_text())["encoder"]["version"]
    if version != (
        expected := json.loads((DATA_DIR / "MANIFEST.json").read_text())["encoder"]["version"]
    ):
        pytest.skip(
            f"another encoder may decide otherwise: this is {version}, the example's data are of "
            f"{expected}"
        )
    for cq_level in (32, 55):
        nodes = nodes_in(output, "skimage-grass-0", cq_level)
        assert len(nodes) > 100
        assert nodes == nodes_in(DATA_DIR, "skimage-grass-0", cq_level)
    sizes, _ = read_inspection(gzip.decompress(RECORDED.read_bytes()), RECORDED)
    assert nodes_in(output, "skimage-camera-0", 32) == set(labels_of_nodes(sizes))
    with (
        Image.open(output / "frames" / "skimage-grass-0.png") as own,
        Image.open(DATA_DIR / "frames" / "skimage-grass-0.png") as old,
    ):
        assert (np.asarray(own) == np.asarray(old)).all()


def test_a_run_goes_on_and_ends_with_the_same_bytes(grey: Path) -> None:
    output = run(grey, "--jobs", "2")
    work, first = output.with_name("out.work"), contents(output)
    train, val = load_dataset(output)
    assert len(train) > len(val) > 0
    streams = sorted(work.iterdir())
    assert [path.name.rsplit("_", 1)[0] for path in streams] == [
        f"skimage-{name}-0_cq{cq}" for name in ("camera", "grass") for cq in (32, 55)
    ]
    shutil.rmtree(output)
    lost, *kept = streams
    lost.unlink()
    times = [path.stat().st_mtime_ns for path in kept]
    assert contents(run(grey, "--jobs", "1")) == first
    assert [path.stat().st_mtime_ns for path in kept] == times
    assert sorted(work.iterdir()) == streams


def test_a_fast_encoder_has_fewer_kinds(grey: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    output = run(grey, "--cpu-used", "6")
    assert (
        "--cpu-used=6"
        in json.loads((output / "MANIFEST.json").read_text())["encoder"]["command_line"]
    )
    with gzip.open(output / "nodes.csv.gz", "rt") as file:
        kinds = {int(node["label"]) for node in csv.DictReader(file)}
    assert 0 in kinds
    assert not kinds & set(range(4, 10))
    assert "Stage 3 AB cannot be trained" in caplog.text


def test_a_changed_picture_is_coded_again(grey: Path) -> None:
    first = nodes_in(run(grey, cq_levels=["20"]), "skimage-camera-0", 20)
    shutil.rmtree(grey.parent / "out")
    path = grey / "skimage-camera-0.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 128), dtype=np.uint8)).save(path)
    assert nodes_in(run(grey, cq_levels=["20"]), "skimage-camera-0", 20) != first
    assert len(list((grey.parent / "out.work").glob("skimage-camera-0_cq20_*.ivf"))) == 2


def test_a_damaged_stream_leaves_no_folder(grey: Path) -> None:
    shutil.rmtree(run(grey, cq_levels=["55"]))
    (stream,) = (grey.parent / "out.work").glob("*camera*.ivf")
    stream.write_bytes(stream.read_bytes()[:60])
    with pytest.raises(
        DatasetError, match=f"{stream.name}: cannot be used, delete it and give the command again"
    ):
        run(grey, cq_levels=["55"])
    assert sorted(path.name for path in grey.parent.iterdir()) == ["in", "out.work"]


def test_pictures_without_nodes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.fromarray(np.full((64, 64), 128, dtype=np.uint8)).save(tmp_path / "in" / "camera.png")
    with pytest.raises(
        DatasetError, match=r"no picture has a 16x16 node, .*; pass lower --cq-level"
    ):
        run(tmp_path / "in")
    assert not (tmp_path / "out").exists()


def test_an_inspect_that_cannot_read_is_found_before_any_work(grey: Path) -> None:
    with pytest.raises(
        DatasetError,
        match=r"--inspect .*: cannot read a stream of this aomenc(?s:.*)-DCONFIG_INSPECTION=1",
    ):
        run(grey, inspect=AOMENC)
    assert [path.name for path in grey.parent.iterdir()] == ["in"]
