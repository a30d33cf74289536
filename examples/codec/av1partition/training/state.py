"""The file an interrupted run resumes from."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from av1partition.atomic_file import write_atomically

Config = dict[str, str | int | float | bool]


class TrainingStateError(ValueError):
    """A training state is damaged, or belongs to another run."""


@dataclass(frozen=True)
class TrainingState:
    """Everything a run needs to go on after an epoch, except what its configuration determines.

    Random numbers are not in it: each epoch draws them anew from the seed and its own number.

    Attributes:
        trained: What training changes of the model, by name.
        optimizer: Its state dictionary.
        scheduler: Its state dictionary.
        history: One record for each finished epoch.
    """

    trained: dict[str, Tensor]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    history: list[dict[str, Any]]


def digest_of_data(*datasets: TensorDataset) -> str:
    """SHA-256 over every value of the data sets, in their order."""
    digest = hashlib.sha256()
    for dataset in datasets:
        for tensor in dataset.tensors:
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def save_state(path: Path, state: TrainingState, config: Config) -> None:
    """Write the state and what the run was configured with."""
    content = {"config": config, **asdict(state)}
    write_atomically(path, lambda file: torch.save(content, file))


def load_state(path: Path, config: Config) -> TrainingState | None:
    """Read the state of an interrupted run.

    Args:
        path: As given to `save_state`.
        config: What the present run is configured with; it must be the same.

    Returns:
        The state, or None where there is none yet.

    Raises:
        TrainingStateError: The file is damaged or was written with another configuration.
    """
    if not path.exists():
        return None
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
        before = content.pop("config")
        state = TrainingState(**content)
    except Exception as error:  # No common base; and its texts advise weights_only=False.
        raise TrainingStateError(
            f"{path}: not a training state ({type(error).__name__}); delete it to start over"
        ) from error
    differing = sorted(
        key for key in before.keys() | config.keys() if before.get(key) != config.get(key)
    )
    if differing:
        changes = "; ".join(
            f"{key} was {before.get(key)!r}, now is {config.get(key)!r}" for key in differing
        )
        raise TrainingStateError(
            f"{path}: belongs to a run configured otherwise: {changes}. Resume with the same "
            "options and data, or choose another --output-dir"
        )
    return state
