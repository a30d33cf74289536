"""What has no effect in evaluation mode, found by running a module's forward on a stand-in.

A stand-in has neither elements nor sizes, so what a forward does with it holds for every input.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NoReturn

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ignores_setting", "returns_input"]

_DIMENSIONS = range(2, 6)
_DROPOUTS = (
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d),
    *(F.alpha_dropout, F.feature_alpha_dropout),
)


def returns_input(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Returns whether a module in evaluation mode returns its input, as stochastic depth does.

    Only modules that read their mode are run, and those named Identity. Another module that returns
    its input may be there for the settings that its parent reads.

    Args:
        module: A module without parameters and buffers.
        kind: The module's class, without a class of this library over it.
    """
    forward: Any = inspect.unwrap(getattr(kind, "forward", _stop))  # TorchScript's has none
    code = getattr(forward, "__code__", None)
    if kind.__name__ != "Identity" and "training" not in getattr(code, "co_names", ()):
        return False
    kept = _run(module, kind, {})
    return bool(kept) and all(kept)


def ignores_setting(module: nn.Module, kind: type[nn.Module], setting: str) -> bool:
    """Returns whether a BatchNorm in evaluation mode does not read a setting.

    Args:
        module: The norm. A class with its own forward may run children after `F.batch_norm`.
        kind: The module's class, without a class of this library over it.
        setting: Name of the attribute.
    """
    reading = type(kind.__name__, (kind,), {setting: property(_stop)})
    children = dict.fromkeys(module._modules, nn.Identity())  # they have their own records
    return bool(_run(module, reading, children))


def _run(
    module: nn.Module, kind: type[nn.Module], children: Mapping[str, nn.Module | None]
) -> list[bool]:
    """Runs a copy of a module in evaluation mode on inputs of several numbers of dimensions.

    Returns:
        For each input that the module accepts, whether the module returned this very input. Empty
        if the module looked at an input, or failed.
    """
    kept = []
    for number in _DIMENSIONS:
        twin, given = object.__new__(kind), _StandIn(number)
        twin.__dict__.update(module.__dict__, training=False, _modules=children)
        try:
            kept.append(kind.forward(twin, given) is given)
        except (ValueError, AssertionError):  # not with this number of dimensions
            continue
        except (Exception, _LookedAt):
            return []
    return kept


class _LookedAt(BaseException):
    """A forward used a stand-in or a setting. No handler for `Exception` in a forward stops it."""


def _stop(*_: object) -> NoReturn:
    raise _LookedAt


class _StandIn:
    """An input of which only the number of dimensions is known."""

    def __init__(self, ndim: int) -> None:
        self.ndim = ndim

    def dim(self) -> int:
        return self.ndim

    @classmethod
    def __torch_function__(
        cls, function: object, types: object, args: Any, kwargs: Any = None
    ) -> Any:
        if function in _DROPOUTS and kwargs.get("training") is False:
            return args[0]
        return cls(args[0].ndim) if function is F.batch_norm else _stop()

    __class__: Any = property(lambda _: Tensor)  # for isinstance
    __getattr__ = __bool__ = __eq__ = __len__ = __iter__ = _stop
    __hash__ = object.__hash__
