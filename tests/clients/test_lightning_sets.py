"""Lightning around a model with many sets: a checkpoint holds all, whichever is active."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from many_sets import (
    X,
    assert_all_sets_give,
    assert_same_sets,
    assert_the_file_gives,
    kept_sets,
    moved_sets,
    optimizer_of_all_sets,
    outputs_of_all,
    with_many_sets,
)
from roundtrip import LABELS
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import resadapt

lightning = pytest.importorskip("lightning")
callbacks = pytest.importorskip("lightning.pytorch.callbacks")

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(num_workers|deprecated|log_every_n_steps|resum|is not empty|dirpath has changed)"
)


class OneSet(lightning.LightningModule):  # type: ignore[misc, name-defined]
    """Trains the set that is active."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.model(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(resadapt.parameter_groups(self.model, 1e-3))


class SetsInTurn(OneSet):
    """Trains two sets batch by batch in turn, and other two in the second epoch."""

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        pair = ("wide", "affine") if self.current_epoch == 0 else ("stats", "wide")
        resadapt.set_active_adapters(self.model, pair[index % 2])
        return super().training_step(batch, index)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return optimizer_of_all_sets(self.model, "equal")


def fit(module: Any, epochs: int, folder: Path, resume: Path | None = None) -> None:
    """Trains three steps an epoch, with a checkpoint after each epoch."""
    data = DataLoader(TensorDataset(X.repeat(3, 1, 1, 1), LABELS.repeat(3)), batch_size=len(X))
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)],
    )
    trainer.fit(module.train(), data, ckpt_path=resume, weights_only=True)
    assert trainer.global_step == 3 * epochs


@pytest.mark.parametrize(
    ("trained", "other"),
    [("equal", "wide"), ("wide", "stats"), ("affine", "headonly"), ("stats", "affine")],
)
def test_a_checkpoint_holds_every_set_and_training_goes_on_from_it(
    trained: str, other: str, tmp_path: Path
) -> None:
    whole = OneSet(with_many_sets(1, trained))
    before = kept_sets(whole.model)
    fit(whole, 2, tmp_path / "whole")
    assert moved_sets(whole.model, before) == {trained}

    half = tmp_path / "whole" / "epoch=0.ckpt"
    resumed = OneSet(with_many_sets(2, trained))
    fit(resumed, 2, tmp_path / "resumed", half)
    assert_same_sets(resumed.model, whole.model)

    # Read where another set is active, and trained on after a switch.
    elsewhere = OneSet.load_from_checkpoint(half, model=with_many_sets(3, other), weights_only=True)
    assert moved_sets(elsewhere.model, before) == {trained}
    assert resadapt.check_backbone(elsewhere.model).ok
    resadapt.set_active_adapters(elsewhere.model, trained)
    fit(elsewhere, 2, tmp_path / "elsewhere", half)
    assert_same_sets(elsewhere.model, whole.model)
    for name in (trained, other):
        assert_the_file_gives(elsewhere.model, name, tmp_path / f"{name}.pt")


def test_the_last_checkpoint_gives_the_outputs_of_every_set(tmp_path: Path) -> None:
    whole = OneSet(with_many_sets(1, "stats"))
    fit(whole, 1, tmp_path)
    expected = outputs_of_all(whole.model)
    for active in (None, "wide", "affine", "stats"):
        read = OneSet.load_from_checkpoint(
            tmp_path / "epoch=0.ckpt", model=with_many_sets(2, active), weights_only=True
        )
        assert_all_sets_give(read.model, expected)


def test_one_optimizer_for_all_sets_resumes(tmp_path: Path) -> None:
    whole = SetsInTurn(with_many_sets(1, "equal"))
    before = kept_sets(whole.model)
    fit(whole, 2, tmp_path / "whole")
    assert moved_sets(whole.model, before) == {"wide", "affine", "stats"}
    for active in ("headonly", "affine"):
        resumed = SetsInTurn(with_many_sets(2, active))
        fit(resumed, 2, tmp_path / active, tmp_path / "whole" / "epoch=0.ckpt")
        assert_same_sets(resumed.model, whole.model)
