"""transformers' Trainer on a transformers ResNet: whole checkpoints, and small ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from roundtrip import LABELS, seeded, small_images
from torch import nn

import resadapt

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

X = small_images(16)


@seeded
def resnet() -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 32, 64],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        num_labels=3,
    )
    return transformers.ResNetForImageClassification(config)


class AdapterTrainer(transformers.Trainer):  # type: ignore[misc, name-defined]
    """Checkpoints without the backbone, as in docs/frameworks.md."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        state = resadapt.training_state_dict(self.model)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(state, folder / "adapters.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        path = Path(resume_from_checkpoint, "adapters.pt")
        state = torch.load(path, map_location="cpu", weights_only=True)
        resadapt.load_training_state_dict(self.model, state)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def injected(seed: int, backbone: Any = None) -> Any:
    torch.manual_seed(seed)
    backbone = backbone or resnet()
    return resadapt.inject_adapters(
        backbone, "resnet.encoder.stages.*", 4, head="classifier", dropout=0.5
    )


def trainer_of(kind: Any, model: Any, folder: Path, **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        **options,
    )
    data = [{"pixel_values": x, "labels": y} for x, y in zip(X, LABELS, strict=True)]
    optimizer = torch.optim.AdamW(resadapt.parameter_groups(model, 1e-2))
    return kind(
        model, arguments, train_dataset=data, eval_dataset=data, optimizers=(optimizer, None)
    )


@pytest.mark.parametrize("kind", [transformers.Trainer, AdapterTrainer])
def test_training_resumes_bit_for_bit(kind: Any, tmp_path: Path) -> None:
    whole, resumed = injected(0), injected(1)
    first = trainer_of(kind, whole, tmp_path)
    first.train()
    second = trainer_of(kind, resumed, tmp_path)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    one, other = (resadapt.adapter_state_dict(model) for model in (whole, resumed))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert first.state.best_model_checkpoint == second.state.best_model_checkpoint
    assert resadapt.check_backbone(resumed).ok

    second.save_model(str(tmp_path / "last"))
    backbone = sum(tensor.nbytes for tensor in resnet().state_dict().values())
    kept = sum(file.stat().st_size for file in (tmp_path / "last").iterdir())
    assert (kept < backbone) is (kind is AdapterTrainer)

    report = resadapt.save_adapters(resumed, tmp_path / "set.pt", probe=X, rebuild=resnet)
    assert report.ok, report
    loaded = resadapt.load_adapters(resnet(), tmp_path / "set.pt")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(X).logits, resumed.eval()(X).logits)


def test_another_backbone_is_refused(tmp_path: Path) -> None:
    trainer_of(AdapterTrainer, injected(0), tmp_path).train()
    backbone = resnet()
    nn.init.ones_(backbone.resnet.embedder.embedder.convolution.weight)
    trainer = trainer_of(AdapterTrainer, injected(1, backbone), tmp_path)
    with pytest.raises(
        resadapt.BackboneMismatchError, match=r"convolution\.weight' has other values"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
