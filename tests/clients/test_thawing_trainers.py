"""Trainers that set requires_grad by themselves: told at the next training forward, and mended.

fastai and Ultralytics are not installed here. Their part is played by loops that set the flags as
their code does, read in fastai 2.8 and Ultralytics 8.3.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import images, small_net
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, TensorDataset

import resadapt

X = images(4, 8)
THAWED = "The backbone is not frozen any more: "
FROZEN = "Set 'default': none of its parameters requires a gradient any more"


def injected() -> Any:
    return resadapt.inject_adapters(small_net(), "c2", 2, head="head")


def told(run: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(each.message) for each in caught if each.category is resadapt.AdapterWarning]


def as_fastai_freezes(model: nn.Module, groups: list[nn.Module], first: int) -> None:
    """`Learner.freeze_to`: groups from the first on are trained, norms with affine weights always.

    `freeze` trains the last group, and `unfreeze` all: `fine_tune` calls one after the other.
    """
    norms = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        for parameter in module.parameters()
    }
    for number, group in enumerate(groups):
        for parameter in group.parameters():
            parameter.requires_grad_(number >= first or id(parameter) in norms)


def as_ultralytics_thaws(model: nn.Module) -> None:
    """`BaseTrainer._setup_train`: what its setting `freeze` does not name is trained."""
    for name, parameter in model.named_parameters():
        if ".dfl" in name:
            parameter.requires_grad = False
        elif not parameter.requires_grad and parameter.dtype.is_floating_point:
            parameter.requires_grad = True


def test_fastais_fine_tune_is_told_when_it_freezes_and_when_it_thaws(tmp_path: Path) -> None:
    model = injected().train()
    groups = [model.conv, model.bn, nn.ModuleList([model.c2, model.head])]
    assert told(lambda: model(X)) == []
    as_fastai_freezes(model, groups, 2)
    (message,) = told(lambda: model(X))
    assert message.startswith(f"{THAWED}'bn.weight', 'bn.bias', 'c2.weight'")
    resadapt.set_active_adapters(model, "default")
    assert told(lambda: model(X)) == []
    as_fastai_freezes(model, groups, 0)
    (message,) = told(lambda: model(X))
    assert message.startswith(f"{THAWED}'conv.weight'")
    resadapt.set_active_adapters(model, "default")
    assert told(lambda: model(X)) == []
    assert resadapt.save_adapters(model, tmp_path / "set.pt").ok


def test_ultralytics_trainer_is_told_at_its_first_forward_and_mended(tmp_path: Path) -> None:
    model = injected().train()
    as_ultralytics_thaws(model)
    (message,) = told(lambda: model(X))
    assert message.startswith(f"{THAWED}'conv.weight'")
    resadapt.set_active_adapters(model, "default")  # in its callback on_pretrain_routine_end
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    assert told(lambda: model(X).sum().backward()) == []
    optimizer.step()
    assert resadapt.save_adapters(model, tmp_path / "set.pt").ok


@pytest.mark.parametrize("heal", [False, True])
@pytest.mark.filterwarnings("ignore:.*(num_workers|log_every_n_steps|no validation|LeafSpec)")
def test_lightnings_backbone_finetuning(heal: bool, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    optimizing = pytest.importorskip("lightning.pytorch")

    class Module(optimizing.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.backbone = injected()
            self.scale = nn.Parameter(torch.ones(()))

        def on_train_epoch_start(self) -> None:  # after the callbacks
            if heal:
                resadapt.set_active_adapters(self.backbone, "default")

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return (self.backbone(batch[0]) * self.scale).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            parameters = [*resadapt.trainable_parameters(self.backbone), self.scale]
            return torch.optim.SGD(parameters, lr=0.1)

    module = Module()
    finetuning = callbacks.BackboneFinetuning(unfreeze_backbone_at_epoch=1)
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[finetuning],
    )
    messages = told(lambda: trainer.fit(module, DataLoader(TensorDataset(X), batch_size=2)))
    if heal:
        assert messages == []
        assert resadapt.save_adapters(module.backbone, tmp_path / "set.pt").ok
        return
    found = [message[: len(start)] for message in messages for start in (FROZEN, THAWED)]
    # It freezes the set and thaws the norms at once, and thaws all after an epoch.
    assert [text for text in found if text in (FROZEN, THAWED)] == [FROZEN, THAWED]
    assert "'bn.weight', 'bn.bias' require" in messages[1]
    with pytest.raises(resadapt.BackboneDriftError, match=r"call set_active_adapters\(model, name"):
        resadapt.save_adapters(module.backbone, tmp_path / "set.pt")
