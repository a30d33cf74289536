"""Models that are sharded over processes by FSDP2."""

from __future__ import annotations

import sys

from torch import Tensor, nn

from resadapt.base.tensors import is_sharded
from resadapt.injection.walk import backbone_modules, backbone_tensors

__all__ = ["reshard", "sharded_tensors"]


def sharded_tensors(model: nn.Module) -> list[Tensor]:
    """Returns the sharded parameters and buffers of a backbone; none if it is an ordinary one."""
    if "torch.distributed.tensor" not in sys.modules:  # where sharded tensors are from: there can be none
        return []
    reshard(model)
    return [tensor for _, tensor in backbone_tensors(model) if is_sharded(tensor)]


def reshard(model: nn.Module) -> None:
    """Puts every parameter back in its sharded form: after a forward without a backward some stay gathered.

    What is written into a gathered parameter would be lost.
    """
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())  # not imported: nothing can be sharded
    for _, module in backbone_modules(model):
        if isinstance(module, kind):
            module.reshard()
