"""Iterating over a model's backbone: through wrappers, without adapters, also when sharded."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from resadapt.base.errors import AdapterError, InjectionError, quote_names
from resadapt.base.tensors import all_tensors, is_sharded
from resadapt.injection.slots import SLOT, AdapterSlot

__all__ = [
    "are_sharded",
    "backbone_modules",
    "backbone_tensors",
    "behind_wrappers",
    "check_not_meta",
    "check_ranks",
    "find_module",
    "find_slot",
    "ids_of_parts",
    "is_leaf",
    "named_tensors",
    "on_one_rank",
    "persistent_tensors",
    "replace_module",
    "reshard",
    "sharded_tensors",
    "slots_of",
    "unwrap",
]

_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the model inside wrappers.

    Known wrappers are DataParallel, DistributedDataParallel, AveragedModel, torch.compile and
    activation checkpointing.
    """
    if not isinstance(model, nn.Module):
        raise InjectionError(f"model is {type(model).__name__}, not a torch.nn.Module.")
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel | AveragedModel):
            model = model.module
        elif (inner := behind_wrappers(model)) is model:
            return model
        else:
            model = inner


def backbone_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yields the backbone's modules like `nn.Module.named_modules`, shared ones by every name."""
    model = behind_wrappers(model)
    yield prefix, model
    for key, child in model._modules.items():
        if child is not None and not isinstance(child, AdapterSlot):
            yield from backbone_modules(child, f"{prefix}.{key}" if prefix else key)


def backbone_tensors(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields all parameters and buffers of the backbone, non-persistent buffers included."""
    for name, module in backbone_modules(model, prefix):
        yield from named_tensors(module, name)


def named_tensors(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields the parameters and buffers of one module, without its children."""
    for key, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield f"{prefix}.{key}" if prefix else key, tensor


def ids_of_parts(model: nn.Module) -> set[int]:
    """Returns the ids of the backbone's modules, parameters and buffers."""
    return {
        id(part)
        for _, module in backbone_modules(model)
        for part in (module, *dict(named_tensors(module)).values())
    }


def persistent_tensors(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields the parameters and persistent buffers of one module, without its children."""
    for path, tensor in named_tensors(module, prefix):
        if path.rpartition(".")[2] not in module._non_persistent_buffers_set:
            yield path, tensor


def find_module(model: nn.Module, name: str) -> nn.Module:
    """Returns a module of the backbone by name.

    Raises:
        InjectionError: The backbone has no module of that name.
    """
    module = behind_wrappers(model)
    for part in name.split(".") if name else ():
        child = _child(module, part)
        if child is None or isinstance(child, AdapterSlot):
            raise InjectionError(
                f"The backbone of this {type(model).__name__} has no module {name!r}."
            )
        module = behind_wrappers(child)
    return module


def replace_module(model: nn.Module, module: nn.Module, other: nn.Module) -> None:
    """Replaces a module under all its names."""
    for parent in list(nn.Module.modules(model)):
        parent._modules.update(
            {key: other for key, child in parent._modules.items() if child is module}
        )


def check_not_meta(tensors: Mapping[str, Tensor]) -> None:
    """Checks that no tensor is on the meta device.

    Raises:
        InjectionError: A tensor is on the meta device: not loaded, or offloaded.
    """
    if empty := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise InjectionError(
            f"Tensors are on the meta device (not loaded, or offloaded?): {quote_names(empty)}. "
            "Load them, or undo the offloading, for accelerate with "
            "accelerate.hooks.remove_hook_from_submodules(model)."
        )


def is_leaf(module: nn.Module) -> bool:
    """Tells whether a module has no children besides a slot."""
    return all(
        child is None or isinstance(child, AdapterSlot) for child in module._modules.values()
    )


def find_slot(owner: nn.Module) -> AdapterSlot | None:
    """Returns the slot of a module, or None."""
    slot = _child(owner, SLOT)
    return slot if isinstance(slot, AdapterSlot) else None


def slots_of(model: nn.Module) -> Iterator[AdapterSlot]:
    """Yields the slots of a model."""
    for _, module in backbone_modules(model):
        if slot := find_slot(module):
            yield slot


def _child(module: nn.Module, key: str) -> nn.Module | None:
    return module._modules[key] if key in module._modules else None  # noqa: SIM401 - the children of TorchScript are no dict


def behind_wrappers(module: nn.Module) -> nn.Module:
    """Returns the module inside a wrapper; the module itself if it is not a wrapper.

    Raises:
        InjectionError: The wrapper is FullyShardedDataParallel, which flattens parameters.
    """
    if "_fsdp_wrapped_module" in module._modules:
        raise InjectionError(
            "FullyShardedDataParallel flattens parameters, so adapters cannot be separated from "
            "the backbone. Inject first, and shard with torch.distributed.fsdp.fully_shard, which "
            "keeps parameters separate."
        )
    for key in _WRAPPED:
        if key in module._modules:
            return behind_wrappers(module._modules[key])  # type: ignore[arg-type]
    return module


def sharded_tensors(model: nn.Module) -> list[Tensor]:
    """Returns the sharded parameters and buffers of a model; [] if nothing is sharded."""
    if "torch.distributed.tensor" not in sys.modules:  # not imported: nothing can be sharded
        return []
    reshard(model)
    return [tensor for tensor in all_tensors(model) if is_sharded(tensor)]


def are_sharded(modules: Iterable[nn.Module]) -> bool:
    """Tells whether any of the modules, without children, has sharded tensors or shards them."""
    for module in modules:
        tensors = [
            tensor
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None
        ]
        if isinstance(module, _fsdp_class()) or any(map(is_sharded, tensors)):
            return True
    return False


def reshard(model: nn.Module) -> None:
    """Reshards parameters that are still gathered after a forward without a backward.

    Values written into a gathered parameter would be lost.
    """
    fsdp_class = _fsdp_class()
    if any(isinstance(module, fsdp_class) for _, module in backbone_modules(model)):
        for module in nn.Module.modules(model):
            if isinstance(module, fsdp_class):
                module.reshard()


def _fsdp_class() -> Any:
    """Returns the class of FSDP2 modules; () if not imported, when nothing can be sharded."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())


T = TypeVar("T")


def check_ranks(model: nn.Module) -> bool:
    """Tells whether a model is sharded over processes.

    Raises:
        AdapterError: The model is sharded over a part of the default process group only, which
            would deadlock.
    """
    meshes = [tensor.device_mesh for tensor in sharded_tensors(model)]  # type: ignore[attr-defined]
    if meshes and any(mesh.size() != dist.get_world_size() for mesh in meshes):
        raise AdapterError(
            "The model is sharded over a part of the processes only. Saving such models is not "
            "supported."
        )
    return bool(meshes)


def on_one_rank(sharded: bool, work: Callable[[], T]) -> T:
    """Runs a function on rank 0 if the model is sharded, and sends the result or error to all.

    If the model is not sharded, every process runs the function.
    """
    if not sharded:
        return work()
    outcome: list[tuple[bool, object]] = [(False, None)]
    if dist.get_rank() == 0:
        try:
            outcome = [(True, work())]
        except BaseException as error:
            outcome = [(False, _sendable(error))]
    dist.broadcast_object_list(outcome, src=0)
    ((done, result),) = outcome
    if not done:
        raise result  # type: ignore[misc]
    return result  # type: ignore[return-value]


def _sendable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return AdapterError(f"Rank 0 failed with {type(error).__name__}: {error}")
    return error
