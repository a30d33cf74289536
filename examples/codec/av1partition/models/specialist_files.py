"""A model from files alone: Stage 1's, and the specialists' adapters, heads or whole networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from av1partition.data.tasks import Task
from av1partition.models.cascade import Answers, Cascade, head_name
from av1partition.models.stage1_files import load_stage1
from resadapt import load_adapters, read_adapter_info

ADAPTER_FILE = "adapters.pt"
HEAD_FILE = "head.pt"
NETWORK_FILE = "network.pt"


class SpecialistFileError(ValueError):
    """An adapter file is of another specialist than the one that it was given for."""


def open_cascade(stage1_file: Path, adapter_files: Mapping[Task, Sequence[Path]]) -> tuple[Cascade, dict[str, list[str]]]:
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
    names = {task.key: [f"{task.key}{number}" for number in range(len(files))] for task, files in adapter_files.items()}
    for task, files in adapter_files.items():
        for name, file in zip(names[task.key], files, strict=True):
            load_adapters(cascade, file, name=name)
    return cascade, names


def reload_specialist(stage1_file: Path, task: Task, output: Path) -> Answers:
    """Build the model of a finished run from its files alone: Stage 1's, and the adapters', the head's or the network's."""
    if (output / ADAPTER_FILE).exists():
        return Answers(open_cascade(stage1_file, {task: [output / ADAPTER_FILE]})[0], task)
    whole = (output / NETWORK_FILE).exists()
    state = torch.load(output / (NETWORK_FILE if whole else HEAD_FILE), weights_only=True)
    cascade = Cascade(load_stage1(stage1_file))
    (cascade if whole else cascade.get_submodule(head_name(task, quantizer="weight" not in state))).load_state_dict(state)
    return Answers(cascade, task)


def _check_task(file: Path, task: Task) -> None:
    """A file of another specialist would load too, with a head of its own, and this one would not have changed."""
    heads = read_adapter_info(file).set.head
    if not any(head.startswith(f"specialists.{task.key}.") for head in heads):
        raise SpecialistFileError(
            f"{file}: has the head {', '.join(heads) or 'of nobody'}, expected that of {task.title}; pass the file of that stage"
        )
