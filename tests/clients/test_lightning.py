"""Lightning: its training loop, checkpoints and averaged weights, around an injected model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from roundtrip import (
    LABELS,
    assert_same_outputs,
    save_and_reload,
    seeded,
    small_backbone,
    small_images,
)
from support import private
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

import resadapt

lightning = pytest.importorskip("lightning")
callbacks = pytest.importorskip("lightning.pytorch.callbacks")

X = small_images()

pytestmark = pytest.mark.filterwarnings("ignore:.*(num_workers|deprecated|log_every_n_steps|resum)")


class Classifier(lightning.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.model(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(resadapt.parameter_groups(self.model, 1e-2))


def classifier(backbone: nn.Module | None = None) -> Any:
    return Classifier(
        resadapt.inject_adapters(backbone or small_backbone(), "layer*", 8, head="fc")
    )


def fit(module: Any, epochs: int, folder: Path, *given: Any, resume: Path | None = None) -> Any:
    """Trains three steps an epoch."""
    data = DataLoader(TensorDataset(X.repeat(3, 1, 1, 1), LABELS.repeat(3)), batch_size=len(X))
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(given),
    )
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    assert trainer.global_step == 3 * epochs
    return trainer


def test_sync_batchnorm_is_told_at_the_first_step() -> None:
    """Trainer converts the norms when the training starts; DDP with them needs a GPU."""
    plugins = pytest.importorskip("lightning.pytorch.plugins")
    module = plugins.TorchSyncBatchNorm().apply(classifier())
    with pytest.raises(
        resadapt.InjectionError,
        match=r"'bn1'.* were replaced after the injection.*Lightning: sync_batchnorm=True",
    ):
        module.train().training_step([X, LABELS], 0)
    early = classifier(nn.SyncBatchNorm.convert_sync_batchnorm(small_backbone()))
    early.train().training_step([X, LABELS], 0).backward()
    assert resadapt.check_backbone(early.model).ok


def test_a_module_that_trainer_fitted_comes_back_bit_for_bit(path: Path) -> None:
    module = classifier()
    before = resadapt.adapter_state_dict(module.model)
    fit(module, 1, path.parent)
    assert not any(
        torch.equal(value, before[key])
        for key, value in resadapt.adapter_state_dict(module.model).items()
    )
    save_and_reload(module.model, small_backbone, path, X)
    with pytest.raises(resadapt.InjectionError, match=r"pass model.get_submodule\('model'\)"):
        resadapt.save_adapters(module, path)


def test_training_that_is_resumed_from_a_checkpoint_comes_to_the_same_file(path: Path) -> None:
    seeds = lightning.seed_everything
    seeds(0, verbose=False)
    whole = classifier()
    checkpoint = path.with_name("half.ckpt")
    fit(whole, 1, path.parent).save_checkpoint(checkpoint)
    seeds(1, verbose=False)
    fit(whole, 2, path.parent, resume=checkpoint)
    seeds(0, verbose=False)
    resumed = classifier()
    seeds(1, verbose=False)
    fit(resumed, 2, path.parent, resume=checkpoint)
    assert resadapt.check_backbone(resumed.model).ok
    assert_same_outputs(resumed.model, whole.model, X)
    save_and_reload(resumed.model, small_backbone, path, X)


def test_a_full_checkpoint_in_a_skeleton_asks_to_accept_its_backbone(path: Path) -> None:
    """The skeleton is built without the weights: all of them come from the checkpoint."""
    trained = classifier()
    checkpoint = path.with_name("all.ckpt")
    fit(trained, 1, path.parent).save_checkpoint(checkpoint)
    skeleton = classifier(resnet18(num_classes=3))
    skeleton.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    with pytest.raises(resadapt.BackboneDriftError, match=r"accept_backbone\(model\)"):
        resadapt.save_adapters(skeleton.model, path, rebuild=small_backbone)
    resadapt.accept_backbone(skeleton.model)
    reloaded = save_and_reload(skeleton.model, small_backbone, path, X)
    assert_same_outputs(reloaded, trained.model, X)


class Recorder(callbacks.Callback):  # type: ignore[misc, name-defined]
    """The average of the bias of the set's head, by hand."""

    average: Tensor | None = None

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        bias = private(module.model, "fc").bias.detach()
        self.average = (
            bias.clone() if self.average is None else 0.5 * self.average + (1 - 0.5) * bias
        )


def test_averaged_weights_end_in_a_verified_file(path: Path) -> None:
    """At the end Lightning puts the average, rounded backbone and all, into the model itself."""
    module = classifier()
    recorder = Recorder()
    fit(module, 1, path.parent, recorder, callbacks.EMAWeightAveraging(decay=0.5))
    average = resadapt.adapter_state_dict(module.model)
    torch.testing.assert_close(average["head.fc.bias"], recorder.average)
    fresh = resadapt.inject_adapters(small_backbone(), "layer*", 8, head="fc")
    resadapt.load_adapter_state_dict(fresh, average)
    reloaded = save_and_reload(fresh, small_backbone, path, X)
    assert all(
        torch.equal(value, average[key])
        for key, value in resadapt.adapter_state_dict(reloaded).items()
    )


def test_averaged_weights_whose_backbone_was_rounded_are_refused_with_the_way_out(
    path: Path,
) -> None:
    module = classifier(seeded(lambda: resnet18(num_classes=3))())
    fit(module, 1, path.parent, callbacks.EMAWeightAveraging(decay=0.9))
    with pytest.raises(resadapt.BackboneDriftError, match=r"average of models"):
        resadapt.save_adapters(module.model, path)


def test_its_freezing_callback_makes_no_other_backbone(path: Path) -> None:
    """`BackboneFinetuning` switches the tracking of frozen norms off, which evaluation ignores."""
    freeze = callbacks.BackboneFinetuning.freeze
    model = resadapt.inject_adapters(small_backbone(), "layer*", 8, head="fc")
    freeze(model.layer1, train_bn=False)
    assert not model.layer1[0].bn1.track_running_stats
    assert resadapt.check_backbone(model).ok
    save_and_reload(model, small_backbone, path, X)
    frozen = small_backbone()
    freeze(frozen, train_bn=False)
    assert_same_outputs(resadapt.load_adapters(frozen, path), model, X)
