"""Walking a model.

Through what wraps it, past the adapters in it, and over the processes that share it.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from resadapt.base.errors import AdapterError, InjectionError, quote_names
from resadapt.base.tensors import is_sharded
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
    "is_leaf",
    "named_tensors",
    "on_one_rank",
    "persistent_tensors",
    "reshard",
    "sharded_tensors",
    "slots_of",
    "unwrap",
]

_PASSED_ON_TO = ("_orig_mod", "_checkpoint_wrapped_module")


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the model inside DataParallel, DistributedDataParallel, AveragedModel, torch.compile or activation checkpointing."""
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
    """Walks the modules of the backbone as `nn.Module.named_modules` does, but once for each name of a shared module."""
    model = behind_wrappers(model)
    yield prefix, model
    for key, child in model._modules.items():
        if child is not None and not isinstance(child, AdapterSlot):
            yield from backbone_modules(child, f"{prefix}.{key}" if prefix else key)


def backbone_tensors(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Walks every parameter and buffer of the backbone, non-persistent buffers included."""
    for name, module in backbone_modules(model, prefix):
        yield from named_tensors(module, name)


def named_tensors(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Walks the parameters and buffers of one module, without its children."""
    for key, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield f"{prefix}.{key}" if prefix else key, tensor


def persistent_tensors(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Walks the parameters and buffers of one module that it saves, without its children."""
    for path, tensor in named_tensors(module, prefix):
        if path.rpartition(".")[2] not in module._non_persistent_buffers_set:
            yield path, tensor


def find_module(model: nn.Module, name: str) -> nn.Module:
    """Returns the backbone's module of a name.

    Raises:
        InjectionError: There is none.
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


def check_not_meta(tensors: Mapping[str, Tensor]) -> None:
    """Checks that tensors have values.

    Raises:
        InjectionError: One is on the meta device: not loaded, or offloaded.
    """
    if empty := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise InjectionError(
            f"Tensors have no values here (not loaded, or offloaded?): {quote_names(empty)}. Load "
            "them, or undo the offloading: accelerate.hooks.remove_hook_from_submodules(model) "
            "undoes accelerate's."
        )


def is_leaf(module: nn.Module) -> bool:
    """Tells whether a module has no children of the backbone's."""
    return all(
        child is None or isinstance(child, AdapterSlot) for child in module._modules.values()
    )


def find_slot(owner: nn.Module) -> AdapterSlot | None:
    """Returns the slot of a module, None if it has none."""
    slot = _child(owner, SLOT)
    return slot if isinstance(slot, AdapterSlot) else None


def slots_of(model: nn.Module) -> Iterator[AdapterSlot]:
    """Walks the slots of a model."""
    for _, module in backbone_modules(model):
        if slot := find_slot(module):
            yield slot


def _child(module: nn.Module, key: str) -> nn.Module | None:
    return module._modules[key] if key in module._modules else None  # noqa: SIM401 - the children of TorchScript are no dict


def behind_wrappers(module: nn.Module) -> nn.Module:
    """Returns what a wrapper passes its inputs on to; the module itself if it is no wrapper.

    Raises:
        InjectionError: The wrapper makes other parameters of those of the module.
    """
    if "_fsdp_wrapped_module" in module._modules:
        raise InjectionError(
            "FullyShardedDataParallel makes one flat parameter of many, of which no adapter can be "
            "told. Inject first, and shard with torch.distributed.fsdp.fully_shard, which keeps "
            "them apart."
        )
    for key in _PASSED_ON_TO:
        if key in module._modules:
            return behind_wrappers(module._modules[key])  # type: ignore[arg-type]
    return module


def sharded_tensors(model: nn.Module) -> list[Tensor]:
    """Returns the sharded parameters and buffers of a model; none if it is an ordinary one."""
    if (
        "torch.distributed.tensor" not in sys.modules
    ):  # where sharded tensors are from: there can be none
        return []
    reshard(model)
    return [
        tensor
        for tensor in (*nn.Module.parameters(model), *nn.Module.buffers(model))
        if is_sharded(tensor)
    ]


def are_sharded(modules: Iterable[nn.Module]) -> bool:
    """Tells whether one of some modules, without their children, has sharded tensors or shards them."""
    for module in modules:
        tensors = [
            tensor
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None
        ]
        if isinstance(module, _kind()) or any(map(is_sharded, tensors)):
            return True
    return False


def reshard(model: nn.Module) -> None:
    """Puts every parameter back in its sharded form: after a forward without a backward some stay
    gathered.

    What is written into a gathered parameter would be lost.
    """
    kind = _kind()
    if any(isinstance(module, kind) for _, module in backbone_modules(model)):
        for module in nn.Module.modules(model):
            if isinstance(module, kind):
                module.reshard()


def _kind() -> Any:
    return getattr(
        sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ()
    )  # not imported: nothing can be sharded


T = TypeVar("T")


def check_ranks(model: nn.Module) -> bool:
    """Tells whether a model is sharded over processes.

    Raises:
        AdapterError: It is, but not over all of the default process group, which would then wait
            for ever.
    """
    meshes = [tensor.device_mesh for tensor in sharded_tensors(model)]  # type: ignore[attr-defined]
    if meshes and any(mesh.size() != dist.get_world_size() for mesh in meshes):
        raise AdapterError(
            "The model is sharded over a part of the processes only, for which saving is not "
            "supported."
        )
    return bool(meshes)


def on_one_rank(sharded: bool, work: Callable[[], T]) -> T:
    """Does work on rank 0 of a sharded model and gives its result or error to all.

    For any other model just does it.
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
