"""Loading adapter files: all or nothing, and only into the backbone that they were saved from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from resadapt.base.errors import (
    AdapterError,
    AdapterFileError,
    AdapterKeyError,
    InjectionError,
    quote_names,
)
from resadapt.base.fingerprint import Fingerprint
from resadapt.base.spec import build_from, form_of, is_buildable, within
from resadapt.base.tensors import dtype_name
from resadapt.files.adapter_file import AdapterInfo, read_adapter_file
from resadapt.injection.building import meta_adapter, saved_shapes
from resadapt.injection.installation import check_model, install
from resadapt.injection.ledger import find_ledger, ledger_of
from resadapt.injection.select import called_modules, select_head
from resadapt.injection.switching import on_backbone, switch
from resadapt.injection.walk import backbone_modules, backbone_tensors, unwrap
from resadapt.proof.drift import refuse_other_backbone
from resadapt.proof.state import (
    convert_set,
    fitting,
    live_tensors,
    load_adapter_state_dict,
    tensors_to_save,
)

__all__ = ["fingerprint_of", "in_called_modules", "load_adapters", "load_file_content"]

ModelT = TypeVar("ModelT", bound=nn.Module)


def load_adapters(
    model: ModelT,
    path: str | bytes | os.PathLike[str],
    *,
    name: str | None = None,
    head: Mapping[str, nn.Module] | None = None,
) -> ModelT:
    """Loads an adapter file into a model and makes the loaded set active.

    If the model has no set of that name, the adapters are injected as the file describes. Nothing
    in the file is executed, and a failing call leaves the model unchanged.

    Args:
        model: The backbone that the adapters were trained on, injected or not.
        path: The file; or a directory that `save_adapters` wrote; or the address of a repository on
            the Hugging Face Hub, ``"hf://user/name"``, ``"hf://user/name@revision"`` or
            ``"hf://user/name@revision/file"`` (extra ``resadapt[hub]``). A file that is in the
            Hub's cache is not downloaded again, also if the repository has a newer one.
        name: The set to load into; None is the name in the file.
        head: Modules of the head's form, by name in the model; the set gets copies, with the file's
            values. Needed for a head that is not made of torch.nn layers and differs from the
            model's module, such as torchvision's ``FastRCNNPredictor`` with other classes.

    Returns:
        The same model.

    Raises:
        AdapterError: `head` names a module that is not in the file's head, or the model has the set
            already.
        AdapterFileError: The file is missing, damaged, of another kind, of a newer format, or
            cannot be injected into this model; or cannot be downloaded.
        BackboneMismatchError: The backbone differs; the message lists tensors and modules.
        AdapterKeyError: The model's set or head does not have the file's form.
        InjectionError: The model cannot be injected into.

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
    ledger = find_ledger(model)  # before the file: the arguments may be swapped
    info, tensors = read_adapter_file(path)
    if name is not None and not isinstance(name, str):
        raise AdapterError(
            f"name={name!r} is {type(name).__name__}: give the name of a set, a string."
        )
    name = info.set.name if name is None else name
    if ledger is None or name not in ledger.sets:
        check_model(model)
    elif head is not None:
        raise AdapterError(
            f"The model has a set {name!r} with a head already. Remove head=, or load under "
            "another name=."
        )
    load_file_content(unwrap(model), info, tensors, name, head=head)
    return model


def load_file_content(
    model: nn.Module,
    info: AdapterInfo,
    tensors: Mapping[str, Tensor],
    name: str,
    today: Fingerprint | None = None,
    head: Mapping[str, nn.Module] | None = None,
) -> None:
    """Loads the content of a file into a model under a set name, all or nothing.

    Args:
        model: The model.
        info: Description of the file's content.
        tensors: The file's tensors.
        name: The set to load into.
        today: The fingerprint of the model, if known.
        head: As for `load_adapters`.

    Raises:
        AdapterFileError, BackboneMismatchError, AdapterKeyError: As `load_adapters`.
    """
    today = today or fingerprint_of(model)
    same = today is not None and today.without(info.set.head) == info.backbone
    if not same:
        refuse_other_backbone(model, info.backbone, info.set.head, str(info.path), "the file")
    info = in_called_modules(model, info)
    state = {
        key: tensor
        for key, tensor in tensors.items()
        if key.startswith(("adapters.", "head.", "norms."))
    }
    ledger = find_ledger(model)
    if ledger is None or name not in ledger.sets:
        widened = not same and _has_other_dtypes(model, info.backbone)
        _inject_from_file(model, info, state, name, today, {} if head is None else head, widened)
        return
    if differing := info.set.differences(ledger.sets[name].spec):
        raise AdapterKeyError(
            f"{info.path}: the model's set {name!r} differs from the file's in "
            f"{quote_names(differing)}. Load it under another name=, or call "
            f"remove_adapters(model, {name!r}) first."
        )
    live = live_tensors(model, ledger.sets[name])
    fitting(live, state, name)  # before anything changes
    switch(model, ledger, name)
    load_adapter_state_dict(model, state, name)


def _has_other_dtypes(model: nn.Module, backbone: Fingerprint) -> bool:
    """Tells whether a backbone was converted to another dtype than that of a fingerprint."""
    return any(
        path in backbone.tensors and dtype_name(tensor) != backbone.tensors[path].dtype
        for path, tensor in backbone_tensors(model)
    )


def in_called_modules(model: nn.Module, info: AdapterInfo) -> AdapterInfo:
    """Returns a file's description with containers without a forward in the head resolved.

    Files of version 0.2 name such containers; `inject_adapters` now names their content.
    """
    try:
        return replace(info, set=replace(info.set, head=called_modules(model, info.set.head)))
    except InjectionError:  # missing modules are reported when the set is injected
        return info


def fingerprint_of(model: nn.Module) -> Fingerprint | None:
    """Returns the fingerprint of a model; None if it is injected or has meta or lazy tensors."""
    tensors = dict(backbone_tensors(model))
    if find_ledger(model) is not None or any(
        is_lazy(tensor) or tensor.is_meta for tensor in tensors.values()
    ):
        return None
    return Fingerprint.of(dict(backbone_modules(model)), tensors)


def _inject_from_file(
    model: nn.Module,
    info: AdapterInfo,
    state: Mapping[str, Tensor],
    name: str,
    fingerprint: Fingerprint | None,
    head: Mapping[str, nn.Module],
    widened: bool,
) -> None:
    spec = replace(info.set, name=name)

    def fill() -> None:
        # The set has the file's dtypes, whatever the backbone's: it may have been converted by
        # hand. Only in a backbone that was converted since, it stays as wide as the backbone.
        convert_set(model, ledger_of(model).sets[name], state, widen=widened)
        load_adapter_state_dict(model, state, name)

    try:
        with torch.random.fork_rng(devices=[]):  # initial values are overwritten at once
            with on_backbone(model):
                _check_description(model, info, state)
                heads = _heads(model, info, state, _given(model, info, head))
            install(
                model,
                spec,
                info.example,
                heads,
                fingerprint,
                fill,
                torch.float32,
            )
    except InjectionError as error:
        raise AdapterFileError(
            f"{info.path}: cannot be injected into this {type(model).__name__}: {error}"
        ) from error


def _given(
    model: nn.Module, info: AdapterInfo, head: Mapping[str, nn.Module]
) -> dict[str, nn.Module]:
    """Returns the user's modules for a file's head, by name in the model."""
    if not isinstance(head, Mapping):
        raise AdapterError(
            f"head is {type(head).__name__}: give a mapping from names in the model to modules."
        )
    given = select_head(model, head)
    if extra := sorted(given.keys() - {*info.set.head}):
        raise AdapterError(
            f"head: {quote_names(extra)} is not in the head of {info.path}, which has "
            f"{quote_names(info.set.head) or 'no modules'}. Remove it from head=."
        )
    return given


def _heads(
    model: nn.Module,
    info: AdapterInfo,
    state: Mapping[str, Tensor],
    given: Mapping[str, nn.Module],
) -> dict[str, nn.Module]:
    """Returns the modules for a file's head, by name in the model.

    The user's module; or the model's module if it has the file's form; or else a module built from
    the file's blueprint.
    """
    modules, heads = dict(backbone_modules(model)), {}
    built: dict[int, nn.Module] = {}  # one for all names of a shared module
    spec = info.set
    for name in spec.head:
        if name not in modules:
            raise InjectionError(f"The backbone has no module {name!r}, but the file's head has.")
        stored = {key: tensor for key, tensor in state.items() if within(key, (f"head.{name}",))}
        blueprint, source = spec.blueprints.get(name), given.get(name, modules[name])
        found = form_of(source)
        if name in given or found == blueprint or not is_buildable(blueprint):
            form = tensors_to_save(backbone_modules(source, name), spec)
            fitting(form, stored, spec.name, converted=True)
            if blueprint not in (None, found):
                raise AdapterKeyError(
                    f"{info.path}: the head {name!r} is {_form(blueprint)}, but the "
                    f"{'given' if name in given else 'model has a'} module {_form(found)}. Give "
                    f"such a head: load_adapters(model, path, head={{{name!r}: module}})."
                )
            heads[name] = source
            continue
        try:
            with torch.device("meta"):  # no memory before the shapes are compared with the file
                form = tensors_to_save(backbone_modules(build_from(blueprint), name), spec)
            if {key: tensor.shape for key, tensor in form.items()} != {
                key: tensor.shape for key, tensor in stored.items()
            }:
                raise ValueError("the shapes of its tensors differ")
            heads[name] = built.setdefault(id(modules[name]), build_from(blueprint))
        except ValueError as error:
            raise AdapterFileError(
                f"{info.path}: the head {name!r} cannot be built from its description: {error}."
            ) from error
    return heads


def _form(blueprint: Any) -> str:
    """Returns a head's description for a message."""
    if is_buildable(blueprint):
        return f"made of torch.nn layers, {blueprint}"
    return f"with the classes {blueprint['classes']}" if blueprint else "of torch's classes"


def _check_description(model: nn.Module, info: AdapterInfo, state: Mapping[str, Tensor]) -> None:
    """Compares a file's description of the adapters with the file's tensors, without memory."""
    for site in info.set.sites:
        shapes = saved_shapes(meta_adapter(model, info.set, site))
        described = {f"adapters.{site.name}.{key}": shape for key, shape in shapes.items()}
        if wrong := [
            key
            for key, shape in described.items()
            if key not in state or tuple(state[key].shape) != shape
        ]:
            raise AdapterFileError(
                f"{info.path}: the description of the adapter at site {site.name!r} does not match "
                f"the file's tensors: {quote_names(wrong)}. Save the set again."
            )
