"""Classes put over a module's own class for a while, so that names, parameters and `isinstance` stay as they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

__all__ = [
    "FOLDED",
    "Overlay",
    "class_of",
    "is_ours",
    "mixin_of",
    "put_class",
    "stock_classes",
    "strip",
    "uncover",
]

FOLDED = "_resadapt_folded"
"""Attribute of a frozen convolution that keeps its weight merged with the norm behind it."""
_ATTRIBUTES = (FOLDED, "__module__")
"""Attributes that a module has only while an `Overlay` is over its class."""
_MIXIN = "_resadapt_mixin"
"""Attribute of a class made at run time: the mixin that it adds to its second base."""
_FIRST = "_resadapt_first"
"""Attribute of a class made at run time.

The class of torch.nn.utils.parametrize that it stands for.
"""


class Overlay:
    """Marks the classes that this library puts over a module's class."""


def class_of(module: nn.Module) -> type[nn.Module]:
    """Returns a module's class beneath a parametrization and a mixin.

    What `put_class` has put there.
    """
    beneath = _beneath(module)
    return beneath.__bases__[1] if _MIXIN in vars(beneath) else beneath


def mixin_of(module: nn.Module) -> type | None:
    """Returns the mixin that a module's class has, None if it has none."""
    return vars(_beneath(module)).get(_MIXIN)


def put_class(module: nn.Module, kind: Any, mixin: type | None) -> None:
    """Gives a module another class, with or without a mixin, beneath the parametrization of torch
    if there is one.

    Copies of a module share a class that torch.nn.utils.parametrize has made, so that one stays as
    it is: the module gets another like it, and later the same again.
    """
    kind = kind if mixin is None else _with_mixin(kind, mixin)
    if not is_parametrized(module):
        module.__class__ = kind
        return
    made = vars(type(module))
    content = {
        key: value for key, value in made.items() if key not in ("__dict__", "__weakref__", _FIRST)
    }
    first = made.get(_FIRST, type(module))
    if first.__bases__ == (kind,) and content.keys() <= vars(first).keys():
        module.__class__ = first
    else:
        module.__class__ = type(first.__name__, (kind,), content | {_FIRST: first})


def is_ours(kind: type) -> bool:
    """Tells whether a class was put over a module's class, by this library or by sharding."""
    return _MIXIN in vars(kind) or kind.__module__.startswith(("resadapt.", "torch.distributed."))


def strip(module: nn.Module) -> None:
    """Takes the attributes off a module that an `Overlay` needs."""
    for key in _ATTRIBUTES:
        module.__dict__.pop(key, None)


def uncover(module: nn.Module) -> None:
    """Gives a module the class that it was built with."""
    if isinstance(module, Overlay):
        strip(module)
        put_class(
            module,
            next(cls for cls in class_of(module).__mro__ if not issubclass(cls, Overlay)),
            None,
        )


@contextmanager
def stock_classes(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Runs the body with modules of the classes that they were built with."""
    covered = [
        (
            module,
            type(module),
            {key: module.__dict__[key] for key in _ATTRIBUTES if key in module.__dict__},
        )
        for module in modules
        if isinstance(module, Overlay)
    ]
    try:
        for module, *_ in covered:
            uncover(module)
        yield
    finally:
        for module, kind, attributes in covered:
            module.__class__ = kind
            module.__dict__.update(attributes)


def _beneath(module: nn.Module) -> type[nn.Module]:
    return type(module).__bases__[0] if is_parametrized(module) else type(module)


def _with_mixin(kind: type[nn.Module], mixin: type) -> type[nn.Module]:
    """Returns the one class that adds a mixin to another, with the name and module of the latter.

    Torch.fx goes by these.
    """
    for made in kind.__subclasses__():
        if vars(made).get(_MIXIN) is mixin:
            return made
    names = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    return type(kind.__name__, (mixin, kind), names | {_MIXIN: mixin})
