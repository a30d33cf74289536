"""Temporary subclasses and mixins for a module's class.

Only the class of the module changes, so names, parameters and `isinstance` stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

__all__ = [
    "CONSTANTS",
    "PAIRS",
    "Mixin",
    "Overlay",
    "class_of",
    "mixin_of",
    "put_class",
    "stock_classes",
    "strip",
    "uncover",
    "users_class",
]

CONSTANTS = "_resadapt_constants"
"""Attribute of an optimized layer: tensors computed from its frozen tensors."""
PAIRS = "_resadapt_pairs"
"""Attribute of a module: the convolutions among its children, and the norms that follow them."""
_ATTRIBUTES = (CONSTANTS, PAIRS, "__module__")
"""Attributes that a module has only while its class is an `Overlay`."""
_MIXIN = "_resadapt_mixin"
"""Attribute of a class created at run time: the mixin that is added to the second base."""
_FIRST = "_resadapt_first"
"""Attribute of a class created at run time: the original class of torch.nn.utils.parametrize."""


class Overlay:
    """Base of the classes that temporarily replace a module's class."""


class Mixin(Overlay):
    """Base of the overlays that are added to any class, which creates a class at run time."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles the module by its stock class and the mixin."""
        reduced: Any = super().__reduce_ex__(2)
        module: Any = self
        return _blank, (class_of(module), mixin_of(module)), *reduced[2:]


def _blank(kind: type[nn.Module], mixin: type) -> nn.Module:
    """Returns a module of a class with a mixin, without attributes."""
    module = kind.__new__(kind)
    put_class(module, kind, mixin)
    return module


def class_of(module: nn.Module) -> type[nn.Module]:
    """Returns a module's class without parametrization and mixin, as given to `put_class`."""
    beneath = _beneath(module)
    return beneath.__bases__[1] if _MIXIN in vars(beneath) else beneath


def mixin_of(module: nn.Module) -> type | None:
    """Returns the mixin of a module's class, None if there is none."""
    return vars(_beneath(module)).get(_MIXIN)


def put_class(module: nn.Module, kind: Any, mixin: type | None) -> None:
    """Replaces a module's class, with or without a mixin; a parametrization stays on top.

    Copies of a module share the class that torch.nn.utils.parametrize created. That class is not
    changed: the module gets an equivalent class, and the original class when `kind` is its base.
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


def users_class(module: nn.Module) -> type[nn.Module]:
    """Returns a module's class without those that this library and sharding put on it."""
    return next(cls for cls in type(module).__mro__ if not _is_put_on(cls))


def _is_put_on(kind: type) -> bool:
    return _MIXIN in vars(kind) or kind.__module__.startswith(("resadapt.", "torch.distributed."))


def strip(module: nn.Module) -> None:
    """Removes the attributes that a module has for an `Overlay`."""
    for key in _ATTRIBUTES:
        module.__dict__.pop(key, None)


def uncover(module: nn.Module) -> None:
    """Restores the class that a module was built with."""
    if isinstance(module, Overlay):
        strip(module)
        built = next(cls for cls in class_of(module).__mro__ if not issubclass(cls, Overlay))
        put_class(module, built, None)


@contextmanager
def stock_classes(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restores, inside the context, the classes that the modules were built with."""

    def attributes_of(module: nn.Module) -> dict[str, Any]:
        return {key: module.__dict__[key] for key in _ATTRIBUTES if key in module.__dict__}

    overlaid = [each for each in modules if isinstance(each, Overlay)]
    covered = [(module, type(module), attributes_of(module)) for module in overlaid]
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
    """Returns the subclass of `kind` with a mixin; each pair has a single such subclass.

    The name and module are those of `kind`, since torch.fx identifies leaf modules by them.
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
