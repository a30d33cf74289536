"""A copy of an injected model for tools that know only stock modules."""

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
    """Returns an independent copy with one set, made of plain modules, for fusing, quantizing,
    scripting and exporting.

    Norms have their stock classes, there are no hooks of this library and nothing to switch, and
    everything is in evaluation mode and needs no gradient. Where a module carries an adapter, the
    copy has a Sequential of the module and the adapter, so names inside that module get a ``.0``:
    ``layer4.1.conv1`` becomes ``layer4.1.0.conv1``. A module that takes several arguments gets a
    Sequential that passes them on, which torch.jit.script cannot read. The outputs are the same, as
    both are run to see on an input made up for them.

    Args:
        model: An injected model.
        name: The set; None is the active one.

    Returns:
        The copy.

    Raises:
        InjectionError: Nothing was injected, or a tensor has no values (offloaded).
        AdapterKeyError: There is no such set.
        AdapterError: The model cannot be copied, or the copy does not give the same outputs.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from resadapt import inject_adapters
        >>> model = inject_adapters(resnet18()).eval()
        >>> plain, x = inference_copy(model), torch.randn(1, 3, 64, 64)
        >>> torch.equal(plain(x), model(x)), type(plain.bn1).__name__
        (True, 'BatchNorm2d')
    """
    name = ledger_of(model).chosen(name).spec.name
    copied = stock_copy(model, name)
    plain, adapters = copied.model, copied.adapters
    for owner in sorted(
        adapters, reverse=True
    ):  # the inner ones first: their names are still those of the backbone
        parent, _, key = owner.rpartition(".")
        module = find_module(plain, owner)
        adapter = adapters[owner]
        pair = _PAIRS[adapter.reads] if _takes_one_argument(module) else Adapted
        adapted = find_module(plain, parent)._modules[key] = pair(module, adapter)
        _move_hooks(module, adapted, copied.later_hooks[owner])
    check_outputs(model, name, plain.eval().requires_grad_(False))
    return plain


class Adapted(nn.Sequential):
    """A module that takes any arguments, and the adapter of what it returns."""

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the adapter's result for the module's output."""
        module, adapter = self
        return apply(adapter, module, args, module(*args, **kwargs))


class WithInput(nn.Sequential):
    """A module that takes one tensor, and an adapter that reads it too; it can be scripted."""

    @override
    def forward(self, input):  # type: ignore[no-untyped-def]
        """Returns the adapter's result for the module's output."""
        return self[1](self[0](input), input)


class WithWeight(nn.Sequential):
    """A layer, and an adapter that reads its input and weight too; it can be scripted."""

    @override
    def forward(self, input):  # type: ignore[no-untyped-def]
        """Returns the adapter's result for the layer's output."""
        return self[1](self[0](input), input, self[0].weight, self[0].bias)


_PAIRS = {"output": nn.Sequential, "input": WithInput, "weight": WithWeight}
"""What makes one module of a module and an adapter, by what the adapter reads."""


def _takes_one_argument(module: nn.Module) -> bool:
    """Tells whether a stock Sequential, which can be scripted, can call a module."""
    kinds = [parameter.kind for parameter in inspect.signature(module.forward).parameters.values()]
    return kinds in ([inspect.Parameter.POSITIONAL_ONLY], [inspect.Parameter.POSITIONAL_OR_KEYWORD])


def _move_hooks(module: nn.Module, adapted: nn.Module, hooks: list[int]) -> None:
    """Moves forward hooks that saw the adapted output to where that is now."""
    for place in ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
        there, here = getattr(module, place), getattr(adapted, place)
        here.update({hook: there.pop(hook) for hook in hooks if hook in there})
