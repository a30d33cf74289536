"""The state of a training without the backbone: every set, and the backbone's fingerprint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from resadapt.base.errors import AdapterKeyError, quote_names, quote_reasons
from resadapt.base.fingerprint import Fingerprint
from resadapt.base.tensors import dtype_name
from resadapt.injection.ledger import Ledger, ledger_of
from resadapt.injection.switching import activate, check_switchable, train
from resadapt.injection.walk import unwrap
from resadapt.proof.drift import refuse_drift, refuse_other_backbone
from resadapt.proof.state import (
    adapter_state_dict,
    live_tensors,
    load_sets,
    refuse_unsaved_state,
)

__all__ = ["load_training_state_dict", "training_state_dict"]

_FORMAT = 1
_FIELDS: dict[str, Any] = {
    "format": int,
    "backbone": Mapping,
    "sets": Mapping,
    "tensors": Mapping,
    "active": str | None,
    "trained": list,
}


def training_state_dict(model: nn.Module) -> dict[str, Any]:
    """Returns all that training changes in an injected model: its sets, but not the backbone.

    Save it with the optimizer's state, in place of ``model.state_dict()``. The backbone's tensors
    are replaced by their fingerprint, so the state has the size of the sets. Loaded into a backbone
    that was built again and equally injected, training goes on bit for bit.

    Args:
        model: An injected model, wrapped or not. If it is sharded (FSDP2), all processes must call,
            and each gets the full tensors.

    Returns:
        A state for `torch.save`, which ``torch.load(path, weights_only=True)`` reads: copies of the
        parameters and persistent buffers of every set, the descriptions of the sets, the names of
        the active and the trainable sets, and the fingerprint of the backbone without the modules
        that the heads of all sets replace.

    Raises:
        InjectionError: Nothing was injected, a part of a set was lost, or the call is inside
            `adapters_for`.
        BackboneDriftError: The backbone has changed since the injection, and the state would not
            contain the change.
        AdapterFileError: A head or adapter has state besides parameters and buffers.
        AdapterKeyError: An adapter's tensors were changed in number or shape.

    Example:
        >>> import os, tempfile, torch
        >>> from torchvision.models import resnet18
        >>> from resadapt import inject_adapters
        >>> model = inject_adapters(resnet18())
        >>> path = os.path.join(tempfile.mkdtemp(), "training.pt")
        >>> torch.save({"model": training_state_dict(model)}, path)
        >>> os.path.getsize(path) < 0.02 * 45e6
        True
        >>> load_training_state_dict(model, torch.load(path, weights_only=True)["model"])
    """
    ledger, inner = ledger_of(model), unwrap(model)
    check_switchable(inner, ledger)
    for adapter_set in ledger.sets.values():
        refuse_unsaved_state(inner, adapter_set)
    refuse_drift(inner)
    return {
        "format": _FORMAT,
        "backbone": ledger.fingerprint.without(_replaced_by_all(ledger)).to_json(),
        "sets": {name: each.spec.to_json() for name, each in ledger.sets.items()},
        "tensors": {name: adapter_state_dict(inner, name) for name in ledger.sets},
        "active": ledger.active,
        "trained": sorted(ledger.trained),
    }


def load_training_state_dict(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Loads the state of a training into an equally injected model, strictly, and all or nothing.

    Every set gets its tensors, and the sets that were active and trainable become so again.

    Args:
        model: An injected model, wrapped or not, with the same backbone and the same sets. If it is
            sharded (FSDP2), all processes must call, and the tensors are distributed.
        state: A state as from `training_state_dict`.

    Raises:
        InjectionError: Nothing was injected, a part of a set was lost, or the call is inside
            `adapters_for`.
        AdapterKeyError: The state is of another kind, has other sets, or sets that were injected
            otherwise; or a tensor is missing, unexpected, or of another shape or dtype.
        BackboneMismatchError: The backbone is another one; the message lists tensors and modules.

    Example:
        >>> from torchvision.models import resnet18
        >>> from resadapt import inject_adapters
        >>> model = inject_adapters(resnet18(), "layer4", 8)
        >>> state = training_state_dict(model)
        >>> load_training_state_dict(model, state)
        >>> load_training_state_dict(inject_adapters(resnet18(), "layer4", 4), state)
        Traceback (most recent call last):
            ...
        resadapt.base.errors.AdapterKeyError: Set 'default' of the training state was injected ...
    """
    ledger, inner = ledger_of(model), unwrap(model)
    check_switchable(inner, ledger)
    backbone = _backbone_in(state)
    _check_sets(inner, ledger, state)
    head = _replaced_by_all(ledger)
    refuse_other_backbone(inner, backbone, head, "The training state", "the state")
    load_sets(inner, state["tensors"])
    activate(inner, ledger, state["active"])
    train(inner, ledger, state["trained"])


def _replaced_by_all(ledger: Ledger) -> tuple[str, ...]:
    """Returns the names of the modules that no set runs: each has its own in its head."""
    heads = [{*each.spec.head} for each in ledger.sets.values()]
    return tuple(sorted(set.intersection(*heads)))


def _backbone_in(state: object) -> Fingerprint:
    """Returns the fingerprint in a state, after a check of the state's form."""
    form = state.get("format") if isinstance(state, Mapping) else None
    if isinstance(form, int) and form > _FORMAT:  # its other entries may be unknown
        raise AdapterKeyError(
            f"The training state has format {form}; this version reads {_FORMAT}. Install a newer "
            "resadapt."
        )
    if not isinstance(state, Mapping) or state.keys() != {*_FIELDS}:
        found = [*map(str, state)] if isinstance(state, Mapping) else [type(state).__name__]
        raise AdapterKeyError(
            f"state is not from training_state_dict: it should have the entries "
            f"{quote_names(_FIELDS)}; found {quote_names(found) or 'none'}. For the state of a "
            "whole model, call model.load_state_dict(state)."
        )
    try:
        if wrong := [name for name, kind in _FIELDS.items() if not isinstance(state[name], kind)]:
            raise TypeError(f"{quote_names(wrong)} is of another type")
        if form != _FORMAT:
            raise ValueError(f"its format is {form}")
        names = {*state["sets"]}
        if names != {*state["tensors"]} or not {*state["trained"]} <= names:
            raise ValueError("it is about other sets than it contains")
        if state["active"] not in {None, *names}:
            raise ValueError("its active set is not among its sets")
        for each in (*state["sets"].values(), *state["tensors"].values()):
            if not isinstance(each, Mapping):
                raise TypeError("a set is not described by a mapping")
        return Fingerprint.from_json(state["backbone"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise AdapterKeyError(
            f"The training state is damaged: {error!r}. Save it again."
        ) from error


def _check_sets(model: nn.Module, ledger: Ledger, state: Mapping[str, Any]) -> None:
    """Checks that a model has the sets of a state, injected in the same way."""
    if state["sets"].keys() != ledger.sets.keys():
        raise AdapterKeyError(
            f"The training state has the sets {quote_names(state['sets'])}; the model has "
            f"{quote_names(ledger.sets)}. Inject the same sets first."
        )
    for name, recorded in state["sets"].items():
        adapter_set = ledger.sets[name]
        then, today = dict(_leaves(recorded)), dict(_leaves(adapter_set.spec.to_json()))
        tensors, given = live_tensors(model, adapter_set), state["tensors"][name]
        for values, source in ((then, given), (today, tensors)):
            values |= {
                f"dtype of {key}": dtype_name(source[key])
                for key in tensors
                if isinstance(given.get(key), Tensor)
            }
        if wrong := {
            key: f"was {then.get(key)!r:.60}, and is {today.get(key)!r:.60} in the model"
            for key in [*then, *(key for key in today if key not in then)]
            if then.get(key) != today.get(key)
        }:
            raise AdapterKeyError(
                f"Set {name!r} of the training state was injected otherwise: "
                f"{quote_reasons(wrong)}. Inject it with the arguments of the training, and "
                "convert the model first if it was converted there. To start another training from "
                "these adapters, load a file of save_adapters instead."
            )


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the values inside JSON values by path, and empty containers."""
    inside = value.items() if isinstance(value, Mapping) else enumerate(value)
    for key, each in inside:
        name = f"{path}.{key}" if path else str(key)
        if isinstance(each, dict | list) and each:
            yield from _leaves(each, name)
        else:
            yield name, each
