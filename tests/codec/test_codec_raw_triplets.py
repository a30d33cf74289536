"""Raw files of the study's tool: what is read of them, how they are split, what is refused."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from av1partition.atomic_folder import new_folder
from av1partition.data.blocks import BlockSet, DatasetError
from av1partition.data.label_kinds import describe_kinds
from av1partition.data.raw_triplets import join, open_triplet
from av1partition.data.study_layout import load_dataset
from import_triplets import main

COUNTS = {"crowd_1": 3, "crowd_2": 2, "park": 4, "sea": 1}


def values_of(name: str) -> list[list[int]]:
    """Samples, labels and quantizers, all different enough that a mix-up shows."""
    count, shift = COUNTS[name], 37 * sorted(COUNTS).index(name)
    samples = [(shift + 7 * k) % 1024 for k in range(256 * count)]
    return [
        samples,
        [(shift + k) % 10 for k in range(count)],
        [80 + shift + k for k in range(count)],
    ]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    root = tmp_path / "raw"
    for folder in ("intra_raw_blocks", "labels", "qps"):
        (root / folder).mkdir(parents=True)
    for name in COUNTS:
        samples, labels, qps = values_of(name)
        (root / "intra_raw_blocks" / f"{name}_sample_16.txt").write_bytes(
            struct.pack(f"<{len(samples)}H", *samples)
        )
        (root / "labels" / f"{name}_labels_16_intra.txt").write_text(" ".join(map(str, labels)))
        (root / "qps" / f"{name}_qps_16_intra.txt").write_text("\n".join(map(str, qps)) + " \t\n")
    # The tool's files of other block sizes lie beside them.
    (root / "intra_raw_blocks" / "park_sample_32.txt").write_bytes(b"other")
    return root


def run(raw: Path, *options: str) -> Path:
    output = raw.parent / "out"
    main(["--input-dir", str(raw), "--output-dir", str(output), *options])
    return output


def test_a_sequence_is_read_as_it_was_written(raw: Path) -> None:
    blocks = join([open_triplet(raw, "crowd_1")])
    samples, labels, qps = values_of("crowd_1")
    assert blocks.samples.dtype == torch.float32
    assert torch.equal(blocks.samples.flatten(), torch.tensor([value / 1023 for value in samples]))
    assert blocks.samples.shape == (3, 1, 16, 16)
    assert blocks.samples[1, 0, 2, 5] == torch.tensor(samples[256 + 2 * 16 + 5] / 1023)
    assert blocks.labels_stage0.tolist() == labels
    assert blocks.qps.tolist() == qps


def test_white_is_one(raw: Path) -> None:
    (raw / "intra_raw_blocks" / "sea_sample_16.txt").write_bytes(
        struct.pack("<256H", *[1023] * 256)
    )
    assert join([open_triplet(raw, "sea")]).samples.unique().tolist() == [1.0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--val", "sea"], {"train": ["crowd_1", "crowd_2", "park"], "val": ["sea"]}),
        (
            ["--val", "crowd_*", "--test", "park"],
            {"train": ["sea"], "val": ["crowd_1", "crowd_2"], "test": ["park"]},
        ),
        (
            ["--val", "sea", "s*", "--test", "crowd_2"],
            {"train": ["crowd_1", "park"], "val": ["sea"], "test": ["crowd_2"]},
        ),
    ],
)
def test_sequences_go_whole_into_their_split(
    raw: Path, options: list[str], expected: dict[str, list[str]]
) -> None:
    output = run(raw, *options)
    assert sorted(path.name for path in output.iterdir()) == sorted(
        f"{split}.pt" for split in expected
    )
    for blocks, names in zip(load_dataset(output, list(expected)), expected.values(), strict=True):
        samples, labels, qps = (
            [v for name in names for v in values_of(name)[kind]] for kind in range(3)
        )
        assert torch.equal(
            blocks.samples.flatten(), torch.tensor([value / 1023 for value in samples])
        )
        assert blocks.labels_stage0.tolist() == labels
        assert blocks.qps.tolist() == qps


def test_what_labels_cannot_teach_is_said(raw: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, labels in (("crowd_1", "0 3 1"), ("crowd_2", "3 3"), ("park", "0 0 0 2")):
        (raw / "labels" / f"{name}_labels_16_intra.txt").write_text(labels)
    with caplog.at_level("INFO"):
        run(raw, "--val", "park", "--test", "sea")
    said = [record.getMessage() for record in caplog.records]
    assert said[:4] == [
        "train: 5 blocks of crowd_1, crowd_2",
        "  NONE 1 (20.0%), HORZ 1 (20.0%), SPLIT 3 (60.0%); no VERT, HORZ_A, HORZ_B, VERT_A, "
        "VERT_B, HORZ_4, VERT_4",
        "  Stage 2 cannot be trained: no block is AB",
        "  Stage 3 RECT cannot be trained: no block is VERT",
    ]
    assert said[4] == (
        "  Stage 3 AB cannot be trained: no block is HORZ_A, HORZ_B, VERT_A or VERT_B"
    )
    assert said[5:7] == [
        "val: 4 blocks of park",
        "  NONE 3 (75.0%), VERT 1 (25.0%); no HORZ, SPLIT, HORZ_A, HORZ_B, VERT_A, VERT_B, "
        "HORZ_4, VERT_4",
    ], "of what only evaluates, the kinds alone"


def test_rare_classes_are_said() -> None:
    labels = torch.tensor([0] * 50 + [3] * 150 + [1] * 100 + [4])
    blocks = BlockSet(torch.zeros(len(labels), 1, 16, 16), labels, torch.full_like(labels, 80))
    assert describe_kinds(blocks, learn=True)[1] == (
        "Stage 2 will hardly learn AB (0.4%): too few of its 251 blocks"
    )
    assert describe_kinds(blocks.take(labels > 9), learn=True) == []


def put(folder: str, end: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def breaks(root: Path) -> None:
        path = root / folder / f"park{end}"
        path.write_bytes(change(path.read_bytes()))

    return breaks


def samples(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return put("intra_raw_blocks", "_sample_16.txt", change)


def labels(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return put("labels", "_labels_16_intra.txt", change)


def qps(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return put("qps", "_qps_16_intra.txt", change)


def put_sample(block: int, row: int, col: int, value: int) -> Callable[[bytes], bytes]:
    start = 2 * (256 * block + 16 * row + col)
    return lambda data: data[:start] + struct.pack("<H", value) + data[start + 2 :]


BREAKAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no samples file": (
        lambda d: (d / "intra_raw_blocks" / "park_sample_16.txt").unlink(),
        r"sequence 'park': lacks \['.*park_sample_16\.txt'\]; all three files",
    ),
    "no labels file": (
        lambda d: (d / "labels" / "park_labels_16_intra.txt").unlink(),
        r"lacks \['.*park_labels_16_intra\.txt'\]",
    ),
    "no qps file": (
        lambda d: (d / "qps" / "park_qps_16_intra.txt").unlink(),
        r"lacks \['.*park_qps_16_intra\.txt'\]",
    ),
    "odd size": (
        samples(lambda b: b[:-1]),
        r"park_sample_16\.txt: 2047 bytes are not one or more blocks of 512",
    ),
    "half a block": (
        samples(lambda b: b + b[:256]),
        r"2304 bytes are not one or more blocks of 512 .*again",
    ),
    "no samples": (
        samples(lambda b: b""),
        r"park_sample_16\.txt: 0 bytes are not one or more blocks",
    ),
    "block lost": (
        samples(lambda b: b[512:]),
        r"'park': 3 blocks in .*park_sample_16\.txt, 4 labels in .*labels_16_intra\.txt and 4 quantizers in .*qps_16",
    ),
    "label lost": (
        labels(lambda b: b[:-2]),
        r"4 blocks in .*, 3 labels in .* and 4 quantizers in .*one run of the tool",
    ),
    "qp twice": (qps(lambda b: b + b"80"), r"4 blocks in .*, 4 labels in .* and 5 quantizers in "),
    "sample 1024": (
        samples(put_sample(2, 3, 5, 1024)),
        r"sample_16\.txt: block 2, row 3, column 5 \(from 0\) is 1024, expected 0\.\.1023; is the file 8-bit, 16-bit or big-endian",
    ),
    "big-endian": (
        samples(lambda b: struct.pack(">1024H", *struct.unpack("<1024H", b))),
        r"block 0, row 0, column 0 .*big-endian",
    ),
    "label 10": (
        labels(lambda b: b"0 1 10 3"),
        r"intra\.txt: value 2 \(from 0\) is 10, expected 0\.\.9; are these AV1 partition ids",
    ),
    "label -1": (labels(lambda b: b"0 -1 1 3"), r"value 1 \(from 0\) is -1, expected 0\.\.9"),
    "qp 256": (
        qps(lambda b: b"255 0 1 256"),
        r"qps_16_intra\.txt: value 3 \(from 0\) is 256, expected 0\.\.255; .*base_q_idx",
    ),
    "word": (
        labels(lambda b: b"0 1 HORZ 3"),
        r"value 2 \(from 0\) is 'HORZ', expected an integer; .* spaces between",
    ),
    "fraction": (
        qps(lambda b: b"80 80.0 80 80"),
        r"value 1 \(from 0\) is '80\.0', expected an integer",
    ),
    "two in one": (
        labels(lambda b: b"0 1-2 3 4"),
        r"value 1 \(from 0\) is '1-2', expected an integer",
    ),
    "underscore": (
        qps(lambda b: b"80 8_0 80 80"),
        r"value 1 \(from 0\) is '8_0', expected an integer",
    ),
    "huge": (
        qps(lambda b: b"80 80 80 99999999999999999999"),
        r"value 3 \(from 0\) is '99999999999999999999', expected an integer",
    ),
    "binary labels": (
        labels(lambda b: b"\x00\x01\xff\x03"),
        r"value 0 \(from 0\) is .*, expected an integer",
    ),
    "blank labels": (
        labels(lambda b: b" \n"),
        r"labels_16_intra\.txt: is empty, expected an integer for each block",
    ),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_broken_sequence_is_refused_before_anything_is_written(raw: Path, name: str) -> None:
    breaks, message = BREAKAGES[name]
    breaks(raw)
    with pytest.raises(DatasetError, match=message):
        run(raw, "--val", "sea")
    assert [path.name for path in raw.parent.iterdir()] == ["raw"]


def test_a_wrong_sample_far_behind_is_found(raw: Path) -> None:
    count = 65536 + 3
    data = bytearray(512 * count)
    data[512 * (count - 1) + 511] = 4
    (raw / "intra_raw_blocks" / "sea_sample_16.txt").write_bytes(data)
    (raw / "labels" / "sea_labels_16_intra.txt").write_text("0 " * count)
    (raw / "qps" / "sea_qps_16_intra.txt").write_text("80 " * count)
    with pytest.raises(DatasetError, match=f"block {count - 1}, row 15, column 15 .* is 1024"):
        open_triplet(raw, "sea")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--val", "lake"],
            r"no sequence is named 'lake'; there are \['crowd_1', 'crowd_2', 'park', 'sea'\]",
        ),
        (["--val", "sea", "--test", "p?"], r"no sequence is named 'p\?'"),
        (
            ["--val", "crowd_1", "--test", "crowd*"],
            r"sequences \['crowd_1'\] are in val and in test; name each in one",
        ),
        (
            ["--val", "crowd_*", "--test", "sea", "park"],
            "no sequence is left for train; there are 4",
        ),
    ],
)
def test_impossible_split_is_refused(raw: Path, options: list[str], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        run(raw, *options)
    assert not (raw.parent / "out").exists()


def test_folder_without_sequences_is_refused(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    with pytest.raises(
        DatasetError,
        match=r"no sequence here; expected .*<seq>_sample_16\.txt, .*<seq>_qps_16_intra\.txt",
    ):
        run(tmp_path / "raw", "--val", "sea")


def test_a_name_with_brackets_means_itself(raw: Path) -> None:
    for path in [*raw.glob("*/park_*16*")]:
        path.rename(path.with_name(path.name.replace("park", "[park]")))
    (blocks,) = load_dataset(run(raw, "--val", "[park]"), ["val"])
    assert len(blocks) == COUNTS["park"]


def test_earlier_files_are_kept(raw: Path) -> None:
    output = run(raw, "--val", "sea")
    before = {path: path.read_bytes() for path in output.iterdir()}
    # Said before the input is looked at, which may take long.
    (raw / "labels" / "crowd_1_labels_16_intra.txt").unlink()
    with pytest.raises(
        FileExistsError, match=r"out: is there already; delete it, or choose another --output-dir"
    ):
        run(raw, "--val", "park", "--test", "sea")
    assert {path: path.read_bytes() for path in output.iterdir()} == before


def test_a_new_folder_is_whole_or_absent(tmp_path: Path) -> None:
    def half(path: Path) -> None:
        with new_folder(path) as folder:
            (folder / "train.pt").write_bytes(b"half")
            raise KeyboardInterrupt

    (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt):
        half(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not any((tmp_path / "out").iterdir())
    # As a killed process leaves it.
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "test.pt").write_bytes(b"old")
    with new_folder(tmp_path / "out") as folder:
        (folder / "train.pt").write_bytes(b"whole")
        assert not any((tmp_path / "out").iterdir())
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "train.pt"]
    with (
        pytest.raises(FileExistsError, match="out: is there already"),
        new_folder(tmp_path / "out"),
    ):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "train.pt"]
