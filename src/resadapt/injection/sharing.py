"""Several sets over the same input, with what they share computed once."""

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
from resadapt.base.undisturbed import EAGERLY, call, is_checkpointed
from resadapt.injection.intercept import CallInterceptor, intercepted
from resadapt.injection.ledger import ledger_of
from resadapt.injection.mixture import InTurns
from resadapt.injection.switching import mixed
from resadapt.injection.walk import are_sharded, backbone_modules, unwrap

__all__ = ["forward_all"]


def forward_all(
    model: nn.Module, inputs: object, names: Iterable[str | None] | None = None
) -> dict[str | None, Any]:
    """Runs several sets over the same input, and what comes before a set's first adapter, norm or
    head of its own only once.

    Each output is that of a forward with that set alone, to the last bit; in an optimized backbone,
    where a norm that one set has as its own is folded for none, up to rounding. What the sets share
    is drawn once where it is random, and hooks inside a module that is shared run once. Compiled
    modules run as they were before they were compiled.

    In training, the sets become trainable, as in `adapters_for`, and one backward pass of the sum
    of their losses reaches all of them. Checkpointed activations would be computed anew with the
    active set, and are refused.

    Args:
        model: An injected model.
        inputs: What the model is called with: one input, a tuple of arguments or a dict of
            keywords.
        names: Names of sets, None for the plain backbone; all sets if left out.

    Returns:
        The output of each, by name, in the order of `names`.

    Raises:
        InjectionError: Nothing was injected; or, in training, the model is in
            DistributedDataParallel, which would average nothing, or checkpoints activations.
        AdapterKeyError: There is no such set.
        AdapterError: `names` is no list of names.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from resadapt import inject_adapters
        >>> model = inject_adapters(resnet18(), "layer4", name="day", head={"fc": nn.Linear(512, 3)})
        >>> model = inject_adapters(model, "layer4", name="night", head={"fc": nn.Linear(512, 10)}).eval()
        >>> outputs = forward_all(model, torch.randn(2, 3, 32, 32))
        >>> {name: tuple(output.shape) for name, output in outputs.items()}
        {'day': (2, 3), 'night': (2, 10)}
    """
    ledger = ledger_of(model)
    if isinstance(names, str) or not isinstance(names, Iterable | None):
        raise AdapterError(
            f"names={names!r}: give a list of names of sets, None among them for the plain "
            "backbone."
        )
    listed = list(ledger.sets if names is None else names)
    specs = {name: ledger.set_named(name).spec for name in listed if name is not None}
    turns = InTurns(dict.fromkeys(listed))
    if isinstance(model, DistributedDataParallel) and torch.is_grad_enabled():
        raise InjectionError(
            "DistributedDataParallel averages one forward at a time: run each set on its own, or "
            "model.module."
        )
    inner = unwrap(model)
    if are_sharded(module for _, module in backbone_modules(inner)):
        raise InjectionError(
            "The model is sharded (fully_shard), and gathers its parts call by call: run each set "
            "on its own."
        )
    shared = _Shared(site.owner for spec in specs.values() for site in spec.sites)
    outputs = {}
    with ExitStack() as stack:
        stack.enter_context(EAGERLY)
        if torch.is_inference_mode_enabled():  # there, nothing tells of changes in place
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            inputs = map_tensors(inputs, torch.clone)
        stack.enter_context(mixed(inner, ledger, turns))
        stack.enter_context(intercepted(inner, specs.values(), shared))
        for name in turns.names:
            turns.name = name
            ledger.mixing = () if name is None else (name,)
            shared.start(name)
            outputs[name] = call(inner, inputs)
    return outputs


@dataclass
class _Call:
    """A module's call in a forward of the plain backbone."""

    place: str
    output: Any
    versions: tuple[int, ...] | None
    """Of the tensors in the output when it was returned.

    None if the call is to be made again each time.
    """


class _Shared(CallInterceptor):
    """Remembers the calls of the plain backbone, for the sets that have not parted from it yet.

    Args:
        owners: Names of the modules whose outputs a set adapts.
    """

    def __init__(self, owners: Iterable[str]) -> None:
        super().__init__()
        self._owners = {*owners}
        self._calls: list[_Call] = []
        self._training = torch.is_grad_enabled()

    @override
    def arrive(self, place: str, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Refuses a call that would be computed again in the backward pass, when no set's turn can be told."""
        if self._training and is_checkpointed():
            raise InjectionError(
                f"Module {place!r} runs in torch.utils.checkpoint, which computes it anew for the "
                "backward pass, with the active set: run each set on its own, or call the model "
                "without checkpointing."
            )
        return super().arrive(place, run, args, kwargs)

    @override
    def call(self, place: str, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Returns the output of the first time, if nothing has changed it since."""
        if self.position < len(self._calls):
            known = self._calls[self.position]
            if known.place != place:
                self.parted = True
            elif known.versions is not None and known.versions == _versions(known.output):
                if (
                    place in self._owners
                ):  # an adapter may have saved it for backward, and the model may add to it in place
                    return known.output.clone()
                return (
                    known.output
                    if isinstance(known.output, torch.Tensor)
                    else copy.copy(known.output)
                )
            return run(*args, **kwargs)
        before = _versions((args, kwargs))
        output = run(*args, **kwargs)
        again = before is None or before != _versions((args, kwargs)) or not _is_simple(output)
        self._calls.append(
            _Call(place, None, None) if again else _Call(place, output, _versions(output))
        )
        return output


def _versions(value: object) -> tuple[int, ...] | None:
    """Tells how often each tensor in a value was changed in place; None if that cannot be known."""
    tensors = [tensor for _, tensor in named_in(value)]
    return (
        None
        if any(tensor.is_inference() for tensor in tensors)
        else tuple(tensor._version for tensor in tensors)
    )


def _is_simple(output: object) -> bool:
    """Tells whether a copy of a value shares no more than tensors with it."""
    items = (
        output.values()
        if isinstance(output, dict)
        else output
        if isinstance(output, list | tuple)
        else [output]
    )
    return all(isinstance(item, torch.Tensor) for item in items)
