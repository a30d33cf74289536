"""Freezing that holds.

No gradients, and norms whose statistics cannot move whatever the training flag says.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

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
    "drop_hook",
    "freeze_backbone",
    "freeze_norm",
    "hold_in_eval",
    "is_frozen",
    "norms_of",
    "rest_norms",
    "thaw_norm",
    "wake_norms",
]


class FrozenStatistics(Overlay, nn.modules.batchnorm._BatchNorm):
    """Normalises with the running statistics, in training too, and never updates them."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        """Normalises a batch ``[N, C, ...]``."""
        # Only this call: the stock forward branches on the input's dimensions, which torch.fx
        # cannot trace in a class that is not torch.nn's own.
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )

    @override
    def reset_running_stats(self) -> None:
        """Keeps the statistics: `torch.optim.swa_utils.update_bn`, for one, would start them anew."""


class FrozenBatchNorm1d(FrozenStatistics, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` whose statistics cannot move."""


class FrozenBatchNorm2d(FrozenStatistics, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` whose statistics cannot move."""


class FrozenBatchNorm3d(FrozenStatistics, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` whose statistics cannot move."""


class FrozenSyncBatchNorm(FrozenStatistics, nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm` whose statistics cannot move."""


_FROZEN: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: FrozenBatchNorm1d,
    nn.BatchNorm2d: FrozenBatchNorm2d,
    nn.BatchNorm3d: FrozenBatchNorm3d,
    nn.SyncBatchNorm: FrozenSyncBatchNorm,
}
_AFFINE = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def hold_in_eval(module: nn.Module, args: Any) -> None:
    """Forward pre-hook of other modules with statistics (a BatchNorm of one's own, spectral norm).

    Runs them as in evaluation.
    """
    module.training = False


def freeze_norm(module: nn.Module) -> None:
    """Fixes the statistics of a module, if it has any."""
    if type(module) in _FROZEN and module._buffers["running_mean"] is not None:
        put_class(module, _FROZEN[type(module)], None)
    elif _keeps_statistics(module) and not _is_held(module):
        # First of all hooks: torch.nn.utils.spectral_norm updates its buffers in a pre-hook of its
        # own.
        module.register_forward_pre_hook(hold_in_eval, prepend=True)


def thaw_norm(module: nn.Module) -> None:
    """Gives a module its own class and forward again."""
    uncover(module)
    drop_hook(module._forward_pre_hooks, hold_in_eval)


def is_frozen(module: nn.Module) -> bool:
    """Tells whether a module's statistics are fixed."""
    return isinstance(module, FrozenStatistics) or _is_held(module)


def _is_held(module: nn.Module) -> bool:
    """Tells whether a module is held in evaluation, so that its training flag says nothing."""
    return hold_in_eval in module._forward_pre_hooks.values()


NORM_POLICIES = ("frozen", "affine", "stats", "affine+stats")
"""What a set has of its own of the backbone's norms outside its head.

Nothing, weights and biases, running statistics, or both.
"""


def norms_of(model: nn.Module, policy: str, head: Collection[str]) -> tuple[str, ...]:
    """Returns the names of the norms of which a set with this policy has its own.

    Raises:
        InjectionError: The policy does not exist, or there is no such norm.
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
            f"norm={policy!r}: the backbone has no norm outside the head that has these. Leave "
            "norm out."
        )
    return tuple(found.values())


def freeze_backbone(model: nn.Module) -> None:
    """Stops every gradient of the backbone, drops those that an optimizer could still apply, and fixes all statistics."""
    for _, module in backbone_modules(model):
        freeze_norm(module)
        for parameter in module._parameters.values():
            if parameter is not None:
                parameter.requires_grad_(False)
                parameter.grad = None


def rest_norms(module: nn.Module) -> None:
    """Has the norms in a set's modules keep their statistics, which `torch.optim.swa_utils.update_bn` would start anew."""
    for each in module.modules():
        if isinstance(each, nn.modules.batchnorm._BatchNorm):
            each.__dict__["reset_running_stats"] = _keep_statistics


def wake_norms(module: nn.Module) -> None:
    """Undoes `rest_norms`."""
    for each in module.modules():
        if each.__dict__.get("reset_running_stats") is _keep_statistics:
            del each.__dict__["reset_running_stats"]


def drop_hook(hooks: dict[int, Any], hook: Any) -> None:
    """Removes a hook by its function: a handle would not survive copying and pickling."""
    for key in [key for key, value in hooks.items() if value is hook]:
        del hooks[key]


def _keep_statistics() -> None:
    """Stands for the method that starts a norm's statistics anew."""


def _keeps_statistics(module: nn.Module) -> bool:
    # Norms and leaves only: a whole network may own a buffer too (its input's mean, say), and must
    # keep its training behaviour.
    owns_buffers = any(buffer is not None for buffer in module._buffers.values())
    norm = isinstance(module, nn.modules.batchnorm._NormBase)
    return owns_buffers and not isinstance(module, FrozenStatistics) and (norm or is_leaf(module))
