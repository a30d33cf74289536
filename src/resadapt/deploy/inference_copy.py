"""A copy of an injected model for tools that support only stock modules."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from typing_extensions import override

from resadapt.adapters.family import apply
from resadapt.deploy.same_outputs import check_outputs
from resadapt.deploy.stock_copy import stock_copy
from resadapt.injection.ledger import ledger_of
from resadapt.injection.walk import find_module

__all__ = ["inference_copy"]


def inference_copy(model: nn.Module, name: str | None = None) -> nn.Module:
    """Returns a copy with a single set and stock modules, to fuse, quantize, script or export.

    The copy has stock norm classes, no hooks of this library, and no sets to switch. It is in
    evaluation mode, and no parameter requires gradients. A module with an adapter becomes a
    Sequential of module and adapter, so names inside that module get a ``.0``: ``layer4.1.conv1``
    becomes ``layer4.1.0.conv1``. A module with several arguments becomes a Sequential with a custom
    forward, which torch.jit.script does not support. The copy returns the same outputs as the
    model, which is checked on a generated input.

    Args:
        model: An injected model.
        name: Name of the set; None means the active set.

    Returns:
        The copy.

    Raises:
        InjectionError: Nothing was injected, or the model has meta tensors (offloaded).
        AdapterKeyError: There is no such set.
        AdapterError: The model cannot be copied, or the outputs of the copy differ.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from resadapt import inject_adapters
        >>> model = inject_adapters(resnet18()).eval()
        >>> stock, x = inference_copy(model), torch.randn(1, 3, 64, 64)
        >>> torch.equal(stock(x), model(x)), type(stock.bn1).__name__
        (True, 'BatchNorm2d')
    """
    name = ledger_of(model).chosen(name).spec.name
    copied = stock_copy(model, name)
    stock, adapters = copied.model, copied.adapters
    for owner in sorted(adapters, reverse=True):  # inner modules first, before their names change
        parent, _, key = owner.rpartition(".")
        module = find_module(stock, owner)
        adapter = adapters[owner]
        pair = _PAIRS[adapter.reads] if _takes_one_argument(module) else Adapted
        adapted = find_module(stock, parent)._modules[key] = pair(module, adapter)
        _move_hooks(module, adapted, copied.later_hooks[owner])
    check_outputs(model, name, stock.eval().requires_grad_(False))
    return stock


class Adapted(nn.Sequential):
    """A module with any arguments, and the adapter of its output."""

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the adapter's result for the module's output."""
        module, adapter = self
        return apply(adapter, module, args, module(*args, **kwargs))


class WithInput(nn.Sequential):
    """A module with one tensor as input, and an adapter that reads the input; scriptable."""

    @override
    def forward(self, input):  # type: ignore[no-untyped-def]
        """Returns the adapter's result for the module's output."""
        return self[1](self[0](input), input)


class WithWeight(nn.Sequential):
    """A layer, and an adapter that reads the layer's input and weight; scriptable."""

    @override
    def forward(self, input):  # type: ignore[no-untyped-def]
        """Returns the adapter's result for the layer's output."""
        return self[1](self[0](input), input, self[0].weight, self[0].bias)


_PAIRS = {"output": nn.Sequential, "input": WithInput, "weight": WithWeight}
"""The container class of a module and an adapter, by the adapter's attribute `reads`."""


def _takes_one_argument(module: nn.Module) -> bool:
    """Returns whether a module can run in a stock Sequential, which is scriptable."""
    kinds = [parameter.kind for parameter in inspect.signature(module.forward).parameters.values()]
    return kinds in ([inspect.Parameter.POSITIONAL_ONLY], [inspect.Parameter.POSITIONAL_OR_KEYWORD])


def _move_hooks(module: nn.Module, adapted: nn.Module, hooks: list[int]) -> None:
    """Moves the forward hooks that read the adapted output to the new container."""
    for place in ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
        source, target = getattr(module, place), getattr(adapted, place)
        target.update({hook: source.pop(hook) for hook in hooks if hook in source})
