"""Models that are sharded over processes by FSDP2."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from resadapt.base.tensors import is_sharded
from resadapt.injection.walk import backbone_modules

__all__ = ["are_sharded", "reshard", "sharded_tensors"]


def sharded_tensors(model: nn.Module) -> list[Tensor]:
    """Returns the sharded parameters and buffers of a model; none if it is an ordinary one."""
    if "torch.distributed.tensor" not in sys.modules:  # where sharded tensors are from: there can be none
        return []
    reshard(model)
    return [tensor for tensor in (*nn.Module.parameters(model), *nn.Module.buffers(model)) if is_sharded(tensor)]


def are_sharded(modules: Iterable[nn.Module]) -> bool:
    """Tells whether one of some modules, without their children, has sharded tensors or shards them."""
    for module in modules:
        tensors = [tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None]
        if isinstance(module, _kind()) or any(map(is_sharded, tensors)):
            return True
    return False


def reshard(model: nn.Module) -> None:
    """Puts every parameter back in its sharded form: after a forward without a backward some stay gathered.

    What is written into a gathered parameter would be lost.
    """
    kind = _kind()
    if any(isinstance(module, kind) for _, module in backbone_modules(model)):
        for module in nn.Module.modules(model):
            if isinstance(module, kind):
                module.reshard()


def _kind() -> Any:
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())  # not imported: nothing can be sharded
