"""What a model returns, found out without leaving a trace on it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from resadapt.base.nested import map_tensors, named_in
from resadapt.base.tensors import plain_parts
from resadapt.base.undisturbed import call, undisturbed

__all__ = ["outputs_of"]


def outputs_of(model: nn.Module, inputs: object) -> dict[str, Tensor]:
    """Runs a model in evaluation mode and returns every tensor of its output by its place there; the model is left as it was."""
    own = map_tensors(inputs, torch.clone)  # which the model may change in place
    with undisturbed(model):
        return dict(_plain_outputs(call(model, own)))


def _plain_outputs(output: object) -> Iterator[tuple[str, Tensor]]:
    """Walks the dense tensors of an output; a sparse, nested or quantized one is walked part by part."""
    for place, tensor in named_in(output):
        parts = list(plain_parts(tensor))
        if len(parts) == 1:
            yield place, parts[0]
        else:
            yield from ((f"{place}.part{number}", part) for number, part in enumerate(parts))
