"""Stage 1 files, the study's and this example's own: strict to read, because Stage 2 stands on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from av1partition.atomic_file import write_atomically
from av1partition.models.stages import BackboneKind, BinaryHead, Stage1Model, build_backbone

BACKBONE = "backbone."


class Stage1FileError(ValueError):
    """A Stage 1 file does not hold the backbone it should."""


def save_stage1(model: Stage1Model, path: str | Path) -> None:
    """Write a model as the study does: a dictionary with ``model_state_dict``."""
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    write_atomically(Path(path), lambda file: torch.save({"model_state_dict": state}, file))


def load_stage1_backbone(path: str | Path) -> tuple[nn.Module, BackboneKind]:
    """Build the backbone that a Stage 1 file holds: with attention if it has any tensor of it.

    Args:
        path: A dictionary with ``model_state_dict``, as the study writes it. No code in it is run.

    Returns:
        The backbone, from [N, 1, 16, 16] to [N, 512], and which one it is.

    Raises:
        Stage1FileError: The file cannot be read, or its tensors are not exactly those of the backbone.
    """
    state = _read_state(Path(path))
    with_attention = any(name.startswith((f"{BACKBONE}se", f"{BACKBONE}spatial_attn")) for name in state)
    kind: BackboneKind = "attention" if with_attention else "plain"
    backbone = build_backbone(kind)
    _load_backbone(backbone, state, Path(path))
    return backbone, kind


def load_backbone_from(backbone: nn.Module, path: str | Path) -> None:
    """Load a Stage 1 file into a backbone of one's own, all or nothing.

    Args:
        backbone: As `stages.build_backbone` returns it, before adapters are injected.
        path: As for `load_stage1_backbone`.

    Raises:
        Stage1FileError: As for `load_stage1_backbone`; the backbone is then unchanged.
    """
    _load_backbone(backbone, _read_state(Path(path)), Path(path))


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise Stage1FileError(f"{path}: no such file; make one with train_stage1.py") from error
    except Exception as error:  # No common base; and its texts advise weights_only=False.
        raise Stage1FileError(f"{path}: cannot be read as tensors ({type(error).__name__})") from error
    state = content.get("model_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise Stage1FileError(f"{path}: has no 'model_state_dict' of tensors; is it a Stage 1 file?")
    return state


def _load_backbone(backbone: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    required = {BACKBONE + name: tensor for name, tensor in backbone.state_dict().items()}
    # Stage 2 has a head of its own, so the binary head and its calibration may be absent, not different.
    optional = {f"head.{name}": tensor for name, tensor in BinaryHead().state_dict().items()}
    optional["temperature"] = torch.ones(1)
    known = required | optional
    problems = [f"missing {name}" for name in required if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in known]
    for name in known.keys() & state.keys():
        problems += _differences(name, state[name], known[name])
    if problems:
        raise Stage1FileError(
            f"{path}: not the Stage 1 file of this {type(backbone).__name__} backbone: {'; '.join(sorted(problems))}. "
            "Pass a file with exactly its tensors (train_stage1.py writes one); the model is unchanged"
        )
    backbone.load_state_dict({name: state[BACKBONE + name] for name in backbone.state_dict()})


def _differences(name: str, found: Tensor, expected: Tensor) -> list[str]:
    scalars = name == "temperature" and found.numel() == 1
    if found.shape != expected.shape and not scalars:
        return [f"{name} has shape {list(found.shape)}, expected {list(expected.shape)}"]
    if found.dtype != expected.dtype:
        return [f"{name} is {found.dtype}, expected {expected.dtype}"]
    if not found.isfinite().all():
        return [f"{name} has values that are not finite"]
    return []
