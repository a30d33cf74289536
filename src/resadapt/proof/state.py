"""Reading and loading a set's tensors, strictly, and all or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from resadapt.base.autocast import overwrite
from resadapt.base.errors import AdapterFileError, AdapterKeyError, quote_names, quote_reasons
from resadapt.base.module_record import other_state
from resadapt.base.spec import SetSpec, within
from resadapt.base.tensors import (
    address,
    dtype_name,
    full_tensor,
    is_dense,
    is_sharded,
    kind_name,
    same_bits,
)
from resadapt.injection.building import saved_tensors
from resadapt.injection.ledger import AdapterSet, adapter_of, ledger_of, set_modules
from resadapt.injection.own_dtype import dtype_of, promoted
from resadapt.injection.private import private_modules
from resadapt.injection.slots import SLOT
from resadapt.injection.walk import backbone_tensors, persistent_tensors, reshard, unwrap

__all__ = [
    "adapter_state_dict",
    "convert_set",
    "fitting",
    "live_tensors",
    "load_adapter_state_dict",
    "load_sets",
    "refuse_unsaved_state",
    "tensors_to_save",
]


def adapter_state_dict(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """Returns copies of a set's tensors: adapters, head and norms, but not the backbone.

    Args:
        model: An injected model. If it is sharded (FSDP2), all processes must call, and each gets
            the full tensors.
        name: The set; None is the active set.

    Returns:
        The tensors by name, as ``adapters.<site>.<tensor>``, ``head.<name in the model>`` and
        ``norms.<name in the model>``.

    Raises:
        InjectionError: Nothing was injected.
        AdapterKeyError: There is no such set, or an adapter's tensors were changed in number or
            shape.

    Example:
        >>> from torchvision.models import resnet18
        >>> from resadapt import inject_adapters
        >>> list(adapter_state_dict(inject_adapters(resnet18(), "layer4", 8)))[:2]
        ['adapters.layer4.down.weight', 'adapters.layer4.down.bias']
    """
    live = live_tensors(unwrap(model), ledger_of(model).chosen(name))
    return {key: full_tensor(tensor).detach().clone() for key, tensor in live.items()}


def load_adapter_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], name: str | None = None
) -> None:
    """Copies tensors into a set, strictly, and all or nothing.

    Args:
        model: An injected model. If it is sharded (FSDP2), all processes must call, and the tensors
            are distributed.
        state_dict: Tensors as from `adapter_state_dict`.
        name: The set; None is the active set.

    Raises:
        InjectionError: Nothing was injected.
        AdapterKeyError: There is no such set; or a tensor is missing, unexpected, of another shape,
            or would lose precision.

    Example:
        >>> from torchvision.models import resnet18
        >>> from resadapt import inject_adapters
        >>> model = inject_adapters(resnet18(), "layer4", 8)
        >>> load_adapter_state_dict(model, adapter_state_dict(model))
    """
    load_sets(model, {ledger_of(model).chosen(name).spec.name: state_dict})


def load_sets(model: nn.Module, states: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Copies tensors into several sets of a model, by name, as `load_adapter_state_dict`."""
    ledger, inner = ledger_of(model), unwrap(model)
    reshard(inner)
    values: list[tuple[Tensor, Tensor]] = []
    for name, state_dict in states.items():
        live = live_tensors(inner, ledger.sets[name])
        ready = fitting(live, state_dict, name)
        values += [(tensor, _distributed_as(tensor, ready[key])) for key, tensor in live.items()]
    overwrite(values)


def refuse_unsaved_state(model: nn.Module, adapter_set: AdapterSet) -> None:
    """Refuses a head or adapter with state that an adapter file cannot contain.

    Raises:
        AdapterFileError: A module has extra state, or packed weights of a quantized layer.
    """
    heads = [
        (f"The head's module {path!r}", module)
        for path, module in private_modules(model, adapter_set.spec)
    ]
    adapters = [
        (f"The adapter at {site.name!r}", module)
        for site in adapter_set.spec.sites
        for module in adapter_of(model, adapter_set.spec, site).modules()
    ]
    for what, module in heads + adapters:
        if kept := other_state(module):
            raise AdapterFileError(
                f"{what} ({type(module).__name__}) has {quote_names(kept)} besides its parameters "
                "and buffers, which an adapter file cannot contain. Use a buffer instead, or "
                "remove the module from the set."
            )


def live_tensors(model: nn.Module, adapter_set: AdapterSet) -> dict[str, Tensor]:
    """Returns a set's parameters and persistent buffers, by name in a file."""
    spec = adapter_set.spec
    adapters = {
        f"adapters.{site.name}.{key}": tensor
        for site in spec.sites
        for key, tensor in saved_tensors(adapter_of(model, spec, site))
    }
    live = adapters | tensors_to_save(private_modules(model, adapter_set.spec), spec)
    if wrapped := {
        key: f"is {kind_name(tensor)}"
        for key, tensor in live.items()
        if not (is_sharded(tensor) or is_dense(tensor))
    }:
        raise AdapterKeyError(
            f"Set {spec.name!r} has tensors that an adapter file cannot contain: "
            f"{quote_reasons(wrapped)}. They were quantized or wrapped; torchao's quantize_ takes "
            "every Linear, those of adapters and heads too. Save the set before quantizing, or "
            "leave the sets out: quantize_(model, config, filter_fn=lambda module, name: "
            f"isinstance(module, torch.nn.Linear) and {SLOT!r} not in name.split('.'))."
        )
    described = {f"adapters.{key}": shape for key, shape in adapter_set.shapes.items()}
    found = {key: tuple(tensor.shape) for key, tensor in adapters.items()}
    added = adapters.keys() - described.keys()
    if added and not described.items() - found.items():
        raise AdapterKeyError(
            f"Tensors were added to the adapters of set {spec.name!r} after the injection: "
            f"{quote_names(sorted(added))}. An adapter file cannot contain them. Delete them from "
            "every module of the model. If a tool that counts operations has left them behind, as "
            "thop leaves total_ops and total_params, count on resadapt.inference_copy(model)."
        )
    if changed := sorted({key for key, _ in described.items() ^ found.items()}):
        raise AdapterKeyError(
            f"The adapters of set {spec.name!r} do not have the tensors of their family: "
            f"{quote_names(changed)}. They were pruned, parametrized or flattened. Make pruning or "
            "parametrization permanent (torch.nn.utils.prune.remove, "
            "parametrize.remove_parametrizations); save before flattening."
        )
    if gone := [key for key, tensor in live.items() if tensor.is_meta]:
        raise AdapterKeyError(
            f"Tensors of set {spec.name!r} are on the meta device (offloaded?): "
            f"{quote_names(gone)}. Load them again."
        )
    return live


def tensors_to_save(modules: Iterable[tuple[str, nn.Module]], spec: SetSpec) -> dict[str, Tensor]:
    """Returns parameters and persistent buffers of a set's private modules, by name in a file."""
    return {
        f"{'head' if within(name, spec.head) else 'norms'}.{path}": tensor
        for name, module in modules
        for path, tensor in persistent_tensors(module, name)
    }


def fitting(
    live: Mapping[str, Tensor], given: Mapping[str, Tensor], name: str, *, converted: bool = False
) -> dict[str, Tensor]:
    """Returns copies of the given tensors in the form of the live tensors.

    Args:
        live: The tensors of a set.
        given: Tensors for them.
        name: The set, for messages.
        converted: Whether the live tensors get the dtypes of the given tensors before.

    Raises:
        AdapterKeyError: Tensors do not fit; the message lists all problems.
    """
    if not isinstance(given, Mapping):
        raise AdapterKeyError(
            f"state_dict is {type(given).__name__}, not a mapping from names to tensors."
        )
    problems = {key: "is missing" for key in live if key not in given}
    problems |= {str(key): "is unexpected" for key in given if key not in live}
    ready: dict[str, Tensor] = {}
    first_at: dict[object, str] = {}
    for key, tensor in live.items():
        if key not in given:
            continue
        value = given[key]
        if not isinstance(value, Tensor):
            problems[key] = f"is {type(value).__name__}, not a tensor"
            continue
        value = full_tensor(value)
        if value.shape != tensor.shape:
            problems[key] = f"has shape {list(value.shape)}, the model has {list(tensor.shape)}"
        elif value.layout is not torch.strided or value.is_meta or value.is_quantized:
            problems[key] = "is sparse, quantized or on the meta device: give a dense tensor"
        else:
            dtype = value.dtype if converted and _are_floating(value, tensor) else tensor.dtype
            ready[key] = value.detach().to(tensor.device, dtype, copy=True)
            if value.dtype != dtype and not torch.equal(
                ready[key].to(value.device, value.dtype), value
            ):
                problems[key] = (
                    f"is {dtype_name(value)} and would lose precision in the model's "
                    f"{dtype_name(tensor)}"
                )
            first = first_at.setdefault((address(tensor), tensor.shape, tensor.stride()), key)
            if not same_bits(ready[first], ready[key]):
                problems[key] = f"is tied to {first!r} in this model, but the values differ"
    if problems:
        head = any(key.startswith("head.") for key in problems)
        mend = (
            "Replace the model's head by a head of the saved form before injecting or loading, or "
            "give such a head: load_adapters(model, path, head={name: module}), or head= of "
            "inject_adapters."
            if head
            else "Inject with the layers, bottleneck and family of the saved set."
        )
        if set(problems.values()) == {"is unexpected"}:
            mend += " If a tool added them to a module, as thop adds total_ops, delete them there."
        if all("would lose precision" in problem for problem in problems.values()):
            mend = (
                "Convert the set's modules or the given tensors first. A set that load_adapters "
                f"adds has the dtypes of the file: call remove_adapters(model, {name!r}), or load "
                "under another name=."
            )
        raise AdapterKeyError(
            f"The tensors do not fit the set {name!r}: {quote_reasons(problems)}. {mend}"
        )
    return ready


def convert_set(
    model: nn.Module, adapter_set: AdapterSet, like: Mapping[str, Tensor], *, widen: bool = False
) -> None:
    """Converts a set's floating-point tensors to the dtypes of other tensors, in place.

    Args:
        model: The model.
        adapter_set: The set.
        like: Tensors with the wanted dtypes, by name in a file.
        widen: Whether a tensor stays in a wider dtype than the wanted one.
    """
    live = live_tensors(model, adapter_set)
    for key, tensor in live.items():
        if key in like and _are_floating(like[key], tensor):
            dtype = like[key].dtype
            tensor.data = tensor.data.to(promoted(dtype, tensor.dtype) if widen else dtype)
    saved = {id(tensor) for tensor in live.values()}
    for _, module in set_modules(model, adapter_set.spec):
        for _, tensor in backbone_tensors(module):
            if id(tensor) not in saved and tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype_of(module))


def _are_floating(*tensors: Tensor) -> bool:
    return all(tensor.is_floating_point() for tensor in tensors)


def _distributed_as(live: Tensor, value: Tensor) -> Tensor:
    """Returns a tensor, or this process's shard of it if the live tensor is sharded."""
    if not is_sharded(live):
        return value
    from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415 - not in torch 2.4

    return distribute_tensor(value, live.device_mesh, live.placements)  # type: ignore[attr-defined]
