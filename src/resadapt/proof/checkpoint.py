"""A set's tensors in and out of a model: strict, all or nothing, and only on the backbone they belong to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from resadapt.base.errors import AdapterFileError, AdapterKeyError, BackboneMismatchError, InjectionError, listing
from resadapt.base.fingerprint import differences, dtype_name, explained
from resadapt.files.adapter_file import AdapterInfo, read_adapter_file
from resadapt.injection.freeze import within
from resadapt.injection.installation import adapter_shapes, check_model, install, switch, uninstall
from resadapt.injection.ledger import Ledger, adapter_tensors, find_ledger, head_tensors, ledger_of, plain_tensors, unwrap
from resadapt.injection.slots import backbone_tensors, fleeting

__all__ = [
    "adapter_state_dict",
    "load_adapter_state_dict",
    "load_adapters",
    "restore",
    "set_tensors",
]

ModelT = TypeVar("ModelT", bound=nn.Module)


def adapter_state_dict(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Returns copies of a set's tensors: adapters and head, nothing of the backbone.

    Args:
        model: An injected model.
        name: The set; it need not be the active one.

    Returns:
        Tensors by name, as ``adapters.<site>.<tensor>`` and ``head.<name in the model>``.

    Raises:
        InjectionError: Nothing was injected.
        AdapterKeyError: There is no such set.

    Example:
        >>> from torchvision.models import resnet18
        >>> from resadapt import inject_adapters
        >>> list(adapter_state_dict(inject_adapters(resnet18(), "layer4", 8)))[:2]
        ['adapters.layer4.down.weight', 'adapters.layer4.down.bias']
    """
    return {key: tensor.detach().clone() for key, tensor in set_tensors(unwrap(model), ledger_of(model), name).items()}


def load_adapter_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], name: str = "default") -> None:
    """Copies tensors into a set: strict, and all or nothing.

    Args:
        model: An injected model.
        state_dict: Tensors as from `adapter_state_dict`.
        name: The set; it need not be the active one.

    Raises:
        InjectionError: Nothing was injected.
        AdapterKeyError: There is no such set; or a tensor is missing, unexpected, of another shape, or would lose precision.

    Example:
        >>> from torchvision.models import resnet18
        >>> from resadapt import inject_adapters
        >>> model = inject_adapters(resnet18(), "layer4", 8)
        >>> load_adapter_state_dict(model, adapter_state_dict(model))
    """
    live = set_tensors(unwrap(model), ledger_of(model), name)
    ready = _fitting(live, state_dict, name)
    with torch.no_grad():
        for key, tensor in live.items():
            tensor.copy_(ready[key])


def load_adapters(model: ModelT, path: str | os.PathLike[str], *, name: str | None = None) -> ModelT:
    """Loads an adapter file into a model and makes its set the active one.

    If the model has no set of that name, the adapters are injected as the file describes. Nothing in the file is executed, and a
    failing call leaves the model as it was.

    Args:
        model: The backbone that the adapters were trained on, plain or injected.
        path: The file.
        name: Name for the set; None is the file's own.

    Returns:
        The same model.

    Raises:
        AdapterFileError: The file is missing, damaged, of another kind, of a newer format, or cannot be injected into this model.
        BackboneMismatchError: The backbone is another one; the message names the tensors.
        AdapterKeyError: The model's set or head does not have the file's form.

    Example:
        >>> import os, tempfile, torch
        >>> from torchvision.models import resnet18
        >>> from resadapt import inject_adapters, save_adapters
        >>> backbone = resnet18()
        >>> weights = {key: value.clone() for key, value in backbone.state_dict().items()}
        >>> path = os.path.join(tempfile.mkdtemp(), "adapters.pt")
        >>> report = save_adapters(inject_adapters(backbone), path)
        >>> fresh = resnet18()
        >>> _ = fresh.load_state_dict(weights)
        >>> model = load_adapters(fresh, path).eval()
        >>> x = torch.randn(1, 3, 64, 64)
        >>> torch.equal(model(x), backbone.eval()(x))
        True
    """
    info, tensors = read_adapter_file(path)
    name = name or info.set.name
    ledger = find_ledger(model)
    if ledger is None or name not in ledger.sets:
        check_model(model)
    restore(unwrap(model), info, tensors, name)
    return model


def restore(model: nn.Module, info: AdapterInfo, tensors: Mapping[str, Tensor], name: str) -> None:
    """Puts the content of a file into a model under a set name, all or nothing.

    Raises:
        AdapterFileError, BackboneMismatchError, AdapterKeyError: As `load_adapters`.
    """
    ledger = find_ledger(model)
    spec = replace(info.set, name=name)
    _check_match(model, ledger, info)
    state = {key: tensor for key, tensor in tensors.items() if key.startswith(("adapters.", "head."))}
    if ledger is not None and name in ledger.sets:
        if differing := spec.differences(ledger.sets[name].spec):
            raise AdapterKeyError(
                f"{info.path}: the model's set {name!r} differs from the file's in {listing(differing)}. Load it under another "
                f"name=, or call remove_adapters(model, {name!r}) first."
            )
        load_adapter_state_dict(model, state, name)
        switch(model, ledger, name)
        return
    active = ledger.active if ledger is not None else None
    try:
        _check_description(info)
        head = {f"head.{key}": tensor for key, tensor in persistent(model, head_tensors(model, spec.head)).items()}
        _fitting(head, {key: tensor for key, tensor in state.items() if key.startswith("head.")}, name)
        with torch.random.fork_rng(devices=[]):  # the adapters' start is overwritten at once
            install(model, spec, info.example)
    except (InjectionError, AttributeError) as error:  # AttributeError: there is no module of that name
        raise AdapterFileError(f"{info.path}: cannot be injected into this {type(model).__name__}: {error}") from error
    try:
        load_adapter_state_dict(model, state, name)
    except BaseException:
        uninstall(model, ledger_of(model), name, then=active)
        raise


def set_tensors(model: nn.Module, ledger: Ledger, name: str) -> dict[str, Tensor]:
    """Returns a set's own tensors, parameters and persistent buffers, by their names in a file."""
    record = ledger.set_named(name)
    tensors = {f"adapters.{key}": tensor for key, tensor in adapter_tensors(model, record.spec)}
    head = persistent(model, record.parked_head or head_tensors(model, record.spec.head))
    return tensors | {f"head.{path}": tensor for path, tensor in head.items()}


def persistent(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leaves out the buffers that a module does not save."""
    skipped = fleeting(model)
    return {path: tensor for path, tensor in tensors.items() if path not in skipped}


def _fitting(live: Mapping[str, Tensor], given: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Returns copies of the given tensors that can take the place of the live ones, or raises with all that is wrong."""
    if not isinstance(given, Mapping):
        raise AdapterKeyError(f"state_dict is {type(given).__name__}, not a mapping from names to tensors.")
    problems = {key: "is missing" for key in live if key not in given}
    problems |= {key: "is unexpected" for key in given if key not in live}
    ready: dict[str, Tensor] = {}
    for key, tensor in live.items():
        if key not in given:
            continue
        value = given[key]
        if not isinstance(value, Tensor):
            problems[key] = f"is {type(value).__name__}, not a tensor"
        elif value.shape != tensor.shape:
            problems[key] = f"has shape {list(value.shape)} where the model has {list(tensor.shape)}"
        elif value.layout is not torch.strided or value.is_meta or value.is_quantized:
            problems[key] = "is no dense tensor with values"
        else:
            ready[key] = value.detach().to(tensor.device, tensor.dtype, copy=True)
            if not torch.equal(ready[key].to(value.device, value.dtype), value) and value.dtype != tensor.dtype:
                problems[key] = f"is {dtype_name(value)} and would lose precision in the model's {dtype_name(tensor)}"
    if problems:
        head = any(key.startswith("head.") for key in problems)
        mend = (
            "Give the model a head of the saved shape before injecting or loading."
            if head
            else "Inject with the layers, bottleneck and family that the tensors were made with."
        )
        raise AdapterKeyError(f"The tensors do not fit the set {name!r}: {explained(problems)}. {mend}")
    return ready


def _check_description(info: AdapterInfo) -> None:
    """Holds the adapters that a file describes against the tensors that it has, before memory is given to any of them."""
    for site in info.set.sites:
        described = {f"adapters.{site.name}.{key}": shape for key, shape in adapter_shapes(info.set, site).items()}
        if wrong := [key for key, shape in described.items() if key not in info.tensors or info.tensors[key].shape != shape]:
            raise AdapterFileError(
                f"{info.path}: it describes an adapter at site {site.name!r} whose tensors it does not have: {listing(wrong)}. "
                "Save it again."
            )


def _check_match(model: nn.Module, ledger: Ledger | None, info: AdapterInfo) -> None:
    plain = plain_tensors(model, ledger) if ledger is not None else dict(backbone_tensors(model))
    outside = {path: tensor for path, tensor in plain.items() if not within(path, info.set.head)}
    if wrong := differences(outside, info.backbone, fleeting(model)):
        raise BackboneMismatchError(
            f"{info.path}: the backbone is not the one these adapters were trained on; {len(wrong)} tensors are "
            f"not those of the file: {explained(wrong)}. Load the backbone's own weights, in their own dtype, into the model first."
        )
