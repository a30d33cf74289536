"""Standing between a model and its modules for a while.

What comes before the first adapter need not be computed each time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from threading import RLock, get_ident
from types import MethodType
from typing import Any

from torch import nn

from resadapt.base.spec import SetSpec, within
from resadapt.base.undisturbed import put_over
from resadapt.injection.slots import AdapterSlot
from resadapt.injection.walk import behind_wrappers

__all__ = ["CallInterceptor", "Intercept", "intercepted", "replaced_forward"]


class CallInterceptor:
    """What happens to the calls of modules before a set's first own module, in the order of the
    forward.

    Until then a forward is that of the plain backbone, whichever set runs. Only the outermost
    modules without anything of a set's inside are called through this; the functions between them
    run as they are.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        """The set that runs."""
        self.parted = False
        """Whether something of its own has run."""
        self.position = 0
        """Number of calls so far."""
        self._inside = False
        self._thread = get_ident()

    @property
    def is_here(self) -> bool:
        """Whether this is the thread whose forward it is: others run the model as it is."""
        return get_ident() == self._thread

    def start(self, name: str | None) -> None:
        """Begins a forward with a set."""
        self.name, self.parted, self.position, self._inside = name, False, 0, False

    def call(self, place: str, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Returns what stands for the output of a module: override it."""
        return run(*args, **kwargs)

    def arrive(self, place: str, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Passes a call on: to `call` if it is an outermost one of the prefix."""
        if self.parted or self._inside:
            return run(*args, **kwargs)
        self._inside = True
        try:
            return self.call(place, run, args, kwargs)
        finally:
            self._inside = False
            self.position += 1


@dataclass(eq=False)
class Intercept:
    """What stands in the place of a module's forward.

    Args:
        prefix: What decides.
        place: Name of the module.
        run: The module's own forward.
        plain: Whether there is nothing of a set's inside.
        own: Sets that have the module as their own.
        adapted: Sets that adapt its output.
    """

    prefix: CallInterceptor
    place: str
    run: Callable[..., Any]
    plain: bool
    own: Collection[str]
    adapted: Collection[str]

    @property
    def only_passes_on(self) -> bool:
        """Whether a module that is not called at all, because another computes it too, is nothing that this needs to know."""
        return self.plain and not self.adapted and _is_of_class(self.run)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module, or what stands for it."""
        prefix = self.prefix
        if not prefix.is_here:
            return self.run(*args, **kwargs)
        if prefix.name in self.own:
            prefix.parted = True
        output = (
            prefix.arrive(self.place, self.run, args, kwargs)
            if self.plain
            else self.run(*args, **kwargs)
        )
        if prefix.name in self.adapted:
            prefix.parted = True
        return output


def replaced_forward(module: nn.Module) -> Any:
    """Returns what stands over a module's forward besides what is put there here.

    None if nothing does.
    """
    forward = module.__dict__.get("forward")
    if isinstance(forward, Intercept):
        forward = forward.run
    return None if _is_of_class(forward) else forward


def _is_of_class(method: object) -> bool:
    """Tells whether a method is that of its object's class, not one that was put over it."""
    return (
        isinstance(method, MethodType)
        and getattr(type(method.__self__), method.__func__.__name__, None) is method.__func__
    )


_ONE_AT_A_TIME = RLock()
"""Held while something stands between models and their modules.

What two threads put there would come off in the wrong order.
"""


@contextmanager
def intercepted(
    model: nn.Module, sets: Iterable[SetSpec], prefix: CallInterceptor
) -> Iterator[None]:
    """Runs the body with the calls of a model's modules passing through a prefix.

    Args:
        model: The unwrapped model.
        sets: Those that the body runs.
        prefix: What stands between.
    """
    own: dict[str, set[str]] = {}
    adapted: dict[str, set[str]] = {}
    for spec in sets:
        for place in spec.private:
            own.setdefault(place, set()).add(spec.name)
        for site in spec.sites:
            adapted.setdefault(site.owner, set()).add(spec.name)
    with _ONE_AT_A_TIME, ExitStack() as stack:
        for place, module, plain in _places(model, {*own, *adapted}):
            here = own.get(place, ())
            attribute = _entry(module)
            intercept = Intercept(
                prefix,
                place,
                getattr(module, attribute),
                plain and not here,
                here,
                adapted.get(place, ()),
            )
            stack.enter_context(put_over(module, attribute, intercept))
        yield


def _places(
    model: nn.Module, special: Collection[str], name: str = ""
) -> Iterator[tuple[str, nn.Module, bool]]:
    """Walks the outermost modules without a special one inside, and the special ones.

    The last entry tells which it is.
    """
    model = behind_wrappers(model)
    callable_ = type(model).forward is not nn.Module.forward or "forward" in model.__dict__
    plain = callable_ and not any(
        place != name and (not name or within(place, (name,))) for place in special
    )
    if plain or name in special:
        yield name, model, plain
    if not plain:
        for key, child in model._modules.items():
            if child is not None and not isinstance(child, AdapterSlot):
                yield from _places(child, special, f"{name}.{key}" if name else key)


def _entry(module: nn.Module) -> str:
    """Returns the method that all calls of a module end in.

    A convolution may be computed together with the norm behind it.
    """
    stock = type(module).forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
    return "_conv_forward" if stock and "forward" not in module.__dict__ else "forward"
