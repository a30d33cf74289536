"""Freezing that holds: no gradients, and norms whose statistics cannot move whatever the training flag says."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from typing_extensions import override

from resadapt.base.errors import InjectionError
from resadapt.base.names import listing, within
from resadapt.base.spec import SetSpec
from resadapt.injection.walk import backbone_modules, is_leaf

__all__ = [
    "FOLDED",
    "NORM_POLICIES",
    "FrozenStatistics",
    "Overlay",
    "as_built",
    "class_of",
    "freeze_norm",
    "freeze_norms",
    "freeze_parameters",
    "gradients_back_on_failure",
    "hold_in_eval",
    "is_frozen",
    "is_held",
    "norms_of",
    "put_class",
    "running_as_built",
    "set_trainable",
    "strip",
    "thaw_norm",
]


FOLDED = "_resadapt_folded"
"""Attribute of a frozen convolution that keeps what it is together with the norm behind it."""
_OF_A_COVER = (FOLDED, "__module__")
"""Attributes that a module has while another class of this library's is over its own."""


class Overlay:
    """Marks the classes that this library puts over a layer's own for a while."""


class FrozenStatistics(Overlay, nn.modules.batchnorm._BatchNorm):
    """Normalises with the running statistics, in training too, and never updates them."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        """Normalises a batch ``[N, C, ...]``."""
        # Only this call: the stock forward branches on the input's dimensions, which torch.fx cannot trace in a class that is
        # not torch.nn's own.
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)

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
    """Forward pre-hook of other modules with statistics (a BatchNorm of one's own, spectral norm): runs them as in evaluation."""
    module.training = False


def freeze_parameters(model: nn.Module) -> None:
    """Stops every gradient of the backbone and drops those that an optimizer could still apply."""
    for _, module in backbone_modules(model):
        for parameter in module._parameters.values():
            if parameter is not None:
                parameter.requires_grad_(False)
                parameter.grad = None


@contextmanager
def gradients_back_on_failure(model: nn.Module) -> Iterator[None]:
    """Runs the body and, if it fails, puts the gradients back that it dropped."""
    gradients = [(parameter, parameter.grad) for parameter in nn.Module.parameters(model)]
    try:
        yield
    except BaseException:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        raise


def freeze_norm(module: nn.Module) -> None:
    """Fixes the statistics of a module, if it has any."""
    if type(module) in _FROZEN and module._buffers["running_mean"] is not None:
        module.__class__ = _FROZEN[type(module)]
    elif _keeps_statistics(module) and not is_held(module):
        # First of all hooks: torch.nn.utils.spectral_norm updates its buffers in a pre-hook of its own.
        module.register_forward_pre_hook(hold_in_eval, prepend=True)


def thaw_norm(module: nn.Module) -> bool:
    """Lets a module run as it was built; tells whether its training flag was held."""
    _uncover(module)
    held = [key for key, hook in module._forward_pre_hooks.items() if hook is hold_in_eval]
    for key in held:
        del module._forward_pre_hooks[key]
    return bool(held)


@contextmanager
def as_built(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Runs the body with modules of the classes that they were built with, for whom looks at what they are."""
    covered = [
        (module, class_of(module), {key: module.__dict__[key] for key in _OF_A_COVER if key in module.__dict__})
        for module in modules
        if isinstance(module, Overlay)
    ]
    try:
        for module, *_ in covered:
            _uncover(module)
        yield
    finally:
        for module, kind, attributes in covered:
            put_class(module, kind)
            module.__dict__.update(attributes)


def is_held(module: nn.Module) -> bool:
    """Tells whether a module's own training flag says nothing, since it is held in evaluation."""
    return hold_in_eval in module._forward_pre_hooks.values()


def is_frozen(module: nn.Module) -> bool:
    """Tells whether a module's statistics are fixed."""
    return isinstance(module, FrozenStatistics) or is_held(module)


NORM_POLICIES = ("frozen", "affine", "stats", "affine+stats")
"""What a set has of its own of the backbone's norms outside its head: nothing, weights and biases, running statistics, or both."""


def norms_of(model: nn.Module, policy: str, head: Collection[str]) -> tuple[str, ...]:
    """Returns the names of the norms of which a set with this policy has its own.

    Raises:
        InjectionError: The policy does not exist, or there is no such norm.
    """
    if policy not in NORM_POLICIES:
        raise InjectionError(f"norm={policy!r} does not exist; there is {listing(NORM_POLICIES)}.")
    if policy == "frozen":
        return ()
    kinds = policy.split("+")
    found: dict[int, str] = {}  # a module with two names counts once
    for name, module in backbone_modules(model):
        statistics = isinstance(module, nn.modules.batchnorm._NormBase) and module._buffers.get("running_mean") is not None
        affine = isinstance(module, _AFFINE) and module._parameters.get("weight") is not None
        if (("affine" in kinds and affine) or ("stats" in kinds and statistics)) and not within(name, head):
            found.setdefault(id(module), name)
    if not found:
        raise InjectionError(f"norm={policy!r}: the backbone has no norm outside the head that has these. Leave norm out.")
    return tuple(found.values())


def set_trainable(norm: nn.Module, policy: str) -> None:
    """Has a set's own norm trained as the set's policy says."""
    for parameter in norm.parameters():
        parameter.requires_grad_("affine" in policy)


def running_as_built(spec: SetSpec) -> tuple[str, ...]:
    """Returns the names of the modules in which norms run as they were built while a set is active."""
    return spec.head + (spec.norms if "stats" in spec.norm else ())


def freeze_norms(model: nn.Module, free: Collection[str]) -> None:
    """Freezes the norms of the backbone outside some modules; those inside run as they were built."""
    for name, module in backbone_modules(model):
        if not within(name, free):
            freeze_norm(module)
        elif thaw_norm(module):
            module.training = model.training


def _uncover(module: nn.Module) -> None:
    """Takes off a module what this library put over its class."""
    if isinstance(module, Overlay):
        strip(module)
        put_class(module, next(cls for cls in type(module).__mro__ if not issubclass(cls, Overlay)))


def strip(module: nn.Module) -> None:
    """Takes the attributes off a module that an `Overlay` has put on it."""
    for key in _OF_A_COVER:
        module.__dict__.pop(key, None)


def put_class(module: nn.Module, kind: Any) -> None:
    """Gives a module another class, under that which torch.nn.utils.parametrize has made for it, if there is one.

    Copies of a module share that one, so it stays as it is: the module gets another like it, and later the same again.
    """
    if not is_parametrized(module):
        module.__class__ = kind
        return
    made = vars(type(module))
    own = {key: value for key, value in made.items() if key not in ("__dict__", "__weakref__", _FIRST)}
    first = made.get(_FIRST, type(module))
    if first.__bases__ == (kind,) and own.keys() <= vars(first).keys():
        module.__class__ = first
    else:
        module.__class__ = type(first.__name__, (kind,), own | {_FIRST: first})


_FIRST = "_resadapt_first"
"""Attribute of a class of this library's making: the one of torch.nn.utils.parametrize in whose place it is."""


def class_of(module: nn.Module) -> type[nn.Module]:
    """Returns a module's class, as `put_class` gives it."""
    return type(module).__bases__[0] if is_parametrized(module) else type(module)


def _keeps_statistics(module: nn.Module) -> bool:
    # Norms and leaves only: a whole network may own a buffer too (its input's mean, say), and must keep its training behaviour.
    owns_buffers = any(buffer is not None for buffer in module._buffers.values())
    norm = isinstance(module, nn.modules.batchnorm._NormBase)
    return owns_buffers and not isinstance(module, FrozenStatistics) and (norm or is_leaf(module))
