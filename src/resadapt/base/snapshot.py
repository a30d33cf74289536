"""Everything that running or changing a model may move besides its parameters' values, put back afterwards."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from resadapt.base.tensors import local_shard, same_bits

__all__ = ["Snapshot"]


class Snapshot:
    """Training flags, buffers, `requires_grad` and gradients of a model at one moment.

    Args:
        model: The model.
        values: Whether the values of buffers and gradients are copied too, not only which tensors they are.
    """

    def __init__(self, model: nn.Module, values: bool = True) -> None:
        def copied(tensor: Tensor | None) -> Tensor | None:
            return tensor.clone() if values and tensor is not None else None

        modules = list(nn.Module.modules(model))
        self._flags = [(module, module.training) for module in modules]
        self._buffers = [(module, {key: (b, copied(b)) for key, b in module._buffers.items()}) for module in modules]
        self._parameters = [(p, p.requires_grad, p.grad, copied(p.grad)) for p in nn.Module.parameters(model)]

    @torch.no_grad()
    def restore(self) -> None:
        """Puts everything back."""
        for module, training in self._flags:
            module.training = training
        for module, before in self._buffers:
            _restore_buffers(module, before)
        for parameter, requires_grad, gradient, value in self._parameters:
            if parameter.requires_grad is not requires_grad:
                parameter.requires_grad_(requires_grad)
            # Of a sharded one, this process's shard alone: others may not be running this.
            if gradient is not None and value is not None and not same_bits(local_shard(gradient), local_shard(value)):
                gradient.copy_(value)
            parameter.grad = gradient


def _restore_buffers(module: nn.Module, before: dict[str, tuple[Tensor | None, Tensor | None]]) -> None:
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
