"""What a specialist can train.

Adapters with a head on Stage 1's frozen backbone, the head alone, or the whole network.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import TensorDataset

from av1partition.atomic_file import write_atomically
from av1partition.data.inputs import luma
from av1partition.data.tasks import Task
from av1partition.evaluation.metrics import macro_f1
from av1partition.models.cascade import Answers, Cascade, beside_quantizer, head_name
from av1partition.models.shared_front import BehindFront, Front, shared_end
from av1partition.models.specialist_files import NETWORK_FILE
from av1partition.models.stage1_files import load_stage1
from av1partition.training.loop import Trainee, predict_logits
from resadapt import (
    adapter_state_dict,
    adapters_disabled,
    count_parameters,
    load_adapter_state_dict,
    parameter_groups,
    save_adapters,
)

LOGITS_FILE = "best_validation_logits.pt"
PROOF_BLOCKS = 2048
PROBE_BLOCKS = 16


def set_trainee(
    model: nn.Module,
    cascade: Cascade,
    task: Task,
    loss: nn.Module,
    val: TensorDataset,
    file: Path,
    device: torch.device,
    *,
    stage1_file: Path,
    lr_adapter: float,
    lr_head: float,
    weight_decay: float,
) -> Trainee:
    """Train a set, adapters and head or the head alone; its file proves itself at each best epoch.

    Of a head alone the proof compares tensors and outputs only: passes through the backbone for
    each best epoch would take longer than its training.

    Args:
        model: What is trained and asked: the cascade's `Answers`, `BehindFront` of it, or
            `head_on_features`.
        cascade: With the task's set injected, on its device.
        task: What they are trained for.
        loss: From logits and labels to a scalar.
        val: All validation blocks; the proof uses a fixed part of them.
        file: Where the set's file goes.
        device: Where the model is.
        stage1_file: What the model was built from, and is rebuilt from for each proof.
        lr_adapter: Learning rate of the adapters.
        lr_head: Learning rate of the head.
        weight_decay: Of both, on weights only.
    """
    samples, labels = proof_subset(val)
    adapted = count_parameters(cascade).adapters > 0

    def metric(candidate: nn.Module) -> float:
        # Live and reloaded model are measured on the same blocks, or their difference would mean
        # nothing.
        return macro_f1(predict_logits(Answers(candidate, task), samples, device), labels)

    def keep_best(record: dict[str, Any], logits: Tensor) -> None:
        report = save_adapters(
            cascade,
            file,
            probe=samples[:PROBE_BLOCKS].to(device),
            metric=metric if adapted else None,
            tolerance=0.0,
            metadata={"task": task.key, "epoch": record["epoch"], "macro_f1": record["macro_f1"]},
            rebuild=lambda: Cascade(load_stage1(stage1_file)),
        )
        if adapted:
            record["proof"] = {
                "blocks": len(samples),
                "macro_f1_live": report.metric_live,
                "macro_f1_reloaded": report.metric_reloaded,
                "macro_f1_difference": report.metric_difference,
                "checks": {check.name: check.outcome for check in report.checks},
            }
        _save(logits, file.parent / LOGITS_FILE)

    return Trainee(
        model,
        loss,
        AdamW(
            parameter_groups(cascade, lr_adapter, head_lr=lr_head, weight_decay=weight_decay),
            fused=True,
        ),
        capture=lambda: {
            name: tensor.detach().cpu().clone()
            for name, tensor in adapter_state_dict(cascade).items()
        },
        restore=lambda state: load_adapter_state_dict(cascade, state),
        keep_best=keep_best,
    )


def head_on_features(cascade: Cascade, task: Task, *, quantizer: bool) -> nn.Module:
    """A specialist's head behind its dropout, for features that the frozen backbone gave once."""
    return nn.Sequential(nn.Dropout(0.5), cascade.get_submodule(head_name(task, quantizer)))


def network_trainee(
    cascade: Cascade,
    task: Task,
    head: nn.Module,
    loss: nn.Module,
    output: Path,
    *,
    lr_backbone: float,
    lr_head: float,
    weight_decay: float,
) -> Trainee:
    """Train backbone and head, and keep all of them.

    This is the rival of a frozen backbone.

    Args:
        cascade: On its device.
        task: What it is trained for.
        head: The one of its heads that is trained.
        loss: From logits and labels to a scalar.
        output: Where the network's file goes.
        lr_backbone: Learning rate of the backbone.
        lr_head: Learning rate of the head.
        weight_decay: Of all parameters.
    """
    groups = [
        {"params": cascade.backbone.parameters(), "lr": lr_backbone},
        {"params": head.parameters(), "lr": lr_head},
    ]
    optimizer = AdamW(groups, weight_decay=weight_decay, fused=True)

    def state() -> dict[str, Tensor]:
        return {
            name: tensor.detach().cpu().clone() for name, tensor in cascade.state_dict().items()
        }

    def keep_best(_: dict[str, Any], logits: Tensor) -> None:
        _save(state(), output / NETWORK_FILE)
        _save(logits, output / LOGITS_FILE)

    model = Answers(cascade, task)
    return Trainee(
        model, loss, optimizer, capture=state, restore=cascade.load_state_dict, keep_best=keep_best
    )


def frozen_features(
    backbone: nn.Module, data: TensorDataset, device: torch.device, *, quantizer: bool
) -> TensorDataset:
    """The data with its inputs replaced by what a head sees.

    What the backbone, in evaluation mode, makes of them.
    """
    inputs, labels = data.tensors
    features = predict_logits(backbone.to(device), luma(inputs), device)
    return TensorDataset(beside_quantizer(features, inputs) if quantizer else features, labels)


def behind_front(
    cascade: Cascade, task: Task, data: Sequence[TensorDataset], device: torch.device
) -> tuple[nn.Module, list[TensorDataset]]:
    """A specialist from its first adapter on, and the data that it is given there.

    The frozen part before the adapter makes them once, in evaluation mode.

    Args:
        cascade: With the task's set active and no other, on its device.
        task: The specialist's.
        data: Inputs and class numbers.
        device: Where to compute.
    """
    end = shared_end(cascade)
    with adapters_disabled(cascade):
        made = [
            TensorDataset(
                predict_logits(Front(cascade, end), each.tensors[0], device), each.tensors[1]
            )
            for each in data
        ]
    return BehindFront(cascade, task, task.key, end), made


def proof_subset(val: TensorDataset) -> tuple[Tensor, Tensor]:
    """The same few validation blocks and labels for every proof of every run."""
    generator = torch.Generator().manual_seed(0)
    index = torch.randperm(len(val), generator=generator)[:PROOF_BLOCKS]
    samples, labels = val.tensors
    return samples[index], labels[index]


def _save(content: object, path: Path) -> None:
    write_atomically(path, lambda file: torch.save(content, file))
