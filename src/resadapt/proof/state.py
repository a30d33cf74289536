"""A set's tensors in and out of a model: strict, and all or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from resadapt.base.errors import AdapterFileError, AdapterKeyError, quote_names, quote_reasons
from resadapt.base.module_record import other_state
from resadapt.base.spec import SetSpec, within
from resadapt.base.tensors import address, dtype_name, full_tensor, is_dense, is_sharded, same_bits
from resadapt.injection.building import saved_tensors
from resadapt.injection.ledger import AdapterSet, adapter_of, ledger_of
from resadapt.injection.private import private_modules
from resadapt.injection.walk import persistent_tensors, reshard, unwrap

__all__ = [
    "adapter_state_dict",
    "fitting",
    "live_tensors",
    "load_adapter_state_dict",
    "refuse_unsaved_state",
    "tensors_to_save",
]


def adapter_state_dict(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """Returns copies of a set's tensors: adapters and head, nothing of the backbone.

    Args:
        model: An injected model. Of one that is sharded (FSDP2), every process gets the whole
            tensors, and all must call.
        name: The set; None is the active one.

    Returns:
        Tensors by name, as ``adapters.<site>.<tensor>``, and ``head.<name in the model>`` and
        ``norms.<name in the model>``.

    Raises:
        InjectionError: Nothing was injected.
        AdapterKeyError: There is no such set, or an adapter's tensors are no longer those of its
            family.

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
    """Copies tensors into a set: strict, and all or nothing.

    Args:
        model: An injected model. Into one that is sharded (FSDP2) the tensors are distributed, and
            all processes must call.
        state_dict: Tensors as from `adapter_state_dict`.
        name: The set; None is the active one.

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
    adapter_set = ledger_of(model).chosen(name)
    reshard(unwrap(model))
    live = live_tensors(unwrap(model), adapter_set)
    ready = fitting(live, state_dict, adapter_set.spec.name)
    with torch.no_grad():
        for key, tensor in live.items():
            tensor.copy_(_distributed_as(tensor, ready[key]))


def refuse_unsaved_state(model: nn.Module, adapter_set: AdapterSet) -> None:
    """Refuses a head or an adapter with state that an adapter file cannot carry.

    Raises:
        AdapterFileError: A module keeps extra state, or packed weights of a quantized layer.
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
                f"{what} ({type(module).__name__}) keeps {quote_names(kept)} besides its "
                "parameters and buffers, which an adapter file does not carry. Keep that in a "
                "buffer, or take the module out of the set."
            )


def live_tensors(model: nn.Module, adapter_set: AdapterSet) -> dict[str, Tensor]:
    """Returns a set's own tensors, parameters and persistent buffers, by their names in a file."""
    spec = adapter_set.spec
    adapters = {
        f"adapters.{site.name}.{key}": tensor
        for site in spec.sites
        for key, tensor in saved_tensors(adapter_of(model, spec, site))
    }
    described = {f"adapters.{key}": shape for key, shape in adapter_set.shapes.items()}
    found = {
        key: tuple(tensor.shape)
        for key, tensor in adapters.items()
        if is_sharded(tensor) or is_dense(tensor)
    }
    if changed := sorted(
        {key for key, _ in described.items() ^ found.items()} | (adapters.keys() - described.keys())
    ):
        raise AdapterKeyError(
            f"The adapters of set {spec.name!r} do not have the tensors of their family: "
            f"{quote_names(changed)}. They were pruned, parametrized, quantized or flattened: make "
            "the first two permanent (torch.nn.utils.prune.remove, "
            "parametrize.remove_parametrizations), save before the others."
        )
    live = adapters | tensors_to_save(private_modules(model, adapter_set.spec), spec)
    if gone := [key for key, tensor in live.items() if tensor.is_meta]:
        raise AdapterKeyError(
            f"Tensors of set {spec.name!r} have no values here (offloaded?): {quote_names(gone)}. "
            "Bring them back."
        )
    return live


def tensors_to_save(modules: Iterable[tuple[str, nn.Module]], spec: SetSpec) -> dict[str, Tensor]:
    """Returns the tensors of a set's own modules by their names in a file, without the buffers that a module does not save."""
    return {
        f"{'head' if within(name, spec.head) else 'norms'}.{path}": tensor
        for name, module in modules
        for path, tensor in persistent_tensors(module, name)
    }


def fitting(
    live: Mapping[str, Tensor], given: Mapping[str, Tensor], name: str
) -> dict[str, Tensor]:
    """Returns copies of the given tensors that can take the place of the live ones, or raises with all that is wrong."""
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
            problems[key] = (
                f"has shape {list(value.shape)} where the model has {list(tensor.shape)}"
            )
        elif value.layout is not torch.strided or value.is_meta or value.is_quantized:
            problems[key] = "is sparse, quantized or without values: give a dense tensor"
        else:
            ready[key] = value.detach().to(tensor.device, tensor.dtype, copy=True)
            if value.dtype != tensor.dtype and not torch.equal(
                ready[key].to(value.device, value.dtype), value
            ):
                problems[key] = (
                    f"is {dtype_name(value)} and would lose precision in the model's "
                    f"{dtype_name(tensor)}"
                )
            first = first_at.setdefault((address(tensor), tensor.shape, tensor.stride()), key)
            if not same_bits(ready[first], ready[key]):
                problems[key] = f"is tied to {first!r} in this model, which is given other values"
    if problems:
        head = any(key.startswith("head.") for key in problems)
        mend = (
            "Give the model the head that was saved, before injecting or loading."
            if head
            else "Inject with the layers, bottleneck and family that the tensors were made with."
        )
        raise AdapterKeyError(
            f"The tensors do not fit the set {name!r}: {quote_reasons(problems)}. {mend}"
        )
    return ready


def _distributed_as(live: Tensor, value: Tensor) -> Tensor:
    """Returns a tensor in the form of a live one: as it is, or this process's part of it."""
    if not is_sharded(live):
        return value
    from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415 - torch 2.4 has it elsewhere

    return distribute_tensor(value, live.device_mesh, live.placements)  # type: ignore[attr-defined]
