"""Accelerate around a model with many sets: checkpoints hold all, offloaded ones are switched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from many_sets import (
    SETS,
    X,
    assert_all_sets_give,
    assert_same_sets,
    assert_the_file_gives,
    kept_sets,
    moved_sets,
    optimizer_of_all_sets,
    outputs_of_all,
    tiny_backbone,
    with_many_sets,
)
from roundtrip import LABELS
from support import private
from torch import nn

import resadapt

accelerate = pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def _one_accelerator_a_test() -> Iterator[None]:
    """Its state is one of the process."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


class Training:
    """A prepared model and the optimizer of one of its sets, or of all."""

    def __init__(self, seed: int, trained: str | None, active: str, model: Any = None) -> None:
        self.accelerator = accelerate.Accelerator(cpu=True)
        model = model or with_many_sets(seed, trained, dropout=0.1)
        if trained is None:
            optimizer = optimizer_of_all_sets(model, active)
        else:
            optimizer = torch.optim.AdamW(resadapt.parameter_groups(model, 1e-3))
        resadapt.set_active_adapters(model, active)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)

    def train(self, *names: str) -> None:
        """Makes a step with each of some sets in turn."""
        self.model.train()
        for name in names:
            resadapt.set_active_adapters(self.model, name)
            self.optimizer.zero_grad()
            self.accelerator.backward(nn.functional.cross_entropy(self.model(X), LABELS))
            self.optimizer.step()


@pytest.mark.parametrize(
    ("trained", "other", "safe"),
    [
        ("equal", "wide", True),
        ("wide", "stats", False),
        ("affine", "headonly", False),
        ("stats", "affine", True),
    ],
)
def test_its_checkpoints_hold_every_set_and_training_goes_on(
    trained: str, other: str, safe: bool, tmp_path: Path
) -> None:
    """Dropout too: Accelerate keeps the state of the random numbers."""
    whole = Training(1, trained, trained)
    before = kept_sets(whole.model)
    whole.train(trained, trained)
    whole.accelerator.save_state(tmp_path / "half", safe_serialization=safe)
    expected = outputs_of_all(whole.model)
    whole.train(trained, trained)
    assert moved_sets(whole.model, before) == {trained}

    resumed = Training(2, trained, other)
    resumed.accelerator.load_state(tmp_path / "half")
    assert_all_sets_give(resumed.model, expected)
    assert [info.name for info in resadapt.list_adapters(resumed.model) if info.active] == [other]
    resumed.train(trained, trained)
    assert_same_sets(resumed.model, whole.model)
    for name in (trained, other):
        assert_the_file_gives(
            resumed.accelerator.unwrap_model(resumed.model), name, tmp_path / f"{name}.pt"
        )


@pytest.mark.parametrize("active", ["headonly", "affine"])
def test_one_optimizer_for_all_sets_resumes(active: str, tmp_path: Path) -> None:
    whole = Training(1, None, "equal")
    before = kept_sets(whole.model)
    whole.train("wide", "affine", "wide")
    assert moved_sets(whole.model, before) == {"wide", "affine"}
    whole.accelerator.save_state(tmp_path / "half")
    whole.train("stats", "wide", "equal")

    resumed = Training(2, None, active)
    resumed.accelerator.load_state(tmp_path / "half")
    resumed.train("stats", "wide", "equal")
    assert_same_sets(resumed.model, whole.model)
    assert moved_sets(resumed.model, before) == {"wide", "affine", "stats", "equal"}


def leave_backbones_out(accelerator: Any) -> None:
    """As in docs/frameworks.md."""

    def save(models: list[Any], weights: list[Any], folder: str) -> None:
        states = [resadapt.training_state_dict(model) for model in models]
        if accelerator.is_main_process:
            torch.save(states, Path(folder) / "adapters.pt")
        weights.clear()

    def load(models: list[Any], folder: str) -> None:
        states = torch.load(Path(folder) / "adapters.pt", weights_only=True)
        for model, state in zip(models, states, strict=True):
            resadapt.load_training_state_dict(model, state)
        models.clear()

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def test_checkpoints_without_the_backbone_resume_bit_for_bit(tmp_path: Path) -> None:
    whole, sizes = Training(1, "stats", "stats"), []
    whole.train("stats", "stats")
    for folder in ("full", "small"):
        whole.accelerator.save_state(tmp_path / folder)
        sizes.append(sum(file.stat().st_size for file in (tmp_path / folder).iterdir()))
        leave_backbones_out(whole.accelerator)
    expected = outputs_of_all(whole.model)
    assert sizes[1] < sizes[0] - sum(t.nbytes for t in tiny_backbone().state_dict().values()) / 1.01
    whole.train("stats", "stats")

    resumed = Training(2, "stats", "affine")
    leave_backbones_out(resumed.accelerator)
    resumed.accelerator.load_state(tmp_path / "small")
    assert_all_sets_give(resumed.model, expected)
    assert [info.name for info in resadapt.list_adapters(resumed.model) if info.active] == ["stats"]
    resumed.train("stats", "stats")
    assert_same_sets(resumed.model, whole.model)

    other = with_many_sets(2, "stats", dropout=0.1)
    nn.init.ones_(other.conv1.weight)
    other = Training(2, "stats", "affine", other)
    leave_backbones_out(other.accelerator)
    before = kept_sets(other.model)
    with pytest.raises(resadapt.BackboneMismatchError, match=r"'conv1\.weight' has other values"):
        other.accelerator.load_state(tmp_path / "small")
    assert moved_sets(other.model, before) == set()


def offloaded(model: Any, way: str, folder: Path) -> Any:
    if way == "cpu_offload":
        return accelerate.cpu_offload(model, execution_device="cpu")
    if way == "cpu_offload with buffers":
        return accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)
    if way == "disk_offload":
        return accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"))
    where = {
        name: "disk" if name in ("bn1", "layer4", "fc") else "cpu"
        for name, _ in model.named_children()
    }
    if way == "dispatch_model on the CPU":
        where = dict.fromkeys(where, "cpu")
    return accelerate.dispatch_model(
        model, where, main_device="cpu", offload_dir=folder, force_hooks=True
    )


WAYS = (
    "cpu_offload",
    "cpu_offload with buffers",
    "disk_offload",
    "dispatch_model on the CPU",
    "dispatch_model with disk",
)


@pytest.mark.parametrize("way", WAYS)
def test_sets_are_switched_on_an_offloaded_model(way: str, tmp_path: Path) -> None:
    expected = outputs_of_all(with_many_sets(1, "wide"))
    model = offloaded(with_many_sets(1, "wide"), way, tmp_path).eval()
    for _ in range(2):
        for name, output in outputs_of_all(model).items():
            assert torch.equal(output, expected[name]), name
    with torch.no_grad(), resadapt.adapters_disabled(model):
        assert torch.equal(model(X), expected[None])
    with (
        torch.no_grad(),
        resadapt.adapters_for(model, ["stats", "wide", None, "headonly"]) as mixed,
    ):
        rows = mixed(X)
    for row, name, number in zip(
        rows, ("stats", "wide", None, "headonly"), range(len(X)), strict=True
    ):
        torch.testing.assert_close(row, expected[name][number])


def test_sets_that_are_switched_while_offloaded_are_whole_when_brought_back(tmp_path: Path) -> None:
    expected = outputs_of_all(with_many_sets(1, "wide"))
    model = accelerate.cpu_offload(with_many_sets(1, "wide"), execution_device="cpu")
    resadapt.set_active_adapters(model, "affine")
    accelerate.hooks.remove_hook_from_submodules(model)
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trains == {
        name for name, _ in resadapt.named_trainable_parameters(with_many_sets(1, "affine"))
    }
    assert_all_sets_give(model, expected)
    for name in SETS:
        assert_the_file_gives(model, name, tmp_path / f"{name}.pt")


@pytest.mark.parametrize("name", SETS)
def test_an_offloaded_set_is_not_saved_whether_it_is_active_or_not(
    name: str, tmp_path: Path
) -> None:
    model = accelerate.cpu_offload(with_many_sets(1, "wide"), execution_device="cpu")
    with pytest.raises(
        resadapt.AdapterError,
        match=rf"set '{name}'.*offloaded",
    ):
        resadapt.save_adapters(model, tmp_path / "set.pt", name=name)
    with pytest.raises(resadapt.AdapterError, match=r"offload"):
        resadapt.adapter_state_dict(model, name)
    assert not (tmp_path / "set.pt").exists()


@pytest.mark.parametrize("offload", [False, True])
def test_a_model_that_accelerate_saves_is_loaded_with_every_set(
    offload: bool, tmp_path: Path
) -> None:
    """Of an offloaded model too, whose tensors Accelerate gathers one by one."""
    model = with_many_sets(1, "wide")
    expected = outputs_of_all(model)
    if offload:
        accelerate.cpu_offload(model, execution_device="cpu")
    accelerate.Accelerator(cpu=True).save_model(model, tmp_path, max_shard_size="5MB")
    other = with_many_sets(2, "stats", dropout=0.1)
    accelerate.load_checkpoint_in_model(other, tmp_path, strict=True)
    assert_all_sets_give(other, expected)


def test_a_checkpoint_is_spread_over_memory_and_disk_with_every_set(tmp_path: Path) -> None:
    model = with_many_sets(1, "wide")
    accelerate.Accelerator(cpu=True).save_model(model, tmp_path)
    where = {"layer4": "disk", "fc": "disk"} | dict.fromkeys(
        ("conv1", "bn1", "layer1", "layer2", "layer3"), "cpu"
    )
    # Without offload_buffers Accelerate does not read the statistics of what is on disk,
    # of a plain ResNet neither.
    dispatched = accelerate.load_checkpoint_and_dispatch(
        with_many_sets(2, "affine"),
        tmp_path,
        where,
        offload_folder=tmp_path / "disk",
        offload_buffers=True,
        strict=True,
    )
    expected = outputs_of_all(model)
    for name, output in outputs_of_all(dispatched).items():
        assert torch.equal(output, expected[name]), name


@pytest.mark.parametrize("way", WAYS[2:4])
@pytest.mark.parametrize("keep_head", [False, True])
def test_sets_that_are_removed_from_a_model_with_hooks_leave_the_backbone(
    way: str, keep_head: bool, tmp_path: Path
) -> None:
    """Accelerate holds on to the forward that each module had.

    A refusal that tells of offloading would be right too.
    """
    plain, model = tiny_backbone(), with_many_sets(1, "stats")
    if keep_head:
        plain.fc.load_state_dict(private(model, "fc", "stats").state_dict())
        for name in SETS.keys() - {"stats"}:
            resadapt.remove_adapters(model, name)
    model = offloaded(model.eval(), way, tmp_path)
    try:
        resadapt.remove_adapters(model, keep_head=keep_head)
    except resadapt.AdapterError as error:
        assert "offload" in str(error)
        return
    with torch.no_grad():
        assert torch.equal(model.eval()(X), plain.eval()(X))
        accelerate.hooks.remove_hook_from_submodules(model)
        assert torch.equal(model(X), plain(X))
        model.train()(X)
    assert not torch.equal(model.bn1.running_mean, plain.bn1.running_mean)
