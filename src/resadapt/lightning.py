"""A callback for Lightning: the best adapter files, and small checkpoints of the trainer.

Needs Lightning: ``pip install 'resadapt[lightning]'``. ``import resadapt`` does not import this
module.
"""

from __future__ import annotations

import logging
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from resadapt.base.errors import AdapterError, AdapterWarning, InjectionError, quote_names
from resadapt.base.tensors import all_tensors
from resadapt.files.container import format_for
from resadapt.injection.ledger import find_ledger, ledger_of
from resadapt.injection.walk import check_ranks, on_one_rank, unwrap
from resadapt.proof.drift import refuse_drift
from resadapt.proof.reconstruction import Rebuild, check_rebuild
from resadapt.proof.report import VerificationReport
from resadapt.proof.state import adapter_state_dict, load_adapter_state_dict
from resadapt.proof.training_state import load_training_state_dict, training_state_dict
from resadapt.proof.verify import save_adapters

try:
    from lightning.pytorch.callbacks import (
        Callback,
        StochasticWeightAveraging,
        WeightAveraging,
    )
    from lightning.pytorch.strategies import (
        DeepSpeedStrategy,
        FSDPStrategy,
        ModelParallelStrategy,
    )
except ImportError as error:
    raise ImportError(
        "resadapt.lightning needs Lightning 2.6 or newer: pip install 'resadapt[lightning]'."
    ) from error

__all__ = ["AdapterCheckpoint"]

_log = logging.getLogger(__name__)
_STATE = "resadapt_training_state"
"""Key in a checkpoint's state_dict of what is saved in place of the injected model."""
_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""The dtype of autocast by the trainer's precision; other precisions run without autocast."""
_OWN_CHECKPOINTS = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)
"""Strategies that write and read the model's tensors themselves."""


class AdapterCheckpoint(Callback):  # type: ignore[misc]
    """Saves a set, verified, whenever a metric improves, and can keep checkpoints small.

    The injected model is the LightningModule or a module inside it. A metric of the validation is
    looked at after each validation, another metric at the end of each epoch of training. A file
    contains the weights that the metric was measured with, also where a callback such as
    ``EMAWeightAveraging`` validates averaged weights. Sanity checks and ``fast_dev_run`` save
    nothing. If a verification fails, training stops with the error, and earlier files remain.

    It does not replace ``ModelCheckpoint``, which writes what a training is resumed from.

    Args:
        dirpath: A local directory for the files; it is created. Callbacks for other sets or metrics
            may have the same.
        monitor: The metric, by its name in ``self.log(name, value)``.
        mode: ``"min"`` or ``"max"``: what is better. NaN and infinite values never are.
        rebuild: As for `save_adapters`; required for a sharded model.
        save_top_k: The number of best files to keep.
        name: The set; None is the set that is active when the metric is measured.
        trainer_checkpoint: ``"full"`` leaves the trainer's checkpoints as they are. ``"adapters"``
            replaces the injected model in them by `training_state_dict`, without the backbone. Such
            a checkpoint is read by any `AdapterCheckpoint`, resumes bit for bit on the same
            backbone, equally injected, and raises an error on another one.

    Attributes:
        scores: The metric of each kept file, by file name.
        report: The report of the latest save, None before.

    Raises:
        AdapterError: An argument is unsuitable.

    Example:
        Save the best set, and keep the backbone out of the trainer's checkpoints::

            best = AdapterCheckpoint("adapters", "val_acc", "max", rebuild=backbone,
                                     trainer_checkpoint="adapters")
            trainer = Trainer(callbacks=[best, ModelCheckpoint(save_last=True)])
            trainer.fit(module, data)
            model = load_adapters(backbone(), best.best_path)
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str],
        monitor: str,
        mode: Literal["min", "max"],
        rebuild: Rebuild | None = None,
        save_top_k: int = 1,
        name: str | None = None,
        trainer_checkpoint: Literal["full", "adapters"] = "full",
    ) -> None:
        super().__init__()
        if "://" in os.fspath(dirpath):
            raise AdapterError(f"dirpath={dirpath!r} is not a local directory.")
        if not isinstance(monitor, str):
            raise AdapterError(f"monitor={monitor!r}: give the name of a metric, a string.")
        for argument, value, choices in (
            ("mode", mode, ("min", "max")),
            ("trainer_checkpoint", trainer_checkpoint, ("full", "adapters")),
        ):
            if value not in choices:
                raise AdapterError(f"{argument}={value!r}: give one of {quote_names(choices)}.")
        if type(save_top_k) is not int or save_top_k < 1:
            raise AdapterError(f"save_top_k={save_top_k!r}: give a number of files, 1 or more.")
        check_rebuild(rebuild)
        self.dirpath = Path(dirpath).expanduser().absolute()
        self.monitor = monitor
        self.mode = mode
        self.rebuild = rebuild
        self.save_top_k = save_top_k
        self.name = name
        self.trainer_checkpoint = trainer_checkpoint
        self.scores: dict[str, float] = {}
        self.report: VerificationReport | None = None
        self._loading: Any = None
        self._before: Tensor | None = None
        self._validated: tuple[str, dict[str, Tensor]] | None = None
        self._has_validated = False
        self._of_validation = False

    @property
    def best_path(self) -> Path | None:
        """Path of the best file, None before the first."""
        return self.dirpath / self._ranked()[0] if self.scores else None

    @property
    def best_score(self) -> float | None:
        """The metric of the best file, None before the first."""
        return self.scores[self._ranked()[0]] if self.scores else None

    @property
    @override
    def state_key(self) -> str:
        """Key of the state in a checkpoint: callbacks for other sets or metrics have their own."""
        key: str = self._generate_state_key(monitor=self.monitor, mode=self.mode, name=self.name)
        return key

    @override
    def state_dict(self) -> dict[str, Any]:
        """Returns the kept files and their scores, for a checkpoint."""
        return {"scores": dict(self.scores)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the files of a checkpoint that are still in the directory."""
        scores = state_dict["scores"]
        self.scores = {file: scores[file] for file in scores if (self.dirpath / file).is_file()}
        if gone := scores.keys() - self.scores.keys():
            _warn(
                f"The files {quote_names(sorted(gone))} of the checkpoint are not in "
                f"{self.dirpath}. AdapterCheckpoint does not compare with them any more."
            )

    @override
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuses what cannot work, and prepares the load of checkpoints without the backbone."""
        if _has(trainer, StochasticWeightAveraging):
            raise AdapterError(
                "StochasticWeightAveraging resets the running statistics of every norm, also in "
                "the frozen backbone and in inactive sets. Use Lightning's WeightAveraging, which "
                "averages weights in the same way."
            )
        if self.trainer_checkpoint == "adapters":
            if isinstance(trainer.strategy, _OWN_CHECKPOINTS):
                raise AdapterError(
                    f"{type(trainer.strategy).__name__} reads and writes the model's tensors "
                    "itself, so trainer_checkpoint='adapters' cannot leave the backbone out. Use "
                    "trainer_checkpoint='full'."
                )
            if _has(trainer, WeightAveraging):
                raise AdapterError(
                    "trainer_checkpoint='adapters' cannot leave the backbone out of the "
                    "checkpoints of WeightAveraging or EMAWeightAveraging, which average the "
                    "backbone too, with other roundings. Use trainer_checkpoint='full'; the "
                    "adapter files contain the averaged set."
                )
        self.teardown(trainer, pl_module, stage)
        # Public from torch 2.5. Lightning calls on_load_checkpoint too late, after the load.
        self._loading = pl_module._register_load_state_dict_pre_hook(_load_small, with_module=True)

    @override
    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Undoes `setup`."""
        if self._loading is not None:
            self._loading.remove()
            self._loading = None

    @override
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Checks what would make each save fail, before the training."""
        model = _injected(pl_module)
        ledger_of(model).chosen(self.name)
        refuse_drift(model)
        if check_ranks(model) and self.rebuild is None:
            raise AdapterError(
                "The model is sharded, so its files can be verified on a rebuilt backbone only. "
                "Give AdapterCheckpoint rebuild=, a function that builds the backbone."
            )
        self._has_validated = self._of_validation = False
        self.scores = trainer.strategy.broadcast(self.scores)  # of rank 0, which has the files

    @override
    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Remembers the metric, to see whether the validation logs it."""
        self._before = trainer.callback_metrics.get(self.monitor)
        self._validated = None

    @override
    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Copies the weights that are validated: averages are there during the validation only."""
        if self._validated is None and self._is_fitting(trainer):
            model = _injected(pl_module)
            name = ledger_of(model).chosen(self.name).spec.name
            self._validated = name, adapter_state_dict(model, name)

    @override
    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Saves, if the validation logged the metric, and the metric improved."""
        value = trainer.callback_metrics.get(self.monitor)
        if not self._is_fitting(trainer):
            return
        self._has_validated = True
        if value is not None and value is not self._before:  # a value from training stays there
            self._of_validation = True
            self._save_if_better(trainer, pl_module, value, self._validated)

    @override
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Saves, if a metric of the training improved."""
        if self._of_validation or not self._is_fitting(trainer):
            return
        value = trainer.callback_metrics.get(self.monitor)
        if value is not None:
            self._save_if_better(trainer, pl_module, value)
        elif self._has_validated or not trainer.enable_validation:
            raise AdapterError(
                f"AdapterCheckpoint(monitor={self.monitor!r}): no such metric was logged; there "
                f"are {quote_names(trainer.callback_metrics) or 'none'}. Log it in a step or at "
                f"the end of the validation epoch: self.log({self.monitor!r}, value)."
            )

    @override
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Warns if nothing was saved."""
        if not self.scores and not trainer.fast_dev_run:
            _warn(
                f"AdapterCheckpoint saved nothing: {self.monitor!r} was never logged as a finite "
                "number."
            )

    @override
    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Replaces the injected model in a checkpoint by its state without the backbone."""
        state = checkpoint["state_dict"]
        if self.trainer_checkpoint == "adapters" and _STATE not in state:
            model = _injected(pl_module)
            for key in _tensors_of(model, pl_module):
                state.pop(key, None)
            state[_STATE] = training_state_dict(model)

    def _is_fitting(self, trainer: Any) -> bool:
        """Tells whether metrics count: in a fit, but not in its sanity check."""
        return (
            trainer.state.fn == "fit" and not trainer.sanity_checking and not trainer.fast_dev_run
        )

    def _ranked(self) -> list[str]:
        """Returns the names of the kept files, the best first."""
        return sorted(self.scores, key=self.scores.__getitem__, reverse=self.mode == "max")

    def _save_if_better(
        self,
        trainer: Any,
        pl_module: Any,
        value: Tensor,
        measured: tuple[str, dict[str, Tensor]] | None = None,
    ) -> None:
        """Saves a set if its metric is among the best, and removes the file that is not any more.

        Args:
            trainer: The trainer.
            pl_module: The LightningModule.
            value: The metric.
            measured: The set and its weights that the metric was measured with; None: the present.
        """
        score: float = trainer.strategy.broadcast(float(value))
        if not math.isfinite(score):
            _warn(f"{self.monitor!r} is {score}, so AdapterCheckpoint saved nothing.")
            return
        ranked = self._ranked()
        if len(ranked) >= self.save_top_k:
            worst = self.scores[ranked[-1]]
            if not (score < worst if self.mode == "min" else score > worst):
                return
        model = _injected(pl_module)
        name, weights = measured or (ledger_of(model).chosen(self.name).spec.name, None)
        monitor = re.sub(r"\W", "_", self.monitor)
        stem = f"{name}-{monitor}-epoch={trainer.current_epoch}-step={trainer.global_step}"
        path = self.dirpath / f"{stem}.{format_for(Path(stem))}"
        metadata = {
            "monitor": self.monitor,
            "score": score,
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
        }

        def save() -> VerificationReport:
            self.dirpath.mkdir(parents=True, exist_ok=True)
            return save_adapters(
                model,
                path,
                name=name,
                metadata=metadata,
                rebuild=self.rebuild,
                autocast=_AUTOCAST.get(trainer.precision),
            )

        with _with_weights(model, name, weights):
            replicated = dist.is_available() and dist.is_initialized() and not check_ranks(model)
            self.report = on_one_rank(replicated, save)
        _log.info("%s = %s\n%s", self.monitor, score, self.report)
        self.scores[path.name] = score
        for file in self._ranked()[self.save_top_k :]:
            del self.scores[file]
            if trainer.is_global_zero:
                (self.dirpath / file).unlink(missing_ok=True)


@contextmanager
def _with_weights(model: nn.Module, name: str, weights: dict[str, Tensor] | None) -> Iterator[None]:
    """Runs the body with other weights in a set, unless they are the set's already."""
    now = adapter_state_dict(model, name)
    if weights is None or all(torch.equal(weights[key], now[key]) for key in now):
        yield
        return
    load_adapter_state_dict(model, weights, name)
    try:
        yield
    finally:
        load_adapter_state_dict(model, now, name)


def _injected(pl_module: nn.Module) -> nn.Module:
    """Returns the injected model in a LightningModule."""
    found = {
        module: name
        for name, module in nn.Module.named_modules(pl_module)
        if unwrap(module) is module and find_ledger(module) is not None
    }
    if not found:
        ledger_of(pl_module)  # raises
    if len(found) > 1:
        raise InjectionError(
            "AdapterCheckpoint saves one injected model, and the LightningModule has several: "
            f"{quote_names([*found.values()])}. Inject into one of them, or keep the others out of "
            "its attributes."
        )
    return next(iter(found))


def _has(trainer: Any, kind: type[Callback]) -> bool:
    return any(isinstance(callback, kind) for callback in trainer.callbacks)


def _tensors_of(model: nn.Module, pl_module: nn.Module) -> Mapping[str, Tensor]:
    """Returns a model's tensors under all their names in the state_dict of a LightningModule."""
    inside = {id(tensor) for tensor in all_tensors(model)}
    state = nn.Module.state_dict(pl_module, keep_vars=True)
    return {key: tensor for key, tensor in state.items() if id(tensor) in inside}


def _load_small(pl_module: Any, state_dict: MutableMapping[str, Any], *_: object) -> None:
    """Pre-hook of load_state_dict: loads a training state, and completes the state_dict."""
    if _STATE in state_dict:
        model, trainer = _injected(pl_module), pl_module.trainer
        if trainer.state.fn == "fit" and _has(trainer, WeightAveraging):
            raise AdapterError(
                "The checkpoint was saved with trainer_checkpoint='adapters', and WeightAveraging "
                "or EMAWeightAveraging would not find the weights to average in it. Resume "
                "without them, or from a full checkpoint."
            )
        # Lightning converts the module after the load, which would round float64.
        trainer.precision_plugin.convert_module(pl_module)
        load_training_state_dict(model, state_dict.pop(_STATE))
        state_dict.update(_tensors_of(model, pl_module))


def _warn(message: str) -> None:
    warnings.warn(message, AdapterWarning, stacklevel=3)
