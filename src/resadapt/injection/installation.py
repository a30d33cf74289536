"""Installing a set in a model and uninstalling it, all or nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from resadapt.base.errors import InjectionError, quote_names
from resadapt.base.fingerprint import Fingerprint
from resadapt.base.spec import SetSpec, SiteSpec, within
from resadapt.base.undisturbed import Snapshot
from resadapt.injection.building import build, family_named, saved_shapes
from resadapt.injection.freeze import (
    allow_statistics_reset,
    freeze_backbone,
    freeze_norm,
    frozen_modules,
    is_frozen,
    norms_of,
    unfreeze_norm,
)
from resadapt.injection.hooks import (
    attach,
    detach,
    slot_of,
    unwatch,
    unwatch_private,
    watch,
    watch_private,
)
from resadapt.injection.ledger import (
    LEDGER,
    AdapterSet,
    Ledger,
    find_ledger,
    set_modules,
    set_tensors,
)
from resadapt.injection.private import HOOKS, computing_hooks, private_copies, route, unroute
from resadapt.injection.select import owner_of
from resadapt.injection.slots import AdapterSlot
from resadapt.injection.switching import activate, check_switchable, on_backbone, train
from resadapt.injection.walk import (
    are_sharded,
    backbone_modules,
    backbone_tensors,
    behind_wrappers,
    find_module,
    find_slot,
    replace_module,
    slots_of,
    unwrap,
)

__all__ = ["check_model", "install", "take_place", "uninstall"]


def check_model(model: nn.Module) -> None:
    """Checks that a model can be injected into at all.

    Raises:
        InjectionError: The model is not a module, is a wrapper, or has parts that cannot be read or
            frozen.
    """
    if unwrap(model) is not model:
        raise InjectionError(
            f"{type(model).__name__} wraps the model: inject into the model first, then wrap it."
        )
    for path, module in backbone_modules(model):
        if isinstance(module, torch.jit.ScriptModule):
            raise InjectionError(
                f"{f'Module {path!r}' if path else 'The model'} is compiled TorchScript, which "
                "cannot be frozen or hooked. Inject into the Python model before scripting; "
                "resadapt.inference_copy(model) returns a model that can be scripted."
            )
    if are_sharded(module for _, module in backbone_modules(model)):
        raise InjectionError(
            "The model is sharded already, and gradients of adapters injected now would not be "
            "averaged. Inject first, then call fully_shard."
        )
    for path, tensor in backbone_tensors(model):
        if is_lazy(tensor) or tensor.is_meta:
            raise InjectionError(
                f"Tensor {path!r} has no values yet. Load the weights, run the model once, or undo "
                "offloading, then inject."
            )
        if tensor.layout is not torch.strided:
            raise InjectionError(
                f"Tensor {path!r} is {tensor.layout} and cannot be fingerprinted. Make it dense."
            )


@torch.inference_mode(False)  # inference tensors could not be trained later
def install(
    model: nn.Module,
    spec: SetSpec,
    example: Any,
    heads: Mapping[str, nn.Module],
    fingerprint: Fingerprint | None = None,
    fill: Callable[[], None] = lambda: None,
    dtype: torch.dtype | None = None,
    **start: Any,
) -> None:
    """Injects a set by its description, all or nothing, and makes the set active.

    Args:
        model: The model.
        spec: The set.
        example: Form of the example input, None if there is none.
        heads: The modules to copy for the set's head, by name in the model.
        fingerprint: Fingerprint of the model now, if known; used for the first set only.
        fill: Called once the set is in the model, to load values; if `fill` raises, the set is
            uninstalled.
        dtype: Least dtype of adapters, head and norms; None for the backbone's dtypes.
        **start: Options that only affect the adapters' initial values.

    Raises:
        InjectionError: The model cannot take the set.
    """
    ledger = find_ledger(model)
    if ledger is None:
        _check_untouched(model)
    else:
        _check_new(ledger, spec.name)
        check_switchable(model, ledger)  # whatever set has lost a part
    with on_backbone(model):
        _check_set(model, spec)
        adapters = {site: build(model, spec, site, start, dtype) for site in spec.sites}
        private = _private_copies(model, spec, heads, dtype)
        _check_unique_names(adapters)
    shapes = {
        f"{site.name}.{key}": shape
        for site, adapter in adapters.items()
        for key, shape in saved_shapes(adapter).items()
    }
    if ledger is None:
        ledger = Ledger(
            fingerprint=fingerprint
            or Fingerprint.of(dict(backbone_modules(model)), dict(backbone_tensors(model))),
            requires_grad={
                path: t.requires_grad
                for path, t in backbone_tensors(model)
                if isinstance(t, nn.Parameter)
            },
            training={path: module.training for path, module in backbone_modules(model)},
        )
    before, snapshot = ledger.active, Snapshot(_may_change(model, ledger), values=False)
    try:
        model.__dict__[LEDGER] = ledger
        ledger.sets[spec.name] = AdapterSet(spec, example, shapes)
        freeze_backbone(model)
        for site, adapter in adapters.items():
            attach(find_module(model, site.owner)).insert(spec.name, site, adapter)
        for name, module in private.items():
            _insert_private(model, spec, name, module)
        activate(model, ledger, spec.name)
        watch(model)
        fill()
        train(model, ledger, (spec.name,))
        ledger.sets[spec.name].trainable = {
            path for path, tensor in set_tensors(model, spec).items() if tensor.requires_grad
        }
        ledger.frozen = frozen_modules(model)
    except BaseException:
        uninstall(model, ledger, [spec.name])
        if ledger.sets:
            activate(model, ledger, before)
        snapshot.restore()
        raise


def _may_change(model: nn.Module, ledger: Ledger) -> Iterator[nn.Module]:
    """Yields the modules that an injection may change: the backbone, and the trained sets."""
    yield from (module for _, module in backbone_modules(model))
    for name in ledger.trained:
        for _, module in set_modules(model, ledger.sets[name].spec):
            yield from module.modules()


def _private_copies(
    model: nn.Module, spec: SetSpec, heads: Mapping[str, nn.Module], dtype: torch.dtype | None
) -> dict[str, nn.Module]:
    """Returns a set's private modules, with `requires_grad` as the norm policy says."""
    copies = private_copies(model, spec.private, heads, dtype)
    for name in spec.norms:
        for parameter in copies[name].parameters():
            parameter.requires_grad_("affine" in spec.norm)
        if "stats" not in spec.norm:
            freeze_norm(copies[name])
    for name, module in copies.items():
        place = find_module(model, name)
        module.train(model.training if is_frozen(place) else place.training)
        watch_private(module)
    return copies


def _insert_private(model: nn.Module, spec: SetSpec, name: str, module: nn.Module) -> None:
    place = find_module(model, name)
    holder, name = route(place, name)
    slot_of(holder).insert_private(spec.name, name, module)


def uninstall(model: nn.Module, ledger: Ledger, names: Iterable[str]) -> None:
    """Removes sets; after the last set, restores the model as it was before the first.

    Does not check whether removal can succeed: call `check_switchable` first.
    """
    names = {*names}
    if ledger.active in names:
        activate(model, ledger, None)
    for name in names:
        ledger.sets.pop(name, None)
    ledger.trained -= names
    for _, module in list(backbone_modules(model)):
        if slot := find_slot(module):
            for name in names:
                slot.remove(name)
            if not slot.sites:
                detach(module)
    used = {
        id(find_module(model, place))
        for adapter_set in ledger.sets.values()
        for place in adapter_set.spec.private
    }
    for _, module in backbone_modules(model):
        if id(module) not in used:
            unroute(module)
    if not ledger.sets:
        _restore_backbone(model, ledger)


def take_place(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replaces a module of the backbone by another module for good, and moves the hooks."""
    place = find_module(model, name)
    computing = computing_hooks(place)
    for kind in HOOKS:
        hooks = getattr(place, kind)
        moved = [key for key in hooks if key not in computing]
        getattr(module, kind).update({key: hooks.pop(key) for key in moved})
    replace_module(model, place, module)
    unwatch_private(module)
    allow_statistics_reset(module)


def _restore_backbone(model: nn.Module, ledger: Ledger) -> None:
    """Restores a model without sets as it was before the first injection."""
    for _, module in backbone_modules(model):
        unfreeze_norm(module)
    unwatch(model)
    for path, module in backbone_modules(model):
        module.training = ledger.training.get(path, module.training)
    for wrapper in nn.Module.modules(model):
        wrapper.training = behind_wrappers(wrapper).training
    for path, tensor in backbone_tensors(model):
        if isinstance(tensor, nn.Parameter):
            # The flag of an inference tensor can only be set in inference mode.
            with torch.inference_mode(tensor.is_inference()):
                tensor.requires_grad_(ledger.requires_grad.get(path, tensor.requires_grad))
    model.__dict__.pop(LEDGER, None)


def _check_untouched(model: nn.Module) -> None:
    """Refuses a model that was injected into through a submodule or a parent module."""
    inside = [path for path, module in backbone_modules(model) if LEDGER in module.__dict__]
    if inside or next(slots_of(model), None) is not None:
        where = (
            f"Its submodule {inside[0]!r} was injected into separately"
            if inside
            else "It is part of an injected model"
        )
        raise InjectionError(
            f"This {type(model).__name__} carries adapters already. {where}: call remove_adapters "
            "there first."
        )
    if shared := [path for path, module in backbone_modules(model) if is_frozen(module)]:
        raise InjectionError(
            f"Module {shared[0]!r} was frozen by an injection into another model that shares the "
            "module. Inject into a model that contains both, or into a copy.deepcopy of this one."
        )


def _check_new(ledger: Ledger, name: str) -> None:
    if name in ledger.sets:
        raise InjectionError(
            f"The model has an adapter set {name!r} already. Choose another name=, or call "
            f"remove_adapters(model, {name!r}) first."
        )


def _check_unique_names(adapters: Mapping[SiteSpec, nn.Module]) -> None:
    """Refuses adapters with two tensors of the same name in a file."""
    paths: set[str] = set()
    for site, adapter in adapters.items():
        for path in {f"{site.name}.{key}" for key in saved_shapes(adapter)}:
            if path in paths:
                raise InjectionError(
                    f"The adapters at {site.name!r} and at the module around it both have a tensor "
                    f"{path!r}. Choose one of the two sites, or rename the family's attributes."
                )
            paths.add(path)


def _check_set(model: nn.Module, spec: SetSpec) -> None:
    if spec.norms != norms_of(model, spec.norm, spec.head):
        raise InjectionError(
            f"norm={spec.norm!r}: the norms {quote_names(spec.norms)} are not those of this model."
        )
    family_named(spec.family)
    if not 0.0 <= spec.dropout < 1.0:
        raise InjectionError(f"dropout={spec.dropout!r} is not a probability in [0, 1).")
    if not re.fullmatch(r"\w[\w-]*", spec.name) or hasattr(AdapterSlot(), spec.name):
        raise InjectionError(
            f"name={spec.name!r} cannot name a set: use letters, digits, '_' and '-', and no "
            "attribute name of torch.nn.Module."
        )
    for site in spec.sites:
        if (owner := owner_of(model, site.name)) != site.owner:
            raise InjectionError(
                f"Site {site.name!r} is {owner!r} in this model, but {site.owner!r} in the file."
            )
        if within(site.owner, spec.head):
            raise InjectionError(
                f"Site {site.name!r} is inside the head, which is trained anyway. Remove the site "
                "from layers or the module from head."
            )
