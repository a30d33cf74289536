"""Running several sets on the same input, with the shared modules computed once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from resadapt.base.errors import AdapterError, InjectionError
from resadapt.base.inputs import map_tensors, named_in
from resadapt.base.undisturbed import EAGERLY, call
from resadapt.injection.intercept import CallInterceptor, intercepted
from resadapt.injection.ledger import ledger_of
from resadapt.injection.mixture import OneOfMany
from resadapt.injection.recomputation import checkpointed_calls
from resadapt.injection.switching import mixed
from resadapt.injection.walk import are_sharded, backbone_modules, unwrap

__all__ = ["forward_all"]


def forward_all(
    model: nn.Module, inputs: object, names: Iterable[str | None] | None = None
) -> dict[str | None, Any]:
    """Runs several sets on one input; modules before a set's first adapter run only once.

    Modules are shared up to the first adapter, private norm or head of a set. Each output equals
    that of a forward with that set alone, bit for bit. In an optimized backbone they are equal up
    to rounding, since a norm that one set has a private copy of is folded for none. Random modules
    that are shared draw once, and hooks inside shared modules run once. Compiled modules run
    uncompiled.

    In training, the sets become trainable, as in `adapters_for`, and one backward pass of the sum
    of their losses reaches all of them. Activation checkpointing is refused: it would recompute
    what is shared.

    Args:
        model: An injected model.
        inputs: The input of the model: one input, a tuple of positional arguments or a dict of
            keyword arguments.
        names: Names of sets, None for the backbone without adapters; by default all sets.

    Returns:
        The outputs by name, in the order of `names`.

    Raises:
        InjectionError: Nothing was injected; or, in training, the model is wrapped in
            DistributedDataParallel or checkpoints activations.
        AdapterKeyError: There is no such set.
        AdapterError: `names` is not a list of names.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from resadapt import inject_adapters
        >>> heads = {"day": {"fc": nn.Linear(512, 3)}, "night": {"fc": nn.Linear(512, 10)}}
        >>> model = inject_adapters(resnet18(), "layer4", name="day", head=heads["day"])
        >>> model = inject_adapters(model, "layer4", name="night", head=heads["night"])
        >>> outputs = forward_all(model.eval(), torch.randn(2, 3, 32, 32))
        >>> {name: tuple(output.shape) for name, output in outputs.items()}
        {'day': (2, 3), 'night': (2, 10)}
    """
    ledger = ledger_of(model)
    if isinstance(names, str) or not isinstance(names, Iterable | None):
        raise AdapterError(
            f"names={names!r}: give a list of names of sets, with None for the backbone without "
            "adapters."
        )
    listed = list(ledger.sets if names is None else names)
    specs = {name: ledger.set_named(name).spec for name in listed if name is not None}
    mixture = OneOfMany(dict.fromkeys(listed))
    if isinstance(model, DistributedDataParallel) and torch.is_grad_enabled():
        raise InjectionError(
            "DistributedDataParallel averages one forward at a time: run the sets one by one, or "
            "pass model.module."
        )
    inner = unwrap(model)
    if are_sharded(module for _, module in backbone_modules(inner)):
        raise InjectionError(
            "The model is sharded (fully_shard) and gathers parameters for each call: run the sets "
            "one by one."
        )
    shared = _Shared(site.owner for spec in specs.values() for site in spec.sites)
    outputs = {}
    with ExitStack() as stack:
        stack.enter_context(EAGERLY)
        if torch.is_inference_mode_enabled():  # inference tensors do not count in-place changes
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            inputs = map_tensors(inputs, torch.clone)
        stack.enter_context(mixed(inner, ledger, mixture))
        stack.enter_context(intercepted(inner, specs.values(), shared))
        for name in mixture.names:
            mixture.name = name
            ledger.mixing = () if name is None else (name,)
            shared.start(name)
            outputs[name] = call(inner, inputs)
    return outputs


@dataclass
class _Call:
    """A module's call before any set diverged from the backbone."""

    place: str
    output: Any
    versions: tuple[int, ...] | None
    """Version counters of the output's tensors when returned; None if the call must be repeated."""


class _Shared(CallInterceptor):
    """Reuses the outputs of calls for all sets that have not diverged from the backbone yet.

    Args:
        owners: Names of the modules whose outputs a set adapts.
    """

    def __init__(self, owners: Iterable[str]) -> None:
        super().__init__()
        self._owners = {*owners}
        self._calls: list[_Call] = []
        self._training = torch.is_grad_enabled()

    @override
    def dispatch(self, place: str, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Refuses checkpointed calls: a recomputation cannot reuse outputs of another set's."""
        if self._training and checkpointed_calls()[0]:
            raise InjectionError(
                f"Module {place!r} runs in torch.utils.checkpoint, which would recompute in the "
                "backward pass what this set shares with another: run the sets one by one, or call "
                "the model without checkpointing."
            )
        return super().dispatch(place, run, args, kwargs)

    @override
    def call(self, place: str, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Returns the first call's output, unless it was changed in place since."""
        if self.position < len(self._calls):
            known = self._calls[self.position]
            if known.place != place:
                self.diverged = True
            elif known.versions is not None and known.versions == _versions(known.output):
                output = known.output
                # An adapter may have saved the output, and the model may add to it in place.
                if place in self._owners:
                    return output.clone()
                return output if isinstance(output, torch.Tensor) else copy.copy(output)
            return run(*args, **kwargs)
        before = _versions((args, kwargs))
        output = run(*args, **kwargs)
        again = before is None or before != _versions((args, kwargs)) or not _is_simple(output)
        self._calls.append(
            _Call(place, None, None) if again else _Call(place, output, _versions(output))
        )
        return output


def _versions(value: object) -> tuple[int, ...] | None:
    """Returns the version counters of the tensors in a value; None for inference tensors."""
    tensors = [tensor for _, tensor in named_in(value)]
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return tuple(tensor._version for tensor in tensors)


def _is_simple(output: object) -> bool:
    """Tells whether a shallow copy of a value shares only tensors with the value."""
    if isinstance(output, dict):
        output = list(output.values())
    items = output if isinstance(output, list | tuple) else [output]
    return all(isinstance(item, torch.Tensor) for item in items)
