"""Data from anyone's pictures: splits, the folder, what is refused before libaom's programs run."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from av1partition.data.blocks import DATA_DIR, DatasetError, cut_blocks
from av1partition.data.frame_folder import Coded, write_frame_folder
from av1partition.data.libaom import Libaom
from av1partition.data.pictures import LUMA, Crop
from av1partition.data.splits import split_by_name_or_share
from encode_pictures import main
from PIL import Image

EXAMPLE = json.loads((DATA_DIR / "MANIFEST.json").read_text())


def save(path: Path, width: int, height: int) -> Path:
    Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8)
    ).save(path)
    return path


def run(folder: Path, *options: str) -> Path:
    main(
        [
            str(folder),
            "--output-dir",
            str(folder.parent / "out"),
            "--val",
            "0",
            "--test",
            "0",
            *options,
        ]
    )
    return folder.parent / "out"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        save(tmp_path / "in" / f"{name}.png", 64, 64)
    return tmp_path / "in"


def test_flags_and_luma_are_those_of_the_examples_own_data() -> None:
    flags = " ".join(Libaom("", "", "").flags)
    assert (
        EXAMPLE["encoder"]["command_line"]
        == f"aomenc {flags} --cq-level=CQ -q -o FRAME_cqCQ.ivf FRAME.y4m"
    )
    assert EXAMPLE["luma"] == LUMA


def test_the_speed_is_a_flag_of_the_encoder() -> None:
    default, fast = Libaom("", "", "").flags, Libaom("", "", "", cpu_used=6).flags
    assert set(default) ^ set(fast) == {"--cpu-used=1", "--cpu-used=6"}


# Splits.


def test_shares_do_not_depend_on_the_order() -> None:
    names = [f"p{k}" for k in range(20)]
    splits = split_by_name_or_share(names, ["0.15"], ["0.1"], 0, "picture")
    assert {split: len(members) for split, members in splits.items()} == {
        "train": 15,
        "val": 3,
        "test": 2,
    }
    assert sorted(name for members in splits.values() for name in members) == sorted(names)
    assert splits == split_by_name_or_share(names[::-1], ["0.15"], ["0.1"], 0, "picture")
    assert splits != split_by_name_or_share(names, ["0.15"], ["0.1"], 1, "picture")


def test_a_share_is_drawn_beside_names() -> None:
    splits = split_by_name_or_share(["a", "b", "cat_1", "cat_2"], ["0.01"], ["cat_*"], 0, "picture")
    assert splits["test"] == ["cat_1", "cat_2"]
    assert len(splits["val"]) == len(splits["train"]) == 1


def test_everything_may_be_test_by_name() -> None:
    assert split_by_name_or_share(["a"], ["0"], ["*"], 0, "picture") == {
        "train": [],
        "val": [],
        "test": ["a"],
    }


def test_shares_leave_something_to_train() -> None:
    with pytest.raises(
        DatasetError,
        match=r"a share of 0\.15 for val leaves none of 2 pictures for train; pass more pictures",
    ):
        split_by_name_or_share(["a", "b"], ["0.15"], ["0.15"], 0, "picture")


# The folder.


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lumas = {name: rng.integers(0, 256, (64, 128), dtype=np.uint8) for name in ("a, b", "c")}
    crops = {name: Crop((130, 70), (1, 3, 128, 64), (128, 64)) for name in lumas}
    nodes = [(48, 112, 9), (0, 16, 4)]
    coded = [
        Coded("c", 20, 80, nodes[:1]),
        Coded("a, b", 32, 128, nodes),
        Coded("a, b", 20, 80, []),
    ]
    splits: dict[str, list[str]] = {"train": ["a, b"], "val": ["c"], "test": []}
    write_frame_folder(tmp_path, iter(lumas.items()), crops, splits, coded, {"downscale": 1})
    blocks = cut_blocks(tmp_path)
    assert blocks["train"].labels_stage0.tolist() == [4, 9]
    assert blocks["train"].qps.tolist() == [128, 128]
    assert (blocks["train"].samples[1, 0].numpy() * 255 == lumas["a, b"][48:, 112:]).all()
    assert (
        blocks["val"].labels_stage0.tolist(),
        blocks["val"].qps.tolist(),
        len(blocks["test"]),
    ) == ([9], [80], 0)
    manifest = json.loads((tmp_path / "MANIFEST.json").read_text(encoding="utf-8"))
    assert manifest["class_counts_per_split"]["train"] == {
        **dict.fromkeys(manifest["class_counts"], 0),
        "HORZ_A": 1,
        "VERT_4": 1,
    }
    assert manifest["base_q_idx_of_cq_level"] == {"20": [80], "32": [128]}
    assert manifest["frames"][0]["nodes_per_cq_level"] == {"20": 0, "32": 2}


# What is refused, before any work.


def spoil(folder: Path, how: str) -> list[str]:
    """Break the input; returns options."""
    if how == "empty":
        for path in folder.iterdir():
            path.rename(path.with_suffix(".txt"))
    elif how == "no picture":
        (folder / "c.png").write_bytes(b"no")
    elif how == "cut picture":
        (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:2000])
    elif how == "16 bits":
        Image.fromarray(np.zeros((64, 64), dtype=np.uint16)).save(folder / "a.png")
    elif how == "small":
        save(folder / "c.png", 63, 640)
    elif how == "small when downscaled":
        return ["--downscale", "2"]
    elif how == "one name":
        save(folder / "A.bmp", 64, 64)
    elif how == "not there":
        return [str(folder / "other.png")]
    elif how == "unknown name":
        return ["--val", "z*"]
    elif how == "no aomenc":
        return ["--aomenc", str(folder / "aomenc")]
    elif how == "aomenc not executable":
        (folder / "aomenc").write_text("")
        return ["--aomenc", str(folder / "aomenc")]
    elif how == "aomenc damaged":
        (folder / "aomenc").write_bytes(b"\0damaged")
        (folder / "aomenc").chmod(0o755)
        return ["--aomenc", str(folder / "aomenc")]
    elif how == "aomenc another program":
        return ["--aomenc", sys.executable, "--inspect", sys.executable]
    elif how == "no inspect":
        return ["--aomenc", sys.executable, "--inspect", str(folder / "inspect")]
    return []


REFUSALS = {
    "empty": r"no picture in \['.*in'\]; pass PNG files",
    "no picture": r"c\.png: cannot read the picture .*; repair it or leave it out",
    "cut picture": r"a\.png: cannot read the picture",
    "16 bits": r"a\.png: has values of more than 8 bits \(mode I;16\); convert it to 8 bits first",
    "small": r"c\.png: is 63x640, expected 64x64 or more \(--downscale 1\); leave it out",
    "small when downscaled": r"a\.png: is 64x64, expected 128x128 or more .*smaller --downscale",
    "one name": r"a\.png and .*A\.bmp: two pictures with the name 'a'; rename one",
    "not there": r"other\.png: is not there; pass pictures",
    "unknown name": r"no picture is named 'z\*'; there are \['a', 'b'\]",
    "no aomenc": r"--aomenc .*aomenc: is not there; .*apt-get install aom-tools",
    "aomenc not executable": r"--aomenc .*aomenc: may not be executed \(chmod \+x\); .*apt-get install aom-tools",
    "aomenc damaged": r"aomenc: cannot be run \(.*\); is it built for this machine",
    "aomenc another program": r"--aomenc .*: is not libaom's aomenc; .*apt-get install aom-tools",
    "no inspect": r"--inspect .*inspect: is not there; (?s:.*apt-get source aom.*-DCONFIG_INSPECTION=1.*--target inspect)",
}


@pytest.mark.parametrize("how", REFUSALS)
def test_refused_before_any_work(folder: Path, how: str) -> None:
    options = spoil(folder, how)
    extra = [each for each in options if each.endswith(".png")]
    options = options if "--inspect" in options else [*options, "--inspect", sys.executable]
    with pytest.raises(DatasetError, match=REFUSALS[how]):
        main(
            [
                *extra,
                str(folder),
                "--output-dir",
                str(folder.parent / "out"),
                "--val",
                "0",
                "--test",
                "0",
                *options[len(extra) :],
            ]
        )
    assert [path.name for path in folder.parent.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--cq-level", "20", "64"],
            r"--cq-level is 64, expected 0\.\.63; it is libaom's cq level, not base_q_idx",
        ),
        (["--cq-level=-1"], "--cq-level is -1, expected 0..63"),
        (["--cpu-used", "7"], r"--cpu-used is 7, expected 0\.\.6, the speeds of libaom's good"),
        (["--cpu-used=-1"], "--cpu-used is -1, expected 0..6"),
        (["--downscale", "0"], "argument --downscale: is 0, expected 1 or more"),
        (["--jobs", "0"], "argument --jobs: is 0, expected 1 or more"),
    ],
)
def test_wrong_options(
    folder: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(folder, *options)
    assert re.search(message, capsys.readouterr().err)


def test_an_older_folder_is_kept(folder: Path) -> None:
    (folder.parent / "out").mkdir()
    (folder.parent / "out" / "train.pt").write_bytes(b"")
    with pytest.raises(
        FileExistsError, match="out: is there already; delete it, or choose another --output-dir"
    ):
        run(folder)
