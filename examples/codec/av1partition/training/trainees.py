"""The two things a specialist can train on Stage 1's frozen backbone: adapters with a head, or the head alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import TensorDataset

from av1partition.atomic_file import write_atomically
from av1partition.data.tasks import Task
from av1partition.evaluation.metrics import macro_f1
from av1partition.models.cascade import Answers, Cascade
from av1partition.models.stage1_files import load_stage1
from av1partition.training.loop import Trainee, predict_logits
from resadapt import (
    adapter_state_dict,
    load_adapter_state_dict,
    load_adapters,
    parameter_groups,
    save_adapters,
)

ADAPTER_FILE = "adapters.pt"
HEAD_FILE = "head.pt"
LOGITS_FILE = "best_validation_logits.pt"
WEIGHT_DECAY = 1e-4
PROOF_BLOCKS = 2048
PROBE_BLOCKS = 16


def adapter_trainee(
    cascade: Cascade,
    task: Task,
    loss: nn.Module,
    val: TensorDataset,
    output: Path,
    device: torch.device,
    *,
    stage1_file: Path,
    lr_adapter: float,
    lr_head: float,
) -> Trainee:
    """Train adapters and head inside the model; the adapter file proves itself at each best epoch.

    Args:
        cascade: With the task's adapters injected, on its device.
        task: What they are trained for.
        loss: From logits and labels to a scalar.
        val: All validation blocks; the proof uses a fixed part of them.
        output: Where the adapter file goes.
        device: Where the model is.
        stage1_file: What the model was built from, and is rebuilt from for each proof.
        lr_adapter: Learning rate of the adapters.
        lr_head: Learning rate of the head.
    """
    samples, labels = proof_subset(val)

    def metric(candidate: nn.Module) -> float:
        # Live and reloaded model are measured on the same blocks, or their difference would mean nothing.
        return macro_f1(predict_logits(Answers(candidate, task), samples, device), labels)

    def keep_best(record: dict[str, Any], logits: Tensor) -> None:
        report = save_adapters(
            cascade,
            output / ADAPTER_FILE,
            probe=samples[:PROBE_BLOCKS].to(device),
            metric=metric,
            tolerance=0.0,
            metadata={"task": task.key, "epoch": record["epoch"], "macro_f1": record["macro_f1"]},
            rebuild=lambda: Cascade(load_stage1(stage1_file)),
        )
        record["proof"] = {
            "blocks": len(samples),
            "macro_f1_live": report.metric_live,
            "macro_f1_reloaded": report.metric_reloaded,
            "macro_f1_difference": report.metric_difference,
            "checks": {check.name: check.outcome for check in report.checks},
        }
        _save_logits(output, logits)

    return Trainee(
        Answers(cascade, task),
        loss,
        AdamW(parameter_groups(cascade, lr_adapter, head_lr=lr_head, weight_decay=WEIGHT_DECAY)),
        capture=lambda: {name: tensor.detach().cpu().clone() for name, tensor in adapter_state_dict(cascade).items()},
        restore=lambda state: load_adapter_state_dict(cascade, state),
        keep_best=keep_best,
    )


def head_trainee(head: nn.Module, loss: nn.Module, output: Path, *, lr_head: float) -> Trainee:
    """Train the head alone, on features that the frozen backbone gave once.

    The backbone does not take part in the training at all, so nothing of it can move: neither weights
    nor BatchNorm statistics.

    Args:
        head: Linear, from features to logits, on its device.
        loss: From logits and labels to a scalar.
        output: Where the head's file goes.
        lr_head: Learning rate.
    """

    def keep_best(record: dict[str, Any], logits: Tensor) -> None:
        state = {name: tensor.detach().cpu() for name, tensor in head.state_dict().items()}
        write_atomically(output / HEAD_FILE, lambda file: torch.save(state, file))
        _save_logits(output, logits)

    return Trainee(
        nn.Sequential(nn.Dropout(0.5), head),
        loss,
        AdamW(head.parameters(), lr=lr_head, weight_decay=WEIGHT_DECAY),
        capture=lambda: {name: tensor.detach().cpu().clone() for name, tensor in head.state_dict().items()},
        restore=head.load_state_dict,
        keep_best=keep_best,
    )


def frozen_features(backbone: nn.Module, data: TensorDataset, device: torch.device) -> TensorDataset:
    """The data with its blocks replaced by what the backbone, in evaluation mode, makes of them."""
    samples, labels = data.tensors
    return TensorDataset(predict_logits(backbone.to(device), samples, device), labels)


def proof_subset(val: TensorDataset) -> tuple[Tensor, Tensor]:
    """The same few validation blocks and labels for every proof of every run."""
    generator = torch.Generator().manual_seed(0)
    index = torch.randperm(len(val), generator=generator)[:PROOF_BLOCKS]
    samples, labels = val.tensors
    return samples[index], labels[index]


def reload_specialist(stage1_file: Path, task: Task, output: Path) -> Answers:
    """Build the model of a finished run from its files alone: Stage 1's and the adapters' or the head's."""
    cascade = Cascade(load_stage1(stage1_file))
    if (output / ADAPTER_FILE).exists():
        return Answers(load_adapters(cascade, output / ADAPTER_FILE), task)
    cascade.specialists.get_submodule(task.key).load_state_dict(torch.load(output / HEAD_FILE, weights_only=True))
    return Answers(cascade, task)


def _save_logits(output: Path, logits: Tensor) -> None:
    write_atomically(output / LOGITS_FILE, lambda file: torch.save(logits, file))
