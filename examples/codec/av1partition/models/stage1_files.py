"""Stage 1 files, the study's and this example's own.

Strict to read, because every specialist stands on them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from av1partition.atomic_file import write_atomically
from av1partition.data.inputs import CODE_SIZE
from av1partition.data.tasks import KINDS
from av1partition.models.backbones import FEATURES, BackboneKind, build_backbone
from av1partition.models.cascade import Stage1Model


class Stage1FileError(ValueError):
    """A Stage 1 file does not hold the model it should."""


def save_stage1(model: Stage1Model, path: str | Path) -> None:
    """Write a model as the study does.

    A dictionary with ``model_state_dict``; and the threshold beside it.
    """
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    write_atomically(
        Path(path),
        lambda file: torch.save({"model_state_dict": state, "threshold": model.threshold}, file),
    )


def load_stage1(path: str | Path) -> Stage1Model:
    """Build the model that a Stage 1 file holds.

    The names and shapes of the file's tensors tell which backbone and head it has.

    Args:
        path: A dictionary with ``model_state_dict``, as the study writes it. No code in it is run.

    Returns:
        The model. A head that the file lacks is all zeros.

    Raises:
        Stage1FileError: The file cannot be read, or its tensors are not exactly those of the model.
    """
    path = Path(path)
    state, threshold = _read(path)
    model = _of_the_shape(state)
    known = model.state_dict()
    # The specialists do not use the head and its calibration, so they may be absent, not different.
    problems = [
        f"missing {name}" for name in known if name.startswith("backbone.") and name not in state
    ]
    problems += [f"unexpected {name}" for name in state if name not in known]
    for name in known.keys() & state.keys():
        problems += _differences(name, state[name], known[name])
    if problems:
        raise Stage1FileError(
            f"{path}: not a Stage 1 file with {type(model.backbone).__name__}: "
            f"{'; '.join(sorted(problems))}. Pass a file with exactly its tensors (train_stage1.py "
            "writes one)"
        )
    absent = {
        name: torch.zeros_like(tensor) for name, tensor in known.items() if name.startswith("head.")
    }
    temperature = state.get("temperature", torch.ones(1)).reshape(1)
    model.load_state_dict({**absent, **state, "temperature": temperature})
    model.threshold = threshold
    # Convolutions on small maps with many channels are faster with the channels last.
    return model.to(memory_format=torch.channels_last)


def _of_the_shape(state: dict[str, Tensor]) -> Stage1Model:
    kind: BackboneKind = "plain"
    if any(name.startswith(("backbone.se", "backbone.spatial_attn")) for name in state):
        kind = "attention"
    elif _shape(state, "backbone.conv1.weight")[2:] == [3, 3]:
        kind = "fine"
    kinds = _shape(state, "head.head.3.weight")[:1] == [len(KINDS.classes)]
    quantizer = _shape(state, "head.head.0.weight")[1:] == [FEATURES + CODE_SIZE]
    return Stage1Model(build_backbone(kind), kinds=kinds, quantizer=quantizer)


def _shape(state: dict[str, Tensor], name: str) -> list[int]:
    return list(state[name].shape) if name in state else []


def _read(path: Path) -> tuple[dict[str, Tensor], float]:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise Stage1FileError(f"{path}: no such file; make one with train_stage1.py") from error
    except Exception as error:  # No common base; and its texts advise weights_only=False.
        raise Stage1FileError(
            f"{path}: cannot be read as tensors ({type(error).__name__})"
        ) from error
    state = content.get("model_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(
        isinstance(tensor, Tensor) for tensor in state.values()
    ):
        raise Stage1FileError(
            f"{path}: has no 'model_state_dict' of tensors; is it a Stage 1 file?"
        )
    threshold = content.get("threshold", 0.5)
    if not isinstance(threshold, float) or not 0 < threshold < 1:
        raise Stage1FileError(
            f"{path}: 'threshold' is {threshold!r}, expected a probability between 0 and 1"
        )
    return state, threshold


def _differences(name: str, found: Tensor, expected: Tensor) -> list[str]:
    scalars = name == "temperature" and found.numel() == 1
    if found.shape != expected.shape and not scalars:
        return [f"{name} has shape {list(found.shape)}, expected {list(expected.shape)}"]
    if found.dtype != expected.dtype:
        return [f"{name} is {found.dtype}, expected {expected.dtype}"]
    if not found.isfinite().all():
        return [f"{name} has values that are not finite"]
    return []
