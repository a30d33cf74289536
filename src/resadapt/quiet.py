"""Running a model without leaving a trace on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["call", "describe", "generate", "undisturbed"]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Runs the body in evaluation mode without gradients; training flags, buffers and random state are put back after it."""
    training = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = sorted({tensor.device.index for tensor in model.parameters() if tensor.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        try:
            model.eval()
            yield
        finally:
            for module, mode in training:
                module.training = mode
            for buffer, before in buffers:
                buffer.copy_(before)


def call(model: nn.Module, inputs: object) -> object:
    """Calls a model with a tuple as its arguments, a dict as its keywords, or anything else as its one argument."""
    if isinstance(inputs, tuple):
        return model(*inputs)
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(inputs)


def describe(inputs: object) -> Any:
    """Returns the form of a model's input as JSON values, from which `generate` can make another; None if it cannot."""
    match inputs:
        case Tensor():
            dtype = str(inputs.dtype).removeprefix("torch.")
            return {"shape": list(inputs.shape), "dtype": dtype} if inputs.is_floating_point() else None
        case list() | tuple():
            items = [describe(item) for item in inputs]
            return None if None in items else {type(inputs).__name__: items}
    return None


def generate(form: Any) -> object:
    """Makes an input of a described form: numbers in [-1, 1) that are the same on every machine, whatever made them.

    Raises:
        ValueError: The form is not one that `describe` gives.
    """
    match form:
        case {"shape": [*shape], "dtype": str(name)} if all(type(size) is int and size >= 0 for size in shape):
            dtype = getattr(torch, name, None)
            if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
                # Integer arithmetic, exact everywhere: Knuth's multiplicative hash of the position, its high bits.
                count = torch.Size(shape).numel()
                bits = torch.arange(1, count + 1, dtype=torch.int64).mul_(2654435761).bitwise_and_(0xFFFFFFFF) >> 16
                return (bits.to(torch.float64) / 2**15 - 1).reshape(shape).to(dtype)
        case {"list": [*items]}:
            return [generate(item) for item in items]
        case {"tuple": [*items]}:
            return tuple(generate(item) for item in items)
    raise ValueError(f"not the form of an input: {form!r}")
