"""Running a model without leaving a trace on it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["call", "describe", "generate", "undisturbed"]

_MOST_ELEMENTS = 2**26
"""A form may come from a file, which must not be able to take all memory."""


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Runs the body in evaluation mode without gradients; training flags, buffers and random state are put back after it."""
    training = [(module, module.training) for module in model.modules()]
    buffers = [(module, {k: (b, None if b is None else b.clone()) for k, b in module._buffers.items()}) for module, _ in training]
    kinds = {tensor.device for tensor in model.parameters()} or {torch.device("cpu")}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=sorted(kind.index for kind in kinds if kind.type == "cuda")))
        stack.enter_context(torch.no_grad())
        for kind in {kind.type for kind in kinds}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        try:
            model.eval()
            yield
        finally:
            for module, mode in training:
                module.training = mode
            for module, before in buffers:
                for key in [key for key in module._buffers if key not in before]:
                    del module._buffers[key]
                for key, (buffer, value) in before.items():
                    module._buffers[key] = buffer  # the module may have put another one there
                    if buffer is not None and value is not None and not torch.equal(buffer, value):
                        buffer.copy_(value)


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
                count = math.prod(shape)
                if count > _MOST_ELEMENTS:
                    raise ValueError(f"an input of {count} elements")
                bits = torch.arange(1, count + 1, dtype=torch.int64, device="cpu").mul_(2654435761).bitwise_and_(0xFFFFFFFF) >> 16
                return (bits.to(torch.float64) / 2**15 - 1).reshape(shape).to(dtype)
        case {"list": [*items]}:
            return [generate(item) for item in items]
        case {"tuple": [*items]}:
            return tuple(generate(item) for item in items)
    raise ValueError(f"not the form of an input: {form!r}")
