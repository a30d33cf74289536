"""The one place where a model changes: a set goes in, becomes the active one, goes out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from resadapt.adapters import FAMILIES
from resadapt.base.errors import InjectionError, listing
from resadapt.base.fingerprint import fingerprint
from resadapt.base.spec import SetSpec, SiteSpec
from resadapt.injection.freeze import NORM_POLICIES, freeze_norms, freeze_parameters, is_frozen, thaw_norms, within
from resadapt.injection.hooks import attach, detach, unwatch, watch_first_forward
from resadapt.injection.ledger import LEDGER, AdapterSet, Ledger, adapter_tensors, clone_head, find_ledger, swap, unwrap
from resadapt.injection.select import owner_of
from resadapt.injection.slots import AdapterSlot, backbone_modules, backbone_tensors, slots_of

__all__ = ["activate", "activated", "adapter_shapes", "check_model", "install", "switch", "uninstall"]


def check_model(model: nn.Module) -> None:
    """Refuses what cannot be injected into at all.

    Raises:
        InjectionError: It is no module, a wrapper, or has parts that cannot be read or frozen.
    """
    if unwrap(model) is not model:
        raise InjectionError(f"{type(model).__name__} wraps the model: inject into the model first, then wrap it.")
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise InjectionError(
                f"Module {path!r} is compiled TorchScript, which cannot be frozen. Inject first, then script or trace."
            )
    for path, tensor in backbone_tensors(model):
        if is_lazy(tensor) or tensor.is_meta:
            raise InjectionError(f"Tensor {path!r} has no values yet. Load the weights, or run the model once, before injecting.")
        if tensor.layout is not torch.strided:
            raise InjectionError(f"Tensor {path!r} is {tensor.layout}, of which no fingerprint can be taken. Make it dense.")


@torch.inference_mode(False)  # what is made here is to be trained
def install(model: nn.Module, spec: SetSpec, example: Any = None) -> None:
    """Injects the set that a description tells, all or nothing, and makes it the active one.

    Args:
        model: The model.
        spec: The set.
        example: Description of the example input, None if there is none.

    Raises:
        InjectionError: The model cannot take the set.
    """
    ledger = find_ledger(model)
    _check_set(model, spec, ledger)
    adapters = {site: _build(model, spec, site) for site in spec.sites}
    record = AdapterSet(spec, example)
    if ledger is None:
        ledger = Ledger(
            fingerprint=fingerprint(backbone_tensors(model)),
            requires_grad={path: t.requires_grad for path, t in backbone_tensors(model) if isinstance(t, nn.Parameter)},
            training={path: module.training for path, module in backbone_modules(model)},
        )
    with activated(model, ledger, None):
        record.parked_head = clone_head(model, spec.head)
    active = ledger.active
    model.__dict__[LEDGER] = ledger
    ledger.sets[spec.name] = record
    try:
        switch(model, ledger, None)
        freeze_parameters(model)
        for site, adapter in adapters.items():
            slot = attach(model.get_submodule(site.owner))
            slot.sites[spec.name] = site
            slot.add_module(spec.name, adapter)
        activate(model, ledger, spec.name)
        watch_first_forward(model)
    except BaseException:
        uninstall(model, ledger, spec.name, then=active)
        raise


def activate(model: nn.Module, ledger: Ledger, name: str | None) -> None:
    """Makes one set, or none, the one that the model runs with."""
    if name == ledger.active:
        return
    old = ledger.sets[ledger.active] if ledger.active is not None else None
    new = ledger.sets[name] if name is not None else None
    leaving = list(adapter_tensors(model, old.spec)) if old else []  # which fails, if it does, before anything changes
    entering = list(adapter_tensors(model, new.spec)) if new else []
    if old:
        old.parked_head = swap(model, ledger.parked_plain)
        for path, tensor in leaving:
            old.parked_requires_grad[path] = tensor.requires_grad
            tensor.requires_grad_(False)
        ledger.parked_plain = {}
        ledger.active = None
    if new:
        ledger.parked_plain = swap(model, new.parked_head)
        for path, tensor in entering:
            tensor.requires_grad_(new.parked_requires_grad.get(path, tensor.requires_grad))
        new.parked_head, new.parked_requires_grad = {}, {}
        ledger.active = name
    for slot in slots_of(model):
        slot.active = name if name in slot.sites else None
    freeze_norms(model, new.spec.head if new else ())


@contextmanager
def activated(model: nn.Module, ledger: Ledger, name: str | None) -> Iterator[None]:
    """Runs the body with one set, or none, active; the set that was active before becomes so again, if it is still there."""
    active = ledger.active
    activate(model, ledger, name)
    try:
        yield
    finally:
        activate(model, ledger, active if active in ledger.sets else None)


def switch(model: nn.Module, ledger: Ledger, name: str | None) -> None:
    """Activates a set for good: the one that is left loses its gradients, so that no optimizer can apply them later."""
    left = ledger.sets[ledger.active] if ledger.active not in (None, name) else None
    activate(model, ledger, name)
    if left is not None:
        for tensor in (*dict(adapter_tensors(model, left.spec)).values(), *left.parked_head.values()):
            tensor.grad = None


def uninstall(model: nn.Module, ledger: Ledger, name: str, then: str | None = None) -> None:
    """Takes a set out; after the last one the model is what it was before the first.

    Args:
        model: The whole model.
        ledger: Its ledger.
        name: The set.
        then: The set to activate instead if it was the active one.
    """
    if ledger.active == name:
        activate(model, ledger, then)
    for _, module in list(backbone_modules(model)):
        for slot in [child for child in module._modules.values() if isinstance(child, AdapterSlot)]:
            slot.sites.pop(name, None)
            slot._modules.pop(name, None)
            if not slot._modules:
                detach(module)
    del ledger.sets[name]
    if ledger.sets:
        return
    thaw_norms(model)
    unwatch(model)
    for path, module in backbone_modules(model):
        module.training = ledger.training.get(path, module.training)
        for key, parameter in module._parameters.items():
            if parameter is not None:
                full = f"{path}.{key}" if path else key
                parameter.requires_grad_(ledger.requires_grad.get(full, parameter.requires_grad))
    del model.__dict__[LEDGER]


def _check_set(model: nn.Module, spec: SetSpec, ledger: Ledger | None) -> None:
    if spec.norm not in NORM_POLICIES:
        raise InjectionError(f"norm={spec.norm!r} does not exist; there is {listing(list(NORM_POLICIES))}.")
    if not isinstance(spec.dropout, float) or not 0.0 <= spec.dropout < 1.0:
        raise InjectionError(f"dropout={spec.dropout!r} is not a probability in [0, 1).")
    if not isinstance(spec.name, str) or not re.fullmatch(r"\w[\w-]*", spec.name) or hasattr(AdapterSlot(), spec.name):
        raise InjectionError(
            f"name={spec.name!r} cannot name a set: use letters, digits, '_' and '-', and no name that torch.nn.Module uses itself."
        )
    if ledger is None:
        inside = [path for path, module in backbone_modules(model) if LEDGER in module.__dict__]
        if inside or next(slots_of(model), None) is not None:
            where = f"Its submodule {inside[0]!r} was injected into on its own" if inside else "It is a part of an injected model"
            raise InjectionError(
                f"This {type(model).__name__} carries adapters already. {where}: call remove_adapters there first."
            )
        if shared := [path for path, module in backbone_modules(model) if is_frozen(module)]:
            raise InjectionError(
                f"Module {shared[0]!r} was frozen by an injection into another model, which shares it. Inject into a "
                "model that holds all, or into a copy.deepcopy of this one."
            )
    elif spec.name in ledger.sets:
        raise InjectionError(
            f"The model has an adapter set {spec.name!r} already. Choose another name=, or call "
            f"remove_adapters(model, {spec.name!r}) first."
        )
    for site in spec.sites:
        if (owner := owner_of(model, site.name)) != site.owner:
            raise InjectionError(f"Site {site.name!r} is {owner!r} in this model, where {site.owner!r} was described.")
        if within(site.owner, spec.head):
            raise InjectionError(f"Site {site.name!r} lies in the head, which is trained anyway. Take it out of layers or of head.")


def adapter_shapes(spec: SetSpec, site: SiteSpec) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the parameters and buffers that an adapter will have, without memory for them.

    Raises:
        InjectionError: The set's family or options do not exist, or no tensor can be of that size.
    """
    with torch.device("meta"):
        return {key: tuple(tensor.shape) for key, tensor in backbone_tensors(_new_adapter(spec, site))}


def _new_adapter(spec: SetSpec, site: SiteSpec) -> nn.Module:
    if spec.family not in FAMILIES:
        raise InjectionError(f"family={spec.family!r} does not exist; there is {listing(list(FAMILIES))}.")
    try:
        return FAMILIES[spec.family](site.channels, site.bottleneck, site.spatial_dims, dropout=spec.dropout, **spec.options)
    except (TypeError, ValueError) as error:
        raise InjectionError(f"family {spec.family!r} does not take these options: {error}.") from error
    except RuntimeError as error:
        raise InjectionError(f"Site {site.name!r} cannot have an adapter of bottleneck {site.bottleneck}: {error}") from error


def _build(model: nn.Module, spec: SetSpec, site: SiteSpec) -> nn.Module:
    owner = model.get_submodule(site.owner)
    with torch.device("cpu"):  # the same numbers from the same seed, wherever the model is
        adapter = _new_adapter(spec, site)
    near = [t for m in (owner, model) for _, t in backbone_tensors(m) if isinstance(t, nn.Parameter) and t.is_floating_point()]
    if near:
        adapter.to(near[0].device, near[0].dtype)
    return adapter.train(model.training)
