"""Running a model without leaving a trace on it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor, nn

__all__ = ["call", "undisturbed"]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Runs the body in evaluation mode, eagerly and without gradients, and puts everything back that it may have moved.

    Put back are training flags, buffers, `requires_grad`, gradients, and torch's random state.
    """
    modules = list(nn.Module.modules(model))
    training = [(module, module.training) for module in modules]
    buffers = [(module, {key: (b, None if b is None else b.clone()) for key, b in module._buffers.items()}) for module in modules]
    parameters = [(p, p.requires_grad, p.grad) for p in nn.Module.parameters(model)]
    devices = {parameter.device for parameter, _, _ in parameters} or {torch.device("cpu")}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=sorted(d.index for d in devices if d.type == "cuda")))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_eagerly())
        for kind in {device.type for device in devices} - {"meta"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        try:
            for module in modules:  # not model.eval(), which a model may have made do more than this
                module.training = False
            yield
        finally:
            for module, mode in training:
                module.training = mode
            for module, before in buffers:
                _put_back(module, before)
            for parameter, requires_grad, gradient in parameters:
                if parameter.requires_grad is not requires_grad:
                    parameter.requires_grad_(requires_grad)
                parameter.grad = gradient


def call(model: nn.Module, inputs: object) -> object:
    """Calls a model with a tuple as its arguments, a dict as its keywords, or anything else as its one argument."""
    if isinstance(inputs, tuple):
        return model(*inputs)
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(inputs)


def _eagerly() -> AbstractContextManager[object]:
    """Runs compiled functions as they were before they were compiled."""
    if "torch._dynamo" not in sys.modules:  # nothing can have been compiled, and the import takes a second
        return nullcontext()
    if hasattr(torch.compiler, "set_stance"):  # from torch 2.6
        eager: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
        return eager
    older: AbstractContextManager[object] = torch._dynamo.config.patch(disable=True)
    return older


def _put_back(module: nn.Module, before: dict[str, tuple[Tensor | None, Tensor | None]]) -> None:
    for key in [key for key in module._buffers if key not in before]:
        del module._buffers[key]
    for key, (buffer, value) in before.items():
        module._buffers[key] = buffer  # the module may have put another one there
        if buffer is None or value is None or torch.equal(buffer, value):
            continue
        if buffer.shape == value.shape:
            buffer.copy_(value)
        else:  # it was resized in place
            module._buffers[key] = value
