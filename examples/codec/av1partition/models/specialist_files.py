"""A model from files alone: Stage 1's, and the specialists' adapters, heads or whole networks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from av1partition.data.tasks import SPECIALISTS, Task
from av1partition.models.cascade import Answers, Cascade
from av1partition.models.stage1_files import load_stage1
from resadapt import load_adapters, read_adapter_info

ADAPTER_FILE = "adapters.pt"
HEAD_FILE = "head.pt"
NETWORK_FILE = "network.pt"
MEND = "copy it again, or delete the folder and train anew"


class SpecialistFileError(ValueError):
    """A file of a specialist is damaged, missing, or not of what it was given for."""


def open_cascade(
    stage1_file: Path, adapter_files: Mapping[Task, Sequence[Path]]
) -> tuple[Cascade, dict[str, list[str]]]:
    """Build Stage 1 with adapter sets of specialists.

    Args:
        stage1_file: As `train_stage1.py` writes it.
        adapter_files: For each specialist its adapter files.

    Returns:
        The model, the last set active, and for each task's key the names of its sets.

    Raises:
        Stage1FileError: The Stage 1 file is not one.
        SpecialistFileError: An adapter file is of another specialist.
        resadapt.AdapterError: An adapter file is damaged, or was made for another Stage 1.
    """
    for task, file in ((task, file) for task, files in adapter_files.items() for file in files):
        _check_task(file, task)
    cascade = Cascade(load_stage1(stage1_file))
    names = {
        task.key: [f"{task.key}{number}" for number in range(len(files))]
        for task, files in adapter_files.items()
    }
    for task, files in adapter_files.items():
        for name, file in zip(names[task.key], files, strict=True):
            load_adapters(cascade, file, name=name)
    return cascade, names


def reload_specialist(stage1_file: Path, task: Task, output: Path) -> Answers:
    """Build the model of a finished run from its files alone.

    They are Stage 1's, and that of the adapters, the head or the network.

    Raises:
        Stage1FileError: The Stage 1 file is not one.
        SpecialistFileError: The run's file is missing, damaged, or of another specialist.
        resadapt.AdapterError: An adapter file is damaged, or was made for another Stage 1.
    """
    for name in (ADAPTER_FILE, HEAD_FILE):
        if (output / name).exists():
            return Answers(open_cascade(stage1_file, {task: [output / name]})[0], task)
    file = output / NETWORK_FILE
    if not file.exists():
        names = ", ".join((ADAPTER_FILE, HEAD_FILE, NETWORK_FILE))
        raise SpecialistFileError(f"{output}: has none of {names}; {MEND}")
    cascade = Cascade(load_stage1(stage1_file))
    state = read_tensors(file)
    try:
        cascade.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise SpecialistFileError(
            f"{file}: does not hold {task.title} on this Stage 1; {MEND}"
        ) from error
    return Answers(cascade, task)


def read_tensors(file: Path) -> Any:
    """What `torch.save` wrote; no code in it is run.

    Raises:
        SpecialistFileError: It cannot be read.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # No common base; and its texts advise weights_only=False.
        raise SpecialistFileError(
            f"{file}: cannot be read as tensors ({type(error).__name__}); {MEND}"
        ) from error


def task_of(output: Path) -> Task:
    """Of which specialist a finished run is.

    Raises:
        SpecialistFileError: The folder holds no finished run of a specialist.
    """
    file = output / "metrics.json"
    try:
        key = json.loads(file.read_text(encoding="utf-8"))["task"]
        (task,) = (task for task in SPECIALISTS if task.key == key)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SpecialistFileError(
            f"{file}: is not that of a finished run of a specialist ({type(error).__name__}); pass "
            "the folder of one"
        ) from error
    return task


def _check_task(file: Path, task: Task) -> None:
    """Refuse a file of another specialist.

    It would load too, with a head of its own, and leave this specialist as it was.
    """
    heads = read_adapter_info(file).set.head
    if not any(head.startswith(f"specialists.{task.key}.") for head in heads):
        raise SpecialistFileError(
            f"{file}: has the head {', '.join(heads) or 'of nobody'}, expected that of "
            f"{task.title}; pass the file of that stage"
        )
