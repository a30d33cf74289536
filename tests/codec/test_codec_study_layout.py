"""The study's own data files: round trip, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from av1partition.data.blocks import BlockSet, DatasetError
from av1partition.data.study_layout import load_dataset, read_study_file, write_study_file

KEYS = {
    "samples",
    "labels_stage0",
    "labels_stage1",
    "labels_stage2",
    "labels_stage3_RECT",
    "labels_stage3_AB",
    "qps",
}


@pytest.fixture
def every_class() -> BlockSet:
    torch.manual_seed(0)
    return BlockSet(torch.rand(10, 1, 16, 16), torch.arange(10), torch.full((10,), 128))


def test_round_trip(tmp_path: Path, every_class: BlockSet) -> None:
    write_study_file(every_class, tmp_path / "train.pt")
    blocks = read_study_file(tmp_path / "train.pt")
    assert torch.equal(blocks.samples, every_class.samples)
    assert torch.equal(blocks.labels_stage0, every_class.labels_stage0)
    assert torch.equal(blocks.qps, every_class.qps)


def test_file_is_the_studys(tmp_path: Path, every_class: BlockSet) -> None:
    write_study_file(every_class, tmp_path / "train.pt")
    content = torch.load(tmp_path / "train.pt", weights_only=True)
    assert content.keys() == KEYS
    assert content["labels_stage1"].tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    assert content["labels_stage2"].tolist() == [-1, 1, 1, 0, 2, 2, 2, 2, 1, 1]
    assert content["labels_stage3_RECT"].tolist() == [-1, 0, 1, -1, -1, -1, -1, -1, 0, 1]
    assert content["labels_stage3_AB"].tolist() == [-1, -1, -1, -1, 0, 1, 2, 3, -1, -1]


def test_small_integers_and_half_samples_are_read(tmp_path: Path, every_class: BlockSet) -> None:
    write_study_file(every_class, tmp_path / "a.pt")
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    narrow = {
        key: value.half() if key == "samples" else value.to(torch.int16)
        for key, value in content.items()
    }
    torch.save(narrow, tmp_path / "a.pt")
    blocks = read_study_file(tmp_path / "a.pt")
    assert blocks.samples.dtype == torch.float32
    assert blocks.labels_stage0.dtype == blocks.qps.dtype == torch.int64


def put(key: str, index: int, value: float) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content[key].view(-1)[index] = value

    return change


def replace(key: str, tensor: Callable[[torch.Tensor], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.update({key: tensor(content[key])})


BREAKAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "missing": (lambda c: c.pop("qps"), r"missing tensors \['qps'\]"),
    "extra": (lambda c: c.update(other=torch.zeros(1)), r"unexpected entries \['other'\]"),
    "no tensor": (replace("qps", torch.Tensor.tolist), r"missing tensors \['qps'\]"),
    "flat samples": (replace("samples", lambda t: t[:, 0]), r"expected float \[N, 1, 16, 16\]"),
    "byte samples": (replace("samples", lambda t: t.byte()), r"'samples' is torch.uint8"),
    "no samples": (replace("samples", lambda t: t[:0]), "'samples' is empty"),
    "8-bit scale": (replace("samples", lambda t: t * 255), "divide 8-bit luma by 255"),
    "below zero": (put("samples", 3, -0.01), r"lies in \[-0.01"),
    "nan": (put("samples", 3, float("nan")), r"expected \[0, 1\]"),
    "short labels": (
        replace("labels_stage2", lambda t: t[:9]),
        r"'labels_stage2' is torch.int64 \[9\]",
    ),
    "float labels": (
        replace("labels_stage1", torch.Tensor.float),
        r"'labels_stage1' is torch.float32",
    ),
    "label 10": (put("labels_stage0", 4, 10), r"'labels_stage0'\[4\] is 10, expected 0..9"),
    "qp": (put("qps", 2, 256), r"'qps'\[2\] is 256, expected 0..255"),
    "stage 1": (
        put("labels_stage1", 0, 1),
        r"'labels_stage1'\[0\] is 1, but 'labels_stage0' says NONE",
    ),
    "stage 2": (
        put("labels_stage2", 8, -1),
        r"'labels_stage2'\[8\] is -1, .* HORZ_4, for which it must be 1",
    ),
    "stage 3 rect": (put("labels_stage3_RECT", 9, 0), r"'labels_stage3_RECT'\[9\] is 0, .* VERT_4"),
    "stage 3 ab": (
        put("labels_stage3_AB", 3, 0),
        r"'labels_stage3_AB'\[3\] is 0, .* SPLIT, .* must be -1",
    ),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_broken_file_is_refused(tmp_path: Path, every_class: BlockSet, name: str) -> None:
    path = tmp_path / "val.pt"
    write_study_file(every_class, path)
    content = torch.load(path, weights_only=True)
    breaks, message = BREAKAGES[name]
    breaks(content)
    torch.save(content, path)
    with pytest.raises(DatasetError, match=message) as raised:
        read_study_file(path)
    assert str(path) in str(raised.value)


class Opens:
    """Would open a file when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("opened-by-pickle", "w"))


def test_pickled_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"samples": Opens()}, tmp_path / "train.pt")
    with pytest.raises(DatasetError, match="cannot be read as tensors"):
        read_study_file(tmp_path / "train.pt")
    assert not (tmp_path / "opened-by-pickle").exists()


def test_a_list_is_no_data_set(tmp_path: Path) -> None:
    torch.save([torch.zeros(1)], tmp_path / "train.pt")
    with pytest.raises(DatasetError, match="holds a list, expected a dictionary"):
        read_study_file(tmp_path / "train.pt")


def test_both_kinds_of_folder_load(
    tiny_frames: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    study = tmp_path_factory.mktemp("study")
    train, val = load_dataset(tiny_frames)
    write_study_file(train, study / "train.pt")
    write_study_file(val, study / "val.pt")
    for framed, stored in zip((train, val), load_dataset(study), strict=True):
        assert torch.equal(framed.samples, stored.samples)
        assert torch.equal(framed.labels_stage0, stored.labels_stage0)


def test_neither_or_both_kinds_are_refused(
    tiny_frames: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="has neither of"):
        load_dataset(tmp_path / "empty")
    shutil.copy(tiny_dataset / "train.pt", tiny_frames)
    with pytest.raises(DatasetError, match="has both of"):
        load_dataset(tiny_frames)


def test_missing_validation_file_is_named(tiny_dataset: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_dataset / "train.pt", tmp_path)
    with pytest.raises(DatasetError, match=r"val\.pt: cannot be read"):
        load_dataset(tmp_path)
