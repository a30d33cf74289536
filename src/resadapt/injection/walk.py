"""Walking a model: through what wraps it, and past the adapters in it.

A wrapper that only passes its inputs on (torch.compile around a block, activation checkpointing) has no part in a name, so that
names and fingerprints are the same with and without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from resadapt.base.errors import InjectionError
from resadapt.base.names import quote_names
from resadapt.injection.slots import SLOT, AdapterSlot

__all__ = [
    "backbone_modules",
    "backbone_tensors",
    "behind_wrappers",
    "check_values",
    "find_module",
    "find_slot",
    "is_leaf",
    "named_tensors",
    "persistent_tensors",
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
            raise InjectionError(f"The backbone of this {type(model).__name__} has no module {name!r}.")
        module = behind_wrappers(child)
    return module


def check_values(tensors: Mapping[str, Tensor]) -> None:
    """Checks that tensors have values.

    Raises:
        InjectionError: One is on the meta device: not loaded, or offloaded.
    """
    if empty := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise InjectionError(
            f"Tensors have no values here (not loaded, or offloaded?): {quote_names(empty)}. Load them, or undo the offloading: "
            "accelerate.hooks.remove_hook_from_submodules(model) undoes accelerate's."
        )


def is_leaf(module: nn.Module) -> bool:
    """Tells whether a module has no children of the backbone's."""
    return all(child is None or isinstance(child, AdapterSlot) for child in module._modules.values())


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
            "FullyShardedDataParallel makes one flat parameter of many, of which no adapter can be told. Inject first, and shard "
            "with torch.distributed.fsdp.fully_shard, which keeps them apart."
        )
    for key in _PASSED_ON_TO:
        if key in module._modules:
            return behind_wrappers(module._modules[key])  # type: ignore[arg-type]
    return module
