"""Running a model without side effects on its state and the random state."""

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
from torch import Tensor, nn

from resadapt.base.attributes import attributes_kept
from resadapt.base.autocast import device_kinds, under_autocast
from resadapt.base.inputs import map_tensors, named_in
from resadapt.base.tensors import all_modules, dense_parts, local_shard, same_bits

__all__ = [
    "EAGERLY",
    "Snapshot",
    "call",
    "dry_run",
    "is_undisturbed",
    "outputs_of",
    "put_over",
    "random_state",
    "random_states_kept",
    "restored",
    "undisturbed",
]


class Snapshot:
    """Training flags, buffers, `requires_grad` and gradients of a model at one moment.

    Args:
        modules: The model's modules, or those that may change.
        values: Whether the values of buffers and gradients are copied too, and not only references
            to the tensors.
    """

    def __init__(self, modules: Iterable[nn.Module], values: bool = True) -> None:
        def copied(tensor: Tensor | None) -> Tensor | None:
            return tensor.clone() if values and tensor is not None else None

        self._flags = [(module, module.training) for module in modules]
        modules = [module for module, _ in self._flags]
        self._buffers = [
            (module, {key: (b, copied(b)) for key, b in module._buffers.items()})
            for module in modules
        ]
        parameters = {
            id(p): p for each in modules for p in each._parameters.values() if p is not None
        }
        self._parameters = [
            (p, p.requires_grad, p.grad, copied(p.grad)) for p in parameters.values()
        ]
        self.devices = {parameter.device for parameter in parameters.values()}

    @torch.no_grad()
    def restore(self) -> None:
        """Restores the recorded state."""
        for module, training in self._flags:
            if module.training is not training:  # setting an attribute of a module is slow
                module.training = training
        for module, before in self._buffers:
            _restore_buffers(module, before)
        for parameter, requires_grad, gradient, value in self._parameters:
            if parameter.requires_grad is not requires_grad:
                parameter.requires_grad_(requires_grad)
            # Compares only the local shard: other processes may not run this code.
            if (
                gradient is not None
                and value is not None
                and not same_bits(local_shard(gradient), local_shard(value))
            ):
                gradient.copy_(value)
            parameter.grad = gradient


def _restore_buffers(
    module: nn.Module, before: dict[str, tuple[Tensor | None, Tensor | None]]
) -> None:
    for key in [key for key in module._buffers if key not in before]:
        del module._buffers[key]
    for key, (buffer, value) in before.items():
        module._buffers[key] = buffer  # the module may have assigned another tensor
        if buffer is None or value is None or torch.equal(buffer, value):
            continue
        if buffer.shape == value.shape:
            buffer.copy_(value)
        else:  # resized in place
            module._buffers[key] = value


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Runs the body in evaluation mode, eagerly and without gradients, and restores the state.

    Restored are training flags, buffers, `requires_grad`, gradients, and the random states.
    """
    modules = all_modules(model)
    snapshot = Snapshot(modules)
    with random_states_kept(snapshot.devices), torch.no_grad(), EAGERLY:
        try:
            for module in modules:  # not model.eval(), which may be overridden
                if module.training:
                    module.training = False
            yield
        finally:
            snapshot.restore()
            # Weights that autocast has cast without a graph, which training would then use.
            torch.clear_autocast_cache()


@contextmanager
def undisturbed(model: nn.Module, autocast: torch.dtype | None = None) -> Iterator[None]:
    """Runs the body as `restored` does, in a given precision and without merged norms.

    The outputs of two models can then be compared.

    Args:
        model: The model.
        autocast: The dtype of autocast; None runs without autocast, in a region too.
    """
    with restored(model), ExitStack() as stack, under_autocast(autocast, device_kinds(model)):
        stack.callback(_inside.reset, _inside.set(True))
        yield


@contextmanager
def put_over(module: nn.Module, attribute: str, value: object) -> Iterator[None]:
    """Sets an instance attribute of a module, such as `forward`, inside the context."""
    before = module.__dict__.get(attribute, _MISSING)
    module.__dict__[attribute] = value
    try:
        yield
    finally:
        if before is _MISSING:
            module.__dict__.pop(attribute, None)
        else:
            module.__dict__[attribute] = before


def random_state() -> bytes:
    """Returns the CPU random states of torch, Python and NumPy as bytes."""
    numpy: Any = sys.modules.get("numpy")
    return pickle.dumps(
        (
            torch.get_rng_state().tolist(),
            random.getstate(),
            numpy.random.get_state() if numpy else None,
        )
    )


@contextmanager
def random_states_kept(devices: Iterable[torch.device]) -> Iterator[None]:
    """Restores the random states of torch, Python and NumPy after the body."""
    numpy: Any = sys.modules.get("numpy")  # if it was not imported, it drew nothing
    before, numpy_before = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(
            devices=sorted({device.index for device in devices if device.type == "cuda"})
        ):
            yield
    finally:
        random.setstate(before)
        if numpy:
            numpy.random.set_state(numpy_before)


def call(model: nn.Module, inputs: object) -> object:
    """Calls a model with a tuple as ``*args``, a dict as ``**kwargs``, else with one argument."""
    if isinstance(inputs, tuple):
        return model(*inputs)
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(inputs)


def dry_run(model: nn.Module, inputs: object) -> object:
    """Calls a model as `undisturbed` does, on a copy of the inputs, and undoes what the call sets.

    The model's hooks and attributes do not change either.
    """
    with attributes_kept(model), undisturbed(model):
        return call(model, map_tensors(inputs, torch.clone))


class _Eagerly:
    """Context manager that runs compiled functions eagerly.

    Compilation has one switch for all threads. The first thread that enters turns compilation off,
    the last thread that leaves turns it on again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._switch = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            # Without torch._dynamo nothing is compiled, and the import takes a second.
            if self._inside == 0 and "torch._dynamo" in sys.modules:
                self._switch.enter_context(_compilation_off())
            self._inside += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._switch.close()


EAGERLY = _Eagerly()
_MISSING = object()
_inside: ContextVar[bool] = ContextVar("resadapt_undisturbed", default=False)


def is_undisturbed() -> bool:
    """Returns whether the caller runs inside `undisturbed`."""
    return _inside.get()


def _compilation_off() -> AbstractContextManager[object]:
    if hasattr(torch.compiler, "set_stance"):  # from torch 2.6
        eager: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
        return eager
    older: AbstractContextManager[object] = torch._dynamo.config.patch(disable=True)
    return older


def outputs_of(
    model: nn.Module, inputs: object, autocast: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Runs a model in evaluation mode and returns the tensors of the output by their places.

    The state of the model and the inputs do not change.

    Args:
        model: The model.
        inputs: The input, as for `call`.
        autocast: As for `undisturbed`.
    """
    copied = map_tensors(inputs, torch.clone)  # the model may write to its inputs in place
    with undisturbed(model, autocast):
        return dict(_dense_outputs(call(model, copied)))


def _dense_outputs(output: object) -> Iterator[tuple[str, Tensor]]:
    """Iterates over the dense tensors of an output, and the dense parts of its other tensors."""
    for place, tensor in named_in(output):
        parts = list(dense_parts(tensor))
        if len(parts) == 1:
            yield place, parts[0]
        else:
            yield from ((f"{place}.part{number}", part) for number, part in enumerate(parts))
