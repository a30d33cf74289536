"""Real, short runs of the training scripts: outputs, determinism, and being killed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evaluate
import pytest
import torch
import train_stage1
import train_stage2
import train_stage3
import verify_run
from av1partition.data.blocks import DatasetError
from av1partition.data.inputs import quantizer_code, with_quantizer
from av1partition.data.noise import with_misrouted
from av1partition.data.study_layout import load_dataset, read_study_file, write_study_file
from av1partition.data.tasks import RECT, STAGE1, STAGE2
from av1partition.evaluation.metrics import collapse, macro_f1
from av1partition.models.backbones import BackboneKind
from av1partition.models.cascade import Answers, Cascade, adapt
from av1partition.models.specialist_files import reload_specialist
from av1partition.models.stage1_files import load_stage1
from av1partition.training.loop import predict_logits
from av1partition.training.state import TrainingStateError
from av1partition.training.trainees import frozen_features
from PIL import Image
from sklearn.metrics import f1_score
from torch.utils.data import TensorDataset

from resadapt import BackboneMismatchError, load_adapters, save_adapters

EPOCHS = 8
OUTPUTS = {"history.json", "metrics.json", "learning_curves.png", "confusion_matrix.png", "training_state.pt",
           "best_validation_logits.pt"}  # fmt: skip
SAME_BYTES = ("history.json", "metrics.json", "best_validation_logits.pt")


def options(dataset: Path, stage1: Path, output: Path, *more: str) -> list[str]:
    # Large steps, so that a few epochs on a few blocks change something.
    rates = [
        "--lr-adapter",
        "1e-2",
        "--lr-head",
        "1e-2",
        "--batch-size",
        "64",
        "--epochs",
        str(EPOCHS),
    ]
    where = [
        "--dataset-dir",
        str(dataset),
        "--stage1-model",
        str(stage1),
        "--output-dir",
        str(output),
    ]
    return [*where, *rates, "--device", "cpu", *more]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


Run = tuple[list[str], Path]


@pytest.fixture(scope="module")
def adapter_run(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_dataset: Path,
    stage1_file: Callable[[BackboneKind], Path],
) -> Run:
    output = tmp_path_factory.mktemp("adapters")
    arguments = options(tiny_dataset, stage1_file("plain"), output, "--use-adapters")
    train_stage2.main(arguments)
    return arguments, output


def elsewhere(arguments: list[str], output: Path, **changed: str) -> list[str]:
    changes = {"--output-dir": str(output)} | {
        f"--{name.replace('_', '-')}": value for name, value in changed.items()
    }
    before = ["", *arguments[:-1]]
    return [changes.get(flag, value) for flag, value in zip(before, arguments, strict=True)]


def test_outputs(adapter_run: Run, tiny_dataset: Path) -> None:
    _, output = adapter_run
    assert {path.name for path in output.iterdir()} == OUTPUTS | {"adapters.pt"}
    history, metrics = read(output / "history.json"), read(output / "metrics.json")
    assert [record["epoch"] for record in history] == list(range(1, EPOCHS + 1))
    assert metrics["parameters"] == {"trainable": 125_635, "adapters": 124_096, "head": 1_539}
    assert metrics["file"] == {
        "name": "adapters.pt",
        "bytes": (output / "adapters.pt").stat().st_size,
    }
    for picture in ("learning_curves.png", "confusion_matrix.png"):
        with Image.open(output / picture) as image:
            assert min(image.size) >= 400
    assert metrics["blocks"]["val"] == len(read_study_file(tiny_dataset / "val.pt").of(STAGE2))


def test_metrics_follow_from_the_logits(adapter_run: Run, tiny_dataset: Path) -> None:
    _, output = adapter_run
    metrics = read(output / "metrics.json")
    logits = torch.load(output / "best_validation_logits.pt", weights_only=True)
    labels = read_study_file(tiny_dataset / "val.pt").data(STAGE2).tensors[1]
    pairs = list(zip(labels.tolist(), logits.argmax(1).tolist(), strict=True))
    matrix = [[pairs.count((true, guess)) for guess in range(3)] for true in range(3)]
    assert metrics["confusion_matrix"] == matrix
    assert metrics["accuracy"] == pytest.approx(sum(matrix[k][k] for k in range(3)) / len(pairs))
    scores, supports = [], []
    for k, name in enumerate(("SPLIT", "RECT", "AB")):
        right, guessed, there = matrix[k][k], sum(row[k] for row in matrix), sum(matrix[k])
        precision, recall = right / guessed if guessed else 0.0, right / there
        f1 = 2 * right / (guessed + there)
        expected = {"precision": precision, "recall": recall, "f1": f1, "support": there}
        assert metrics["per_class"][name] == pytest.approx(expected)
        scores.append(f1)
        supports.append(there)
    assert metrics["macro_f1"] == pytest.approx(sum(scores) / 3)
    weighted = sum(f1 * there for f1, there in zip(scores, supports, strict=True)) / len(pairs)
    assert metrics["weighted_f1"] == pytest.approx(weighted)


def test_history_and_metrics_are_of_the_same_model(adapter_run: Run) -> None:
    _, output = adapter_run
    history, metrics = read(output / "history.json"), read(output / "metrics.json")
    best = max(record["macro_f1"] for record in history)
    assert metrics["macro_f1"] == best
    assert history[metrics["best_epoch"] - 1]["macro_f1"] == best
    improved = [
        r
        for n, r in enumerate(history)
        if r["macro_f1"] > max([-1.0, *(b["macro_f1"] for b in history[:n])])
    ]
    assert [record["epoch"] for record in history if "proof" in record] == [
        record["epoch"] for record in improved
    ]


def test_every_kept_epoch_was_proven(adapter_run: Run) -> None:
    proofs = [
        record["proof"] for record in read(adapter_run[1] / "history.json") if "proof" in record
    ]
    assert proofs
    for proof in proofs:
        assert proof["macro_f1_live"] == proof["macro_f1_reloaded"] > 0
        assert proof["macro_f1_difference"] == 0
        assert {proof["checks"][name] for name in ("backbone", "tensors", "outputs", "metric")} == {
            "passed"
        }


def test_learning_rates_are_cosines_of_two_groups(adapter_run: Run) -> None:
    history = read(adapter_run[1] / "history.json")
    assert history[0]["learning_rates"] == pytest.approx([1e-2, 1e-2])
    middle = history[EPOCHS // 2]["learning_rates"]
    assert middle == pytest.approx([(1e-2 + 1e-6) / 2] * 2)


def test_training_learns(adapter_run: Run) -> None:
    history = read(adapter_run[1] / "history.json")
    assert history[-1]["train_loss"] < 0.9 * history[0]["train_loss"]


def test_defaults_are_the_specified_ones() -> None:
    defaults = vars(train_stage2.parse_options(["--stage1-model", "stage1.pt"]))
    expected = {
        "epochs": 50,
        "batch_size": 128,
        "adapter_bottleneck": 64,
        "lr_adapter": 1e-4,
        "lr_head": 5e-4,
    }
    assert {name: defaults[name] for name in expected} == expected
    assert not defaults["use_adapters"]


def test_same_seed_same_bytes_whatever_the_workers(adapter_run: Run, tmp_path: Path) -> None:
    arguments, output = adapter_run
    train_stage2.main([*elsewhere(arguments, tmp_path), "--num-workers", "1"])
    for name in ("adapters.pt", *SAME_BYTES):
        assert (tmp_path / name).read_bytes() == (output / name).read_bytes()


def test_another_seed_other_bytes(adapter_run: Run, tmp_path: Path) -> None:
    written = []
    for seed in ("0", "0", "1"):
        output = tmp_path / f"run{len(written)}"
        train_stage2.main([*elsewhere(adapter_run[0], output, epochs="1"), "--seed", seed])
        written.append((output / "adapters.pt").read_bytes())
    assert written[0] == written[1] != written[2]


def test_a_killed_run_resumes_to_the_same_bytes(adapter_run: Run, tmp_path: Path) -> None:
    arguments, output = adapter_run
    script = Path(train_stage2.__file__)
    command = [sys.executable, str(script), *elsewhere(arguments, tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    while not (tmp_path / "training_state.pt").exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (tmp_path / "metrics.json").exists()
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert "resumed after epoch" in done.stderr
    for name in ("adapters.pt", *SAME_BYTES):
        assert (tmp_path / name).read_bytes() == (output / name).read_bytes()


def test_resuming_with_other_options_is_refused(adapter_run: Run) -> None:
    arguments, output = adapter_run
    with pytest.raises(
        TrainingStateError, match=r"epochs was 8, now is 9; seed was 0, now is 5.*--output-dir"
    ):
        train_stage2.main([*elsewhere(arguments, output, epochs="9"), "--seed", "5"])


def test_resuming_with_other_data_is_refused(
    adapter_run: Run, tiny_dataset: Path, tmp_path: Path
) -> None:
    arguments, output = adapter_run
    for name in ("train.pt", "val.pt"):
        blocks = read_study_file(tiny_dataset / name)
        write_study_file(blocks.take(torch.arange(len(blocks) - 1)), tmp_path / name)
    with pytest.raises(TrainingStateError, match="data was"):
        train_stage2.main(elsewhere(arguments, output, dataset_dir=str(tmp_path)))


def test_damaged_training_state_is_named(adapter_run: Run, tmp_path: Path) -> None:
    (tmp_path / "training_state.pt").write_bytes(b"no")
    with pytest.raises(
        TrainingStateError,
        match=r"training_state\.pt: not a training state .* delete it to start over",
    ):
        train_stage2.main(elsewhere(adapter_run[0], tmp_path))


def test_files_alone_give_the_live_logits(
    adapter_run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    where = adapter_run[0][:6]
    verify_run.main([*where, "--device", "cpu"])
    assert json.loads(capsys.readouterr().out) == {"macro_f1": 0.0, "logits": 0.0}


def test_verification_can_fail(adapter_run: Run, tmp_path: Path) -> None:
    where, output = adapter_run[0][:6], adapter_run[1]
    for name in ("adapters.pt", "metrics.json"):
        (tmp_path / name).write_bytes((output / name).read_bytes())
    logits = torch.load(output / "best_validation_logits.pt", weights_only=True)
    logits[0, 0] += 1e-6
    torch.save(logits, tmp_path / "best_validation_logits.pt")
    with pytest.raises(SystemExit, match="the files do not give the live model's outputs"):
        verify_run.main(elsewhere([*where, "--device", "cpu"], tmp_path))


def test_adapters_of_another_backbone_are_refused(
    adapter_run: Run, stage1_file: Callable[[BackboneKind], Path], tmp_path: Path
) -> None:
    content = torch.load(stage1_file("plain"), weights_only=True)
    content["model_state_dict"]["backbone.layer2.0.bn1.running_mean"][3] += 1e-3
    torch.save(content, tmp_path / "stage1.pt")
    with pytest.raises(BackboneMismatchError, match=r"layer2\.0\.bn1\.running_mean"):
        reload_specialist(tmp_path / "stage1.pt", STAGE2, adapter_run[1])


def test_baseline_trains_the_head_alone(
    tiny_dataset: Path, stage1_file: Callable[[BackboneKind], Path], tmp_path: Path
) -> None:
    train_stage2.main(options(tiny_dataset, stage1_file("plain"), tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == OUTPUTS | {"head.pt"}
    metrics = read(tmp_path / "metrics.json")
    assert metrics["parameters"] == {"trainable": 1_539, "adapters": 0, "head": 1_539}
    model = reload_specialist(stage1_file("plain"), STAGE2, tmp_path)
    for name, tensor in load_stage1(stage1_file("plain")).state_dict().items():
        assert torch.equal(model.model.state_dict()[f"stage1.{name}"], tensor)
    history = read(tmp_path / "history.json")
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    verify_run.main([*options(tiny_dataset, stage1_file("plain"), tmp_path)[:6], "--device", "cpu"])


@pytest.mark.parametrize("start", ["--full-fine-tuning", "--from-scratch"])
def test_a_whole_network_is_trained_and_reloaded(
    start: str, tiny_dataset: Path, stage1_file: Callable[[BackboneKind], Path], tmp_path: Path
) -> None:
    where = [*options(tiny_dataset, stage1_file("plain"), tmp_path)[:6], "--device", "cpu"]
    train_stage2.main([*where, start, "--epochs", "2", "--lr-backbone", "1e-5"])
    assert {path.name for path in tmp_path.iterdir()} == OUTPUTS | {"network.pt"}
    before = load_stage1(stage1_file("plain"))
    size = sum(parameter.numel() for parameter in before.backbone.parameters())
    assert read(tmp_path / "metrics.json")["parameters"] == {
        "trainable": size + 1_539,
        "adapters": 0,
        "head": 1_539,
    }
    after = reload_specialist(stage1_file("plain"), STAGE2, tmp_path).model.backbone.get_parameter(
        "conv1.weight"
    )
    distance = (after - before.backbone.get_parameter("conv1.weight")).abs().max()
    assert 0 < distance < 1e-3 if start == "--full-fine-tuning" else distance > 0.05
    verify_run.main(where)


@pytest.mark.parametrize(
    "what", [[], ["--use-adapters", "--adapter-layers", "layer[34]", "layer2.0", "--augment"]]
)
def test_quantizer_in_the_head(
    what: list[str],
    tiny_dataset: Path,
    stage1_file: Callable[[BackboneKind], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    where = [*options(tiny_dataset, stage1_file("fine"), tmp_path)[:6], "--device", "cpu"]
    train_stage2.main([*where, *what, "--quantizer", "--epochs", "2", "--lr-head", "1e-2"])
    head = 521 * 128 + 128 + 128 * 3 + 3
    adapters = sum(2 * c * 64 + 64 + c for c in (128, 256, 512)) if what else 0
    assert read(tmp_path / "metrics.json")["parameters"] == {
        "trainable": head + adapters,
        "adapters": adapters,
        "head": head,
    }
    model = reload_specialist(stage1_file("fine"), STAGE2, tmp_path).eval()
    x = load_dataset(tiny_dataset)[1].inputs()[:8]
    assert not torch.equal(model(x), model(with_quantizer(x[:, :1], torch.zeros(8))))
    capsys.readouterr()
    verify_run.main(where)
    assert json.loads(capsys.readouterr().out) == {"macro_f1": 0.0, "logits": 0.0}


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--adapter-layers", "layer1"], "--adapter-layers goes with --use-adapters"),
     (["--beta", "1"], "--beta is 1.0, expected 0 <= beta < 1"),
     (["--augment"], "--augment does not go with the frozen baseline"),
     (["--use-adapters", "--from-scratch"], "not allowed with argument")],
)  # fmt: skip
def test_contradicting_flags_are_refused(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train_stage2.main(
            ["--stage1-model", "none.pt", "--output-dir", str(tmp_path / "run"), *flags]
        )
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_stage1_of_all_kinds_with_the_quantizer(tiny_dataset: Path, tmp_path: Path) -> None:
    arguments = [
        "--dataset-dir",
        str(tiny_dataset),
        "--epochs",
        "1",
        "--device",
        "cpu",
        "--fine",
        "--all-kinds",
        "--quantizer",
        "--augment",
    ]
    train_stage1.main([*arguments, "--output-dir", str(tmp_path)])
    metrics = read(tmp_path / "metrics.json")
    model, val = (
        load_stage1(tmp_path / "stage1.pt").eval(),
        load_dataset(tiny_dataset)[1].data(STAGE1),
    )
    with torch.no_grad():
        divided = model(val.tensors[0])[:, 0].sigmoid() >= model.threshold
    assert metrics["accuracy"] == pytest.approx(
        (divided.long() == val.tensors[1]).float().mean().item()
    )


def test_features_leave_the_backbone_alone(stage1_file: Callable[[BackboneKind], Path]) -> None:
    backbone = load_stage1(stage1_file("attention")).backbone.train()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    data = TensorDataset(
        with_quantizer(torch.rand(40, 1, 16, 16), torch.arange(40)),
        torch.zeros(40, dtype=torch.long),
    )
    features = frozen_features(backbone, data, torch.device("cpu"), quantizer=False)
    assert features.tensors[0].shape == (40, 512)
    both = frozen_features(backbone, data, torch.device("cpu"), quantizer=True).tensors[0]
    assert torch.equal(
        both, torch.cat([features.tensors[0], quantizer_code(data.tensors[0])], dim=1)
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


def test_attention_backbone_from_stage1_to_verified_run(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage1, stage2 = tmp_path / "stage1", tmp_path / "stage2"
    common = ["--dataset-dir", str(tiny_dataset), "--epochs", "2", "--device", "cpu"]
    train_stage1.main([*common, "--output-dir", str(stage1), "--attention"])
    assert {"stage1.pt", "history.json", "metrics.json"} <= {path.name for path in stage1.iterdir()}
    where = ["--stage1-model", str(stage1 / "stage1.pt"), "--output-dir", str(stage2)]
    train_stage2.main([*common, *where, "--use-adapters"])
    assert read(stage2 / "metrics.json")["parameters"]["adapters"] == 124_096
    capsys.readouterr()
    verify_run.main([*where, "--dataset-dir", str(tiny_dataset), "--device", "cpu"])
    assert json.loads(capsys.readouterr().out) == {"macro_f1": 0.0, "logits": 0.0}
    model = Answers(
        load_adapters(Cascade(load_stage1(stage1 / "stage1.pt")), stage2 / "adapters.pt"), STAGE2
    )
    samples, labels = load_dataset(tiny_dataset)[1].data(STAGE2).tensors
    logits = predict_logits(model, samples, torch.device("cpu"))
    expected = f1_score(
        labels, logits.argmax(1), average="macro", labels=[0, 1, 2], zero_division=0
    )
    assert macro_f1(logits, labels) == expected


def test_stage1_resumes(tiny_dataset: Path, tmp_path: Path) -> None:
    arguments = ["--dataset-dir", str(tiny_dataset), "--epochs", "2", "--device", "cpu"]
    train_stage1.main([*arguments, "--output-dir", str(tmp_path / "whole")])
    state = torch.load(tmp_path / "whole" / "training_state.pt", weights_only=True)
    assert len(state["history"]) == 2
    train_stage1.main([*arguments, "--output-dir", str(tmp_path / "whole")])
    train_stage1.main([*arguments, "--output-dir", str(tmp_path / "again")])
    for name in ("stage1.pt", "history.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_stage3_trains_a_specialist_for_each_seed(
    tiny_dataset: Path, stage1_file: Callable[[BackboneKind], Path], tmp_path: Path
) -> None:
    where = [
        "--dataset-dir",
        str(tiny_dataset),
        "--stage1-model",
        str(stage1_file("plain")),
        "--output-dir",
        str(tmp_path),
    ]
    train_stage3.main(
        [
            *where,
            "--kind",
            "ab",
            "--seeds",
            "0",
            "1",
            "--use-adapters",
            "--epochs",
            "1",
            "--device",
            "cpu",
        ]
    )
    runs = [tmp_path / "ab" / f"seed{seed}" for seed in (0, 1)]
    assert (
        runs[0].joinpath("adapters.pt").read_bytes() != runs[1].joinpath("adapters.pt").read_bytes()
    )
    for run in runs:
        metrics = read(run / "metrics.json")
        assert metrics["task"] == "ab"
        assert list(metrics["per_class"]) == ["HORZ_A", "HORZ_B", "VERT_A", "VERT_B"]
        assert metrics["parameters"] == {
            "trainable": 124_096 + 2_052,
            "adapters": 124_096,
            "head": 2_052,
        }
        verify_run.main([*where[:4], "--output-dir", str(run), "--device", "cpu"])


def test_stage3_with_misrouted_blocks(adapter_run: Run, tmp_path: Path) -> None:
    arguments = adapter_run[0]
    where = [
        *arguments[:4],
        "--output-dir",
        str(tmp_path),
        "--epochs",
        "1",
        "--device",
        "cpu",
        "--kind",
        "rect",
        "--use-adapters",
    ]
    model = adapt(Cascade(load_stage1(Path(arguments[3]))), STAGE2)
    *_, bias = (
        parameter
        for parameter in model.specialists["stage2"].parameters()
        if parameter.requires_grad
    )
    with torch.no_grad():
        bias.copy_(torch.tensor([0.0, 100.0, 0.0]))  # All are RECT to it.
    save_adapters(model, tmp_path / "stage2.pt", verify=False)
    noisy = ["--noise-injection", "0.1", "--stage2-model", str(tmp_path / "stage2.pt")]
    train_stage3.main([*where, *noisy])
    own = len(read_study_file(Path(arguments[1]) / "train.pt").of(RECT))
    assert read(tmp_path / "rect" / "seed0" / "metrics.json")["blocks"]["train"] == own + round(
        own / 9
    )
    with pytest.raises(TrainingStateError, match="data was"):
        train_stage3.main(where)


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--noise-injection", "1"], "expected 0 <= P < 1"), (["--noise-injection", "nan"], "expected 0 <= P < 1"),
     (["--noise-injection", "0.1"], "needs --stage2-model"), (["--kind", "split"], "invalid choice")],
)  # fmt: skip
def test_stage3_refuses_bad_flags_before_anything_else(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train_stage3.main(["--kind", "ab", "--stage1-model", "absent.pt", *flags])
    assert message in capsys.readouterr().err


def test_misrouted_blocks_get_every_answer() -> None:
    own = TensorDataset(torch.zeros(900, 1, 16, 16), torch.zeros(900, dtype=torch.long))
    strangers = torch.rand(400, 1, 16, 16)
    samples, labels = with_misrouted(own, strangers, 4, 0.25, seed=0).tensors
    assert len(samples) == len(labels) == 1200
    assert torch.equal(samples[:900], own.tensors[0])
    assert torch.equal(labels[:900], own.tensors[1])
    injected = samples[900:].flatten(1)
    assert len(injected.unique(dim=0)) == 300, "each at most once"
    assert (injected[:, None] == strangers.flatten(1)[None, :50]).all(2).any()
    assert labels[900:].bincount(minlength=4).min() > 40
    assert not torch.equal(labels, with_misrouted(own, strangers, 4, 0.25, seed=1).tensors[1])
    with pytest.raises(DatasetError, match=r"400 blocks are misrouted, a share of 0\.5 takes 900"):
        with_misrouted(own, strangers, 4, 0.5, seed=0)


def test_evaluation_beside_the_baseline(
    adapter_run: Run, tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, output = adapter_run
    run, baseline = tmp_path / "run", tmp_path / "baseline"
    shutil.copytree(output, run)
    train_stage2.main([*elsewhere(arguments[:-1], baseline), "--epochs", "1"])
    where = [*arguments[:4], "--device", "cpu", "--output-dir", str(run)]
    capsys.readouterr()
    evaluate.main([*where, "--baseline-dir", str(baseline)])
    result, metrics = read(run / "evaluation.json"), read(run / "metrics.json")
    assert {key: result["run"][key] for key in ("macro_f1", "confusion_matrix", "per_class")} == {
        key: metrics[key] for key in ("macro_f1", "confusion_matrix", "per_class")
    }
    assert result["baseline"]["macro_f1"] == read(baseline / "metrics.json")["macro_f1"]
    columns = [sum(row[k] for row in metrics["confusion_matrix"]) for k in range(3)]
    assert list(result["run"]["predicted"].values()) == columns
    gain = result["run"]["macro_f1"] - result["baseline"]["macro_f1"]
    assert f"Against the frozen baseline: {gain:+.4f} macro-F1" in capsys.readouterr().out
    train_stage3.main(
        [*elsewhere(arguments[:6], tmp_path), "--kind", "rect", "--epochs", "1", "--device", "cpu"]
    )
    with pytest.raises(SystemExit):
        evaluate.main([*where, "--baseline-dir", str(tmp_path / "rect" / "seed0")])
    assert "is not a run of Stage 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ([50, 30, 20], None),
        ([91, 5, 4], "Collapsed: 91.0% of all predictions are SPLIT."),
        ([60, 0, 40], "RECT is never predicted."),
        (
            [0, 0, 7],
            "Collapsed: 100.0% of all predictions are AB. SPLIT, RECT are never predicted.",
        ),
    ],
)
def test_collapse_is_called_out(counts: list[int], said: str | None) -> None:
    assert collapse(torch.tensor(counts), ("SPLIT", "RECT", "AB")) == said


def test_a_terminal_sees_blocks_a_second_and_the_time_left(
    tiny_dataset: Path, stage1_file: Callable[[BackboneKind], Path], tmp_path: Path
) -> None:
    command = [
        sys.executable,
        train_stage2.__file__,
        *options(tiny_dataset, stage1_file("plain"), tmp_path),
        "--use-adapters",
    ]
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    seen = b""
    with subprocess.Popen(command, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        with contextlib.suppress(OSError):  # How the end of a terminal reads on Linux.
            while piece := os.read(ours, 4096):
                seen += piece
    os.close(ours)
    assert process.returncode == 0, seen
    assert re.search(rb"epoch \d/8: +\d+%.*\[\d+:\d+<\d+:\d+, +[\d.]+ blocks/s\]", seen), seen
