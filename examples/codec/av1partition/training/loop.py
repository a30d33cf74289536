"""The training loop of both stages: seeded, resumable, best model by macro-F1."""

from __future__ import annotations

import argparse
import copy
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from sklearn.metrics import accuracy_score
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from av1partition import accept
from av1partition.data.blocks import DATA_DIR
from av1partition.evaluation.metrics import classes_of, macro_f1
from av1partition.training.small_maps import SmallMaps
from av1partition.training.state import Config, TrainingState, load_state, save_state

LOWEST_LR = 1e-6
EVALUATION_BATCH = 1024

log = logging.getLogger("av1partition")


class BatchSizeError(ValueError):
    """The model cannot be trained with batches of this size."""


ONE_BLOCK = (
    "--batch-size is 1, but a BatchNorm in training needs two or more values a channel, and the "
    "last stages make one of a block; pass --batch-size 2 or more"
)


@dataclass(frozen=True)
class Schedule:
    """How long and in which portions to train.

    Attributes:
        epochs: Passes over the training data.
        batch_size: Blocks in a step.
        seed: Of the order of the blocks and of dropout.
        device: Where to compute.
        num_workers: Processes that prepare batches; 0 prepares them in this one.
        augment: Makes of a training batch another, inputs and labels.
    """

    epochs: int
    batch_size: int
    seed: int
    device: torch.device
    num_workers: int
    augment: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None


@dataclass(frozen=True)
class Trainee:
    """A model and what a run needs to know of it.

    Attributes:
        model: From blocks to logits [N, K]; a single logit means class 1 against class 0.
        loss: From logits and labels to a scalar.
        optimizer: Over what is trained.
        capture: Copies of the tensors that training changes.
        restore: Puts such copies back.
        keep_best: Called at each new best macro-F1 with the epoch's record, to which it may add,
            and the validation logits.
    """

    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: Optimizer
    capture: Callable[[], dict[str, Tensor]]
    restore: Callable[[dict[str, Tensor]], object]
    keep_best: Callable[[dict[str, Any], Tensor], None]


def fit(
    trainee: Trainee,
    train: TensorDataset,
    val: TensorDataset,
    schedule: Schedule,
    *,
    state_file: Path,
    config: Config,
) -> list[dict[str, Any]]:
    """Train, or go on where an interrupted run stopped; the end is the same to the last bit.

    Args:
        trainee: What to train.
        train: Blocks and labels.
        val: Blocks and labels.
        schedule: How.
        state_file: Written after each epoch.
        config: All that decides the outcome; a state written with another one is refused.

    Returns:
        One record for each epoch: losses, accuracy, macro-F1, learning rates.

    Raises:
        BatchSizeError: A batch is one block, and a BatchNorm needs more.
        TrainingStateError: ``state_file`` is damaged or belongs to another run.
    """
    if schedule.batch_size == 1:
        _try_one_block(trainee.model, train, schedule.device)
    scheduler = CosineAnnealingLR(trainee.optimizer, T_max=schedule.epochs, eta_min=LOWEST_LR)
    history: list[dict[str, Any]] = []
    if state := load_state(state_file, config):
        trainee.restore(state.trained)
        trainee.optimizer.load_state_dict(state.optimizer)
        scheduler.load_state_dict(state.scheduler)
        history = state.history
        log.info("resumed after epoch %d of %d", len(history), schedule.epochs)
    done, total = len(history) * len(train), schedule.epochs * len(train)
    with (
        logging_redirect_tqdm(),
        tqdm(initial=done, total=total, unit=" blocks", leave=False, disable=None) as progress,
    ):
        for epoch in range(len(history) + 1, schedule.epochs + 1):
            rates = [float(group["lr"]) for group in trainee.optimizer.param_groups]
            train_loss = _train_epoch(trainee, train, schedule, epoch, progress)
            logits = predict_logits(trainee.model, val.tensors[0], schedule.device)
            scheduler.step()
            best_before = max((float(record["macro_f1"]) for record in history), default=-math.inf)
            record: dict[str, Any] = {
                "epoch": epoch,
                "train_loss": train_loss,
                **_scores(trainee.loss, logits, val, schedule.device),
                "learning_rates": rates,
            }
            if record["macro_f1"] > best_before:
                trainee.keep_best(record, logits)
            history.append(record)
            save_state(
                state_file,
                TrainingState(
                    trainee.capture(),
                    trainee.optimizer.state_dict(),
                    scheduler.state_dict(),
                    history,
                ),
                config,
            )
            log.info(
                "epoch %d/%d: train loss %.4f, val loss %.4f, macro-F1 %.4f",
                epoch, schedule.epochs, train_loss, record["val_loss"], record["macro_f1"],
            )  # fmt: skip
    return history


@torch.no_grad()
def predict_logits(model: nn.Module, samples: Tensor, device: torch.device) -> Tensor:
    """Logits of all samples, on the CPU; the model is in evaluation mode afterwards."""
    model.eval()
    with SmallMaps():
        return torch.cat(
            [model(batch.to(device)).cpu() for batch in torch.split(samples, EVALUATION_BATCH)]
        )


def full_batches(data: TensorDataset, batch_size: int) -> DataLoader[tuple[Tensor, ...]]:
    """Batches in random order for a model with BatchNorm; a last one that is not full is left out.

    Raises:
        BatchSizeError: No batch is full, or each is of one block.
    """
    if batch_size == 1:
        raise BatchSizeError(ONE_BLOCK)
    if len(data) < batch_size:
        raise BatchSizeError(
            f"there are {len(data)} blocks to train on, and a batch has {batch_size}; pass more "
            "blocks"
        )
    sampler = BatchSampler(RandomSampler(data), batch_size, drop_last=True)
    return DataLoader(data, sampler=sampler, batch_size=None)


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """The options that the training scripts of both stages have."""
    parser.add_argument(
        "--dataset-dir",
        type=Path,
        default=DATA_DIR,
        help="frames with MANIFEST.json, or the study's train.pt and val.pt (default: the data "
        "beside the scripts)",
    )
    parser.add_argument(
        "--batch-size",
        type=accept.whole,
        default=128,
        help="blocks in a step (default: %(default)s)",
    )
    parser.add_argument(
        "--device", type=accept.device, default=accept.default_device(), help="default: %(default)s"
    )
    parser.add_argument(
        "--num-workers",
        type=accept.whole_or_none,
        default=0,
        help="loader processes (default: %(default)s)",
    )


def _train_epoch(
    trainee: Trainee, train: TensorDataset, schedule: Schedule, epoch: int, progress: tqdm[NoReturn]
) -> float:
    # Seeding each epoch by its number makes a resumed run draw the same dropout masks and order
    # as an uninterrupted one, on every device, without saving generator states.
    torch.manual_seed(schedule.seed * 1_000_003 + epoch)
    trainee.model.train()
    device, total, count = schedule.device, torch.zeros((), device=schedule.device), 0
    progress.set_description(f"epoch {epoch}/{schedule.epochs}")
    for batch in _batches(train, schedule):
        samples, labels = schedule.augment(*batch) if schedule.augment else batch
        trainee.optimizer.zero_grad(set_to_none=True)
        with SmallMaps():
            loss = trainee.loss(trainee.model(samples.to(device)), labels.to(device))
        torch.autograd.backward(loss)
        trainee.optimizer.step()
        total += loss.detach() * len(labels)
        count += len(labels)
        progress.update(len(labels))
    mean = float(total) / count
    if not math.isfinite(mean):
        raise FloatingPointError(f"the loss is {mean} in epoch {epoch}; lower the learning rates")
    return mean


def _try_one_block(model: nn.Module, train: TensorDataset, device: torch.device) -> None:
    # On a copy, because the forward changes statistics.
    try:
        copy.deepcopy(model).train()(train.tensors[0][:1].to(device))
    except ValueError as error:
        if "more than 1 value per channel" in str(error):
            raise BatchSizeError(ONE_BLOCK) from error
        raise


def _batches(data: TensorDataset, schedule: Schedule) -> DataLoader[tuple[Tensor, ...]]:
    # The sampler yields whole batches of indices and the data set is indexed once for each:
    # many times faster than fetching single blocks and collating them.
    # BatchNorm cannot train on a last batch of one block, so that one is left out.
    lonely = len(data) > 1 and len(data) % schedule.batch_size == 1
    sampler = BatchSampler(RandomSampler(data), schedule.batch_size, drop_last=lonely)
    return DataLoader(data, sampler=sampler, batch_size=None, num_workers=schedule.num_workers)


def _scores(
    loss: Callable[[Tensor, Tensor], Tensor],
    logits: Tensor,
    val: TensorDataset,
    device: torch.device,
) -> dict[str, float]:
    labels = val.tensors[1]
    return {
        "val_loss": float(loss(logits.to(device), labels.to(device))),
        "val_accuracy": float(accuracy_score(labels.numpy(), classes_of(logits).numpy())),
        "macro_f1": macro_f1(logits, labels),
    }
