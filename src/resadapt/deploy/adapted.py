"""The containers of a module and its adapter in an inference copy."""

from __future__ import annotations

import inspect
from types import MethodType
from typing import Any

from torch import nn
from typing_extensions import override

from resadapt.base.errors import AdapterError
from resadapt.injection.own_dtype import apply, in_own_dtype
from resadapt.injection.walk import is_leaf

__all__ = ["Adapted", "InOwnDtype", "adapted"]


class Adapted(nn.Sequential):
    """A module, the adapter of its output, and a Dropout that drops nothing.

    Models read attributes of their modules, so the container has the module's public attributes.
    Exceptions are methods, which would run without the adapter, and the sizes of a layer, from
    which a tool that merges a norm into the layer would build a layer without the adapter.

    Other tools merge a norm into the layer registered before it. They find the Dropout there, and
    not the adapter's last layer.
    """

    def __init__(self, module: nn.Module, adapter: nn.Module) -> None:
        super().__init__(module, adapter, nn.Dropout(0.0))  # captum has no rule for an Identity
        parts = (vars(module), module._parameters, module._buffers, module._modules)
        # What a tool adds to every module later is not passed on, but added here too.
        self._names = {name for part in parts for name in part}

    @override
    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):
                raise
        module: Any = super().__getattr__("0")
        if not self._is_of(module, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        value = getattr(module, name)
        sizes = getattr(module, "__constants__", ()) if is_leaf(module) else ()
        if isinstance(value, MethodType) or name in sizes:
            raise AttributeError(_without_adapter(module, name))
        return value

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        children = self.__dict__.get("_modules", {})
        module = children.get("0")
        own = name.startswith("_") or name in self.__dict__ or name in children
        if own or hasattr(type(self), name) or not self._is_of(module, name):
            super().__setattr__(name, value)
        elif isinstance(value, nn.Parameter):
            raise AdapterError(_without_adapter(module, name))
        else:
            setattr(module, name, value)

    def _is_of(self, module: nn.Module | None, name: str) -> bool:
        """Tells whether the module had an attribute when the container was made."""
        return module is not None and (name in self._names or hasattr(type(module), name))


def _without_adapter(module: nn.Module, name: str) -> str:
    return (
        f"This {type(module).__name__} has an adapter, which a tool that uses {name!r} would "
        "ignore. To merge a norm into the layer, call resadapt.fold_adapters(model) first, if the "
        "family can be folded, or choose the block around the layer as the site. Index with [0] "
        "for the layer without the adapter."
    )


class WithArguments(Adapted):
    """A module with any arguments, which torch.jit.script does not support."""

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the adapter's result for the module's output."""
        return apply(self[1], self[0], args, self[0](*args, **kwargs))


class WithInput(Adapted):
    """A module with one tensor as input, and an adapter that reads the input; scriptable."""

    @override
    def forward(self, input):  # type: ignore[no-untyped-def]
        """Returns the adapter's result for the module's output."""
        return self[1](self[0](input), input)


class WithWeight(Adapted):
    """A layer, and an adapter that reads the layer's input and weight; scriptable."""

    @override
    def forward(self, input):  # type: ignore[no-untyped-def]
        """Returns the adapter's result for the layer's output."""
        return self[1](self[0](input), input, self[0].weight, self[0].bias)


class InOwnDtype(nn.Sequential):
    """A module in another dtype than the backbone, which torch.jit.script does not support."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the module's result in the dtype of the first input."""
        return in_own_dtype(self[0], args, kwargs)

    @override
    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):
                raise
        return getattr(super().__getattr__("0"), name)


_CONTAINERS = {"output": Adapted, "input": WithInput, "weight": WithWeight}
"""The container of a module with one argument, by the adapter's attribute `reads`."""


def adapted(module: nn.Module, adapter: nn.Module) -> Adapted:
    """Returns a container that runs a module and the adapter of the module's output."""
    kinds = [parameter.kind for parameter in inspect.signature(module.forward).parameters.values()]
    one = kinds in ([inspect.Parameter.POSITIONAL_ONLY], [inspect.Parameter.POSITIONAL_OR_KEYWORD])
    return (_CONTAINERS[str(adapter.reads)] if one else WithArguments)(module, adapter)
