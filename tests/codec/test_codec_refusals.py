"""What a stranger does wrong on the command line.

One line that says what, where and how to mend it, and nothing is left behind.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import diagnosis
import evaluate
import mystery
import pytest
import torch
import train_stage1
import train_stage2
import train_stage3
import verify_run
from av1partition.atomic_file import write_atomically
from av1partition.command_line import run
from av1partition.data.blocks import BlockSet, DatasetError, cut_blocks
from av1partition.data.study_layout import load_dataset, read_study_file, write_study_file
from av1partition.data.tasks import STAGE1, STAGE2
from av1partition.models.backbones import BackboneKind

Make = Callable[[BackboneKind], Path]


@pytest.fixture(scope="module")
def head_run(
    tiny_dataset: Path, stage1_file: Make, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished run of the frozen baseline."""
    folder = tmp_path_factory.mktemp("run") / "head"
    where = [
        "--dataset-dir",
        str(tiny_dataset),
        "--stage1-model",
        str(stage1_file("plain")),
        "--output-dir",
        str(folder),
    ]
    train_stage2.main([*where, "--epochs", "1", "--device", "cpu"])
    return folder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epochs", "0"], "argument --epochs: is 0, expected 1 or more"),
        (["--batch-size", "many"], "argument --batch-size: is many, expected 1 or more"),
        (["--num-workers", "-1"], "argument --num-workers: is -1, expected 0 or more"),
        (["--seed", "4294967296"], "argument --seed: is 4294967296, expected 0 to 4294967295"),
        (["--lr-head", "nan"], "argument --lr-head: is nan, expected a number, 0 or more"),
        (
            ["--weight-decay", "inf"],
            "argument --weight-decay: is inf, expected a number, 0 or more",
        ),
        (["--adapter-options", "dora"], "argument --adapter-options: is dora, expected NAME=VALUE"),
        (
            ["--adapter-options", "layers=3"],
            "argument --adapter-options: is layers=3, which is no option of a family",
        ),
        (["--adapter-budget", "0"], "argument --adapter-budget: is 0, expected 1 or more"),
        (["--adapter-budget", "100000"], "--adapter-budget goes with --use-adapters"),
        (["--blocks", "0"], "argument --blocks: is 0, expected 1 or more"),
        (["--device", "toaster"], "argument --device: toaster cannot be used"),
        (["--device", "meta"], "argument --device: meta cannot be used"),
    ],
)
def test_a_wrong_value_is_answered_first(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train_stage2.main(["--stage1-model", "nowhere", "--dataset-dir", "nowhere", *flags])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("script", ["stage1", "stage2", "stage3", "diagnosis", "mystery"])
def test_data_without_a_class_are_refused(
    script: str, all_blocks: dict[str, BlockSet], stage1_file: Make, tmp_path: Path
) -> None:
    data, output = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for split in ("train", "val"):
        # Blocks that are whole, for the specialists; that are divided, for Stage 1.
        mask = all_blocks[split].labels_stage0 == (3 if script == "stage1" else 0)
        write_study_file(
            all_blocks[split].take(mask.nonzero().flatten()[:50]), data / f"{split}.pt"
        )
    where = ["--dataset-dir", str(data), "--output-dir", str(output)]
    model = str(stage1_file("plain"))
    call: dict[str, Callable[[], None]] = {
        "stage1": lambda: train_stage1.main([*where, "--epochs", "1"]),
        "stage2": lambda: train_stage2.main([*where, "--stage1-model", model]),
        "stage3": lambda: train_stage3.main([*where, "--stage1-model", model, "--kind", "rect"]),
        "diagnosis": lambda: diagnosis.main([*where, "--stage1-models", model]),
        "mystery": lambda: mystery.main([*where, "--stage1-model", model]),
    }
    lacking = {
        "stage1": "Stage 1: none of 50 blocks is NONE; pass",
        "stage3": "Stage 3 RECT: none of 50 blocks is HORZ or VERT; pass",
    }
    with pytest.raises(
        DatasetError,
        match=lacking.get(script, "Stage 2: none of 50 blocks is SPLIT or RECT or AB; pass"),
    ):
        call[script]()
    assert not output.exists()


def test_a_lacking_class_may_lack_where_nothing_is_learned(all_blocks: dict[str, BlockSet]) -> None:
    val = all_blocks["val"]
    some = val.take((val.labels(STAGE2) == 0).nonzero().flatten()[:5])
    assert len(some.data(STAGE2)) == 5
    with pytest.raises(DatasetError, match="Stage 2: none of 5 blocks is RECT or AB"):
        some.data(STAGE2, every_class=True)
    with pytest.raises(DatasetError, match="none of 5 blocks is NONE"):
        some.check(STAGE1, every_class=True)


@pytest.mark.parametrize("script", [evaluate, verify_run])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: shutil.rmtree(folder),
            r"metrics\.json: is not that of a finished run of a specialist \(FileNotFoundError\)",
        ),
        (
            lambda folder: (folder / "metrics.json").write_text("{"),
            r"a finished run of a specialist \(JSONDecodeError\); pass",
        ),
        (
            lambda folder: (folder / "metrics.json").write_text("{}"),
            r"a finished run of a specialist \(KeyError\); pass",
        ),
        (
            lambda folder: (folder / "head.pt").unlink(),
            r"run: has none of adapters\.pt, head\.pt, network\.pt",
        ),
        (lambda folder: (folder / "head.pt").write_bytes(b"head"), r"head\.pt: .*"),
        (lambda folder: torch.save([1], folder / "head.pt"), r"head\.pt: .*"),
        (
            lambda folder: torch.save({"weight": torch.zeros(1)}, folder / "head.pt"),
            r"head\.pt: .*",
        ),
    ],
)
def test_a_damaged_run_is_named(
    script: object, damage: Callable[[Path], object], message: str, head_run: Path, tiny_dataset: Path, stage1_file: Make,
    tmp_path: Path,
) -> None:  # fmt: skip
    folder = tmp_path / "run"
    shutil.copytree(head_run, folder)
    damage(folder)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    where = [
        "--dataset-dir",
        str(tiny_dataset),
        "--stage1-model",
        str(stage1_file("plain")),
        "--output-dir",
        str(folder),
    ]
    with pytest.raises(SystemExit, match=f"(SpecialistFileError|AdapterFileError): .*{message}"):
        run(lambda: script.main([*where, "--device", "cpu"]))  # type: ignore[attr-defined]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_verification_on_other_data(
    head_run: Path, tiny_dataset: Path, stage1_file: Make, tmp_path: Path
) -> None:
    train, val = load_dataset(tiny_dataset)
    for split, blocks in (("train", train), ("val", val.take(torch.arange(100)))):
        write_study_file(blocks, tmp_path / f"{split}.pt")
    where = [
        "--dataset-dir",
        str(tmp_path),
        "--stage1-model",
        str(stage1_file("plain")),
        "--output-dir",
        str(head_run),
    ]
    with pytest.raises(
        DatasetError, match=r"validation blocks, the run had \d+; pass the run's data"
    ):
        verify_run.main([*where, "--device", "cpu"])


@pytest.mark.parametrize("place", [".", "below"])
def test_a_folder_that_cannot_be(place: str, tiny_dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    flags = [
        "--dataset-dir",
        str(tiny_dataset),
        "--output-dir",
        str(tmp_path / "file" / place),
        "--epochs",
        "1",
    ]
    with pytest.raises(SystemExit, match=r"(FileExists|NotADirectory)Error: .*file"):
        run(lambda: train_stage1.main(flags))
    assert (tmp_path / "file").read_text() == "mine"


def test_an_interruption_is_a_line() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="interrupted; the same command goes on"):
        run(interrupted)


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        write_atomically(tmp_path / "taken", lambda file: file.write(b"x"))
    with pytest.raises(ZeroDivisionError):
        write_atomically(tmp_path / "new", lambda file: file.write(bytes(1 // 0)))
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_samples_that_were_trained_are_data_too(tiny_dataset: Path, tmp_path: Path) -> None:
    content = torch.load(tiny_dataset / "val.pt", weights_only=True)
    content["samples"].requires_grad_()
    torch.save(content, tmp_path / "val.pt")
    assert not read_study_file(tmp_path / "val.pt").samples.requires_grad


@pytest.mark.parametrize("place", [20, 45, 60, 100])
def test_damaged_bytes_are_named(place: int, tiny_frames: Path) -> None:
    for name in ("nodes.csv.gz", "frames/val-0.png"):
        file = tiny_frames / name
        whole = file.read_bytes()
        file.write_bytes(
            whole[:place]
            + bytes([whole[place] ^ 0xFF, whole[place + 1] ^ 0xFF])
            + whole[place + 2 :]
        )
        with pytest.raises(DatasetError, match=file.name.replace(".", r"\.")):
            cut_blocks(tiny_frames)
        file.write_bytes(whole)


def test_a_frame_without_a_picture(tiny_frames: Path) -> None:
    manifest = tiny_frames / "MANIFEST.json"
    manifest.write_text(manifest.read_text().replace('"picture": "val"', '"image": "val"'))
    with pytest.raises(
        DatasetError, match=r"MANIFEST\.json: frame 1 \(from 0\) lacks \['picture'\]"
    ):
        cut_blocks(tiny_frames)
