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
from resadapt.base.inputs import map_tensors, named_in
from resadapt.base.tensors import dense_parts, local_shard, same_bits

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
        model: The model.
        values: Whether the values of buffers and gradients are copied too, and not only references
            to the tensors.
    """

    def __init__(self, model: nn.Module, values: bool = True) -> None:
        def copied(tensor: Tensor | None) -> Tensor | None:
            return tensor.clone() if values and tensor is not None else None

        modules = list(nn.Module.modules(model))
        self._flags = [(module, module.training) for module in modules]
        self._buffers = [
            (module, {key: (b, copied(b)) for key, b in module._buffers.items()})
            for module in modules
        ]
        self._parameters = [
            (p, p.requires_grad, p.grad, copied(p.grad)) for p in nn.Module.parameters(model)
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Restores the recorded state."""
        for module, training in self._flags:
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
    devices = {parameter.device for parameter in nn.Module.parameters(model)}
    snapshot = Snapshot(model)
    with random_states_kept(devices), torch.no_grad(), EAGERLY:
        try:
            for module in nn.Module.modules(model):  # not model.eval(), which may be overridden
                module.training = False
            yield
        finally:
            snapshot.restore()
            # Weights that autocast has cast without a graph, which training would then use.
            torch.clear_autocast_cache()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Runs the body as `restored` does, without autocast and without merged norms.

    The outputs of two models can then be compared.
    """
    kinds = {parameter.device.type for parameter in nn.Module.parameters(model)} or {"cpu"}
    with restored(model), ExitStack() as stack:
        stack.callback(_inside.reset, _inside.set(True))
        for kind in kinds - {"meta"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
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


def outputs_of(model: nn.Module, inputs: object) -> dict[str, Tensor]:
    """Runs a model in evaluation mode and returns the tensors of the output by their places.

    The state of the model and the inputs do not change.
    """
    copied = map_tensors(inputs, torch.clone)  # the model may write to its inputs in place
    with undisturbed(model):
        return dict(_dense_outputs(call(model, copied)))


def _dense_outputs(output: object) -> Iterator[tuple[str, Tensor]]:
    """Iterates over the dense tensors of an output, and the dense parts of its other tensors."""
    for place, tensor in named_in(output):
        parts = list(dense_parts(tensor))
        if len(parts) == 1:
            yield place, parts[0]
        else:
            yield from ((f"{place}.part{number}", part) for number, part in enumerate(parts))
