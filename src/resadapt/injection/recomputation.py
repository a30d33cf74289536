"""Recomputing checkpointed activations with the sets that the forward ran with.

`torch.utils.checkpoint` runs a part of a model again in the backward pass, when another set may be
active. What a slot ran in the forward is kept on the object that torch keeps for the recomputation.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils import checkpoint

from resadapt.base.errors import InjectionError, quote_names
from resadapt.injection.mixture import Mixture

__all__ = ["Choice", "as_in_forward", "checkpointed_calls", "thawed"]

_CHOICES = "_resadapt_choices"
"""Attribute of a checkpointed call: the choice of each slot that ran in it."""


class Choice(NamedTuple):
    """What a slot runs.

    Args:
        active: The set, if it has an adapter or private module in the slot; "" in compiled code.
        mixture: The set of each sample in a mixed batch, else None.
        trainable: Names of the slot's parameters that got gradients in the forward that is
            recomputed.
    """

    active: str | None
    mixture: Mixture | None
    trainable: frozenset[str] = frozenset()

    def to_keep(self, slot: Any) -> Choice:
        """Returns the choice for recomputations; the names of a mixture change while it runs."""
        mixture = None if self.mixture is None else Mixture(self.mixture.names)
        trainable = {name for name, each in slot.parameters_of(self) if each.requires_grad}
        return Choice(self.active, mixture, self.trainable | trainable)

    def matches(self, other: Choice) -> bool:
        """Tells whether two choices run the same sets."""
        names, others = (each.mixture and each.mixture.names for each in (self, other))
        return self.active == other.active and names == others


def as_in_forward(slot: Any, now: Choice) -> Choice:
    """Returns what a slot runs now; in a recomputation, what it ran in the forward.

    Args:
        slot: The slot, an `AdapterSlot`.
        now: What the slot runs outside of recomputations.

    Raises:
        InjectionError: The slot ran different sets in one checkpointed call, or what it ran is not
            known.
    """
    forwards, recomputed = checkpointed_calls()
    if recomputed is not None:
        choices = getattr(recomputed, _CHOICES, {})
        if slot not in choices:
            raise InjectionError(
                f"Checkpointed activations around {quote_names(slot.names)} are recomputed in the "
                "backward pass, but the sets of the forward are not known. Inject adapters before "
                "the forward, and checkpoint with torch.utils.checkpoint.checkpoint."
            )
        now = choices[slot]
    for call in forwards:
        if not hasattr(call, _CHOICES):
            setattr(call, _CHOICES, {})
        if not getattr(call, _CHOICES).setdefault(slot, now.to_keep(slot)).matches(now):
            raise InjectionError(
                f"{quote_names(slot.names)} ran with different sets inside one function that "
                "torch.utils.checkpoint recomputes. Checkpoint the parts separately, or switch "
                "sets outside of the function."
            )
    return now


@contextmanager
def thawed(slot: Any, choice: Choice) -> Iterator[None]:
    """Runs the body with the same parameters trainable as in the forward that is recomputed.

    As without checkpointing, gradients of parameters that were frozen since are dropped.
    """
    frozen = [
        parameter
        for name, parameter in slot.parameters_of(choice)
        if name in choice.trainable and not parameter.requires_grad
    ]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def checkpointed_calls() -> tuple[list[Any], Any]:
    """Returns the checkpointed forwards around the caller, and what is recomputed, if anything."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if torch.is_inference_mode_enabled() or (
        hooks is None and torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1
    ):
        return [], None  # neither a checkpointed forward nor a backward pass
    forwards: list[Any] = []
    if hooks and hooks[0].__qualname__.startswith("_checkpoint_hook."):
        forwards.append(inspect.getclosurevars(hooks[0]).nonlocals["frame"])
    frame = sys._getframe(1)
    while frame:
        code = frame.f_code
        if code.co_filename == checkpoint.__file__:
            values = frame.f_locals
            if code.co_name == "unpack_hook":
                return forwards, values["frame"]
            if code is checkpoint.CheckpointFunction.backward.__code__:
                return forwards, values["ctx"]
            if code is checkpoint.CheckpointFunction.forward.__code__:
                forwards.append(values["ctx"])
            elif "gen" in values:
                forwards.append(values["gen"].gi_frame.f_locals["new_frame"])
        frame = frame.f_back  # type: ignore[assignment]
    return forwards, None
