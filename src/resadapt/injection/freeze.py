"""Freezing the backbone: no gradients, and no updates of running statistics in train mode."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from resadapt.base.errors import InjectionError, quote_names
from resadapt.base.overlay import Overlay, put_class, uncover
from resadapt.base.spec import within
from resadapt.injection.walk import backbone_modules, is_leaf

__all__ = [
    "NORM_POLICIES",
    "FrozenStatistics",
    "allow_statistics_reset",
    "block_statistics_reset",
    "drop_hook",
    "freeze_backbone",
    "freeze_norm",
    "freeze_parameters",
    "frozen_modules",
    "hold_in_eval",
    "is_frozen",
    "norms_of",
    "unfreeze_norm",
]


class FrozenStatistics(Overlay, nn.modules.batchnorm._BatchNorm):
    """Normalises with the running statistics, in train mode too, and never updates them."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        """Normalises a batch ``[N, C, ...]``."""
        if not isinstance(self, FrozenStatistics):  # bound before the class was restored
            return cast(Tensor, type(self).forward(self, input))
        # The stock forward branches on the input's dimensions, which torch.fx cannot trace in a
        # class that torch.nn does not define.
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )

    @override
    def reset_running_stats(self) -> None:
        """Does nothing: `torch.optim.swa_utils.update_bn`, for one, resets the statistics."""


class FrozenBatchNorm1d(FrozenStatistics, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` with frozen running statistics."""


class FrozenBatchNorm2d(FrozenStatistics, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` with frozen running statistics."""


class FrozenBatchNorm3d(FrozenStatistics, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` with frozen running statistics."""


class FrozenSyncBatchNorm(FrozenStatistics, nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm` with frozen running statistics."""


_FROZEN: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: FrozenBatchNorm1d,
    nn.BatchNorm2d: FrozenBatchNorm2d,
    nn.BatchNorm3d: FrozenBatchNorm3d,
    nn.SyncBatchNorm: FrozenSyncBatchNorm,
}
_AFFINE = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def hold_in_eval(module: nn.Module, args: Any) -> None:
    """Forward pre-hook that keeps a module in eval mode.

    For modules with statistics but no frozen class: a custom BatchNorm, spectral norm.
    """
    module.training = False


def freeze_norm(module: nn.Module) -> None:
    """Stops updates of a module's running statistics, if it has any."""
    if (
        type(module) in _FROZEN
        and "forward" not in module.__dict__
        and module._buffers["running_mean"] is not None
    ):
        put_class(module, _FROZEN[type(module)], None)
    elif _keeps_statistics(module) and not _is_held(module):
        # Before all other hooks: torch.nn.utils.spectral_norm updates its buffers in a pre-hook.
        module.register_forward_pre_hook(hold_in_eval, prepend=True)
        block_statistics_reset(module)


def unfreeze_norm(module: nn.Module) -> None:
    """Undoes `freeze_norm`."""
    uncover(module)
    drop_hook(module._forward_pre_hooks, hold_in_eval)
    allow_statistics_reset(module)


def is_frozen(module: nn.Module) -> bool:
    """Tells whether a module's running statistics are frozen."""
    return isinstance(module, FrozenStatistics) or _is_held(module)


def frozen_modules(model: nn.Module) -> tuple[str, ...]:
    """Returns the names of the backbone's modules whose running statistics are frozen."""
    return tuple(path for path, module in backbone_modules(model) if is_frozen(module))


def _is_held(module: nn.Module) -> bool:
    """Tells whether `hold_in_eval` keeps a module in eval mode, whatever its training flag."""
    return hold_in_eval in module._forward_pre_hooks.values()


NORM_POLICIES = ("frozen", "affine", "stats", "affine+stats")
"""What a set has a private copy of in the backbone's norms outside its head.

Nothing, weights and biases, running statistics, or both.
"""


def norms_of(model: nn.Module, policy: str, head: Collection[str]) -> tuple[str, ...]:
    """Returns the names of the norms that a set with this policy has private copies of.

    Raises:
        InjectionError: The policy does not exist, or the backbone has no such norm.
    """
    if policy not in NORM_POLICIES:
        raise InjectionError(
            f"norm={policy!r} does not exist; there is {quote_names(NORM_POLICIES)}."
        )
    if policy == "frozen":
        return ()
    kinds = policy.split("+")
    found: dict[int, str] = {}  # a module with two names counts once
    for name, module in backbone_modules(model):
        statistics = (
            isinstance(module, nn.modules.batchnorm._NormBase)
            and module._buffers.get("running_mean") is not None
        )
        affine = isinstance(module, _AFFINE) and module._parameters.get("weight") is not None
        if (("affine" in kinds and affine) or ("stats" in kinds and statistics)) and not within(
            name, head
        ):
            found.setdefault(id(module), name)
    if not found:
        raise InjectionError(
            f"norm={policy!r}: no norm of the backbone outside the head has these. Remove norm=."
        )
    return tuple(found.values())


def freeze_backbone(model: nn.Module) -> None:
    """Freezes all parameters and running statistics of the backbone."""
    for _, module in backbone_modules(model):
        freeze_norm(module)
    freeze_parameters(model)


def freeze_parameters(model: nn.Module) -> None:
    """Freezes all parameters of the backbone.

    Drops gradients too, which an optimizer could still apply.
    """
    for _, module in backbone_modules(model):
        for parameter in module._parameters.values():
            if parameter is not None and (parameter.requires_grad or parameter.grad is not None):
                parameter.requires_grad_(False)
                parameter.grad = None


def block_statistics_reset(module: nn.Module) -> None:
    """Makes `reset_running_stats` do nothing in a module's BatchNorms.

    Keeps statistics that are frozen or of an inactive set, which
    `torch.optim.swa_utils.update_bn` would reset.
    """
    for each in module.modules():
        if isinstance(each, nn.modules.batchnorm._BatchNorm):
            each.__dict__["reset_running_stats"] = _keep_statistics


def allow_statistics_reset(module: nn.Module) -> None:
    """Undoes `block_statistics_reset`, except in frozen norms."""
    for each in module.modules():
        if each.__dict__.get("reset_running_stats") is _keep_statistics and not is_frozen(each):
            del each.__dict__["reset_running_stats"]


def drop_hook(hooks: dict[int, Any], hook: Any) -> None:
    """Removes a hook by its function, since handles do not survive copying and pickling."""
    for key in [key for key, value in hooks.items() if value is hook]:
        del hooks[key]


def _keep_statistics() -> None:
    """Replaces `reset_running_stats` on the instance."""


def _keeps_statistics(module: nn.Module) -> bool:
    # Norms and leaves only: a network may have a buffer too (an input mean, say), and must keep
    # its behaviour in train mode.
    owns_buffers = any(buffer is not None for buffer in module._buffers.values())
    norm = isinstance(module, nn.modules.batchnorm._NormBase)
    return owns_buffers and not isinstance(module, FrozenStatistics) and (norm or is_leaf(module))
