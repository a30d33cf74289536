"""Running a model without leaving a trace on it."""

from __future__ import annotations

import pickle
import random
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from resadapt.base.snapshot import Snapshot

__all__ = ["EAGERLY", "call", "is_undisturbed", "put_over", "random_state", "random_states_kept", "restored", "undisturbed"]


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Runs the body in evaluation mode, eagerly and without gradients, and restores everything that it may have moved.

    Restored are training flags, buffers, `requires_grad`, gradients, and the random states.
    """
    devices = {parameter.device for parameter in nn.Module.parameters(model)} or {torch.device("cpu")}
    snapshot = Snapshot(model)
    with random_states_kept(devices), torch.no_grad(), EAGERLY:
        try:
            for module in nn.Module.modules(model):  # not model.eval(), which a model may have made do more than this
                module.training = False
            yield
        finally:
            snapshot.restore()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Runs the body as `restored` does, without autocast and with no norm folded: outputs that two models can be compared by."""
    kinds = {parameter.device.type for parameter in nn.Module.parameters(model)} or {"cpu"}
    with restored(model), ExitStack() as stack:
        stack.callback(_inside.reset, _inside.set(True))
        for kind in kinds - {"meta"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def put_over(module: nn.Module, attribute: str, value: object) -> Iterator[None]:
    """Runs the body with an attribute of a module's own, such as another forward, over what is there."""
    before = module.__dict__.get(attribute, _NOTHING)
    module.__dict__[attribute] = value
    try:
        yield
    finally:
        if before is _NOTHING:
            module.__dict__.pop(attribute, None)
        else:
            module.__dict__[attribute] = before


def random_state() -> bytes:
    """Returns what changes when a random number is drawn from torch, Python or NumPy, on the CPU."""
    numpy: Any = sys.modules.get("numpy")
    return pickle.dumps((torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state() if numpy else None))


@contextmanager
def random_states_kept(devices: Iterable[torch.device]) -> Iterator[None]:
    """Puts the random states of torch, Python and NumPy back after the body."""
    numpy: Any = sys.modules.get("numpy")  # not imported: nothing has been drawn with it
    before, numpy_before = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices=sorted({device.index for device in devices if device.type == "cuda"})):
            yield
    finally:
        random.setstate(before)
        if numpy:
            numpy.random.set_state(numpy_before)


def call(model: nn.Module, inputs: object) -> object:
    """Calls a model with a tuple as its arguments, a dict as its keywords, or anything else as its one argument."""
    if isinstance(inputs, tuple):
        return model(*inputs)
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(inputs)


class _Eagerly:
    """Runs compiled functions as they were before they were compiled, for as long as any thread is inside.

    Whether functions run compiled is one switch for all threads: the first one in turns it off, the last one out turns it on again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._switch = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0 and "torch._dynamo" in sys.modules:  # else nothing is compiled; importing it takes a second
                self._switch.enter_context(_compilation_off())
            self._inside += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._switch.close()


EAGERLY = _Eagerly()
_NOTHING = object()
_inside: ContextVar[bool] = ContextVar("resadapt_undisturbed", default=False)


def is_undisturbed() -> bool:
    """Tells whether this is called inside of `undisturbed`."""
    return _inside.get()


def _compilation_off() -> AbstractContextManager[object]:
    if hasattr(torch.compiler, "set_stance"):  # from torch 2.6
        eager: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
        return eager
    older: AbstractContextManager[object] = torch._dynamo.config.patch(disable=True)
    return older
