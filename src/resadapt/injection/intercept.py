"""Intercepting the calls of a model's modules for a while.

Features computed before the first adapter can then be replayed instead of computed again.
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
    """Intercepts module calls that come before the first adapter or private module of a set.

    Up to that point a forward equals the backbone's, whichever set is active. Only the outermost
    modules that contain no adapter or private module are intercepted; functions called between
    the modules run normally.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        """The set that is active."""
        self.diverged = False
        """Whether an adapter or private module of the set has run."""
        self.position = 0
        """Number of intercepted calls so far."""
        self._inside = False
        self._thread = get_ident()

    @property
    def in_thread(self) -> bool:
        """Whether this is the thread that intercepts: in other threads the model runs normally."""
        return get_ident() == self._thread

    def start(self, name: str | None) -> None:
        """Begins a forward with a set."""
        self.name, self.diverged, self.position, self._inside = name, False, 0, False

    def call(self, place: str, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Returns the output to use for a module's call; subclasses override this."""
        return run(*args, **kwargs)

    def dispatch(self, place: str, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Passes an outermost call before the first adapter to `call`; runs all others."""
        if self.diverged or self._inside:
            return run(*args, **kwargs)
        self._inside = True
        try:
            return self.call(place, run, args, kwargs)
        finally:
            self._inside = False
            self.position += 1


@dataclass(eq=False)
class Intercept:
    """Replaces a module's forward on the instance.

    Args:
        interceptor: Handles the calls.
        place: Name of the module.
        run: The replaced forward.
        shareable: Whether the module contains no adapter or private module.
        private_in: Sets that have a private copy of the module.
        adapted_in: Sets that adapt the module's output.
    """

    interceptor: CallInterceptor
    place: str
    run: Callable[..., Any]
    shareable: bool
    private_in: Collection[str]
    adapted_in: Collection[str]

    @property
    def is_neutral(self) -> bool:
        """Whether the module itself runs, or its output is replaced by what it returned before."""
        return self.shareable and not self.adapted_in and _is_class_method(self.run)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module, or returns the interceptor's output."""
        interceptor = self.interceptor
        if not interceptor.in_thread:
            return self.run(*args, **kwargs)
        if interceptor.name in self.private_in:
            interceptor.diverged = True
        if self.shareable:
            output = interceptor.dispatch(self.place, self.run, args, kwargs)
        else:
            output = self.run(*args, **kwargs)
        if interceptor.name in self.adapted_in:
            interceptor.diverged = True
        return output


def replaced_forward(module: nn.Module) -> Any:
    """Returns the forward that user code has set on a module's instance, or None."""
    forward = module.__dict__.get("forward")
    if isinstance(forward, Intercept):
        forward = forward.run
    return None if _is_class_method(forward) else forward


def _is_class_method(method: object) -> bool:
    """Tells whether a bound method is the one that its object's class defines."""
    return (
        isinstance(method, MethodType)
        and getattr(type(method.__self__), method.__func__.__name__, None) is method.__func__
    )


_ONE_AT_A_TIME = RLock()
"""Held while calls are intercepted: two threads would restore forwards in the wrong order."""


@contextmanager
def intercepted(
    model: nn.Module, sets: Iterable[SetSpec], interceptor: CallInterceptor
) -> Iterator[None]:
    """Runs the body with the calls of a model's modules passing through an interceptor.

    Args:
        model: The unwrapped model.
        sets: The sets that the body runs.
        interceptor: Handles the calls.
    """
    private: dict[str, set[str]] = {}
    adapted: dict[str, set[str]] = {}
    for spec in sets:
        for place in spec.private:
            private.setdefault(place, set()).add(spec.name)
        for site in spec.sites:
            adapted.setdefault(site.owner, set()).add(spec.name)
    with _ONE_AT_A_TIME, ExitStack() as stack:
        for place, module, shareable in _places(model, {*private, *adapted}):
            private_in = private.get(place, ())
            intercept = Intercept(
                interceptor,
                place,
                module.forward,
                shareable and not private_in,
                private_in,
                adapted.get(place, ()),
            )
            stack.enter_context(put_over(module, "forward", intercept))
        yield


def _places(
    model: nn.Module, special: Collection[str], name: str = ""
) -> Iterator[tuple[str, nn.Module, bool]]:
    """Yields the special modules, and the outermost modules without a special module inside.

    The last entry is True for modules without a special module inside.
    """
    model = behind_wrappers(model)
    callable_ = type(model).forward is not nn.Module.forward or "forward" in model.__dict__
    shareable = callable_ and not any(
        place != name and (not name or within(place, (name,))) for place in special
    )
    if shareable or name in special:
        yield name, model, shareable
    if not shareable:
        for key, child in model._modules.items():
            if child is not None and not isinstance(child, AdapterSlot):
                yield from _places(child, special, f"{name}.{key}" if name else key)
