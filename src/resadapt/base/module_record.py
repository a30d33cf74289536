"""What a module computes with besides parameters and buffers: type, settings, other saved state."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from resadapt.base.evaluation import ignores_setting, returns_input
from resadapt.base.overlay import users_class
from resadapt.base.tensors import dtype_name, raw_bytes

__all__ = ["ModuleRecord", "other_state", "record_modules"]

# Norms that compute the same in evaluation mode; distributed training converts them to
# SyncBatchNorm.
_BATCH_NORMS = frozenset({"BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"})
# Settings without effect on the outputs in evaluation mode.
_NOT_COMPUTED_WITH = frozenset({"training", "inplace", "momentum", "dropout"})
_TRACKING = "track_running_stats"
# In evaluation mode, these use the running statistics if there are any.
_IGNORE_TRACKING = (nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward)
_NO_SETTING = object()
_CONFIGURATION = (
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
    "eps",
    "num_heads",
    "normalized_shape",
)


@dataclass(frozen=True)
class ModuleRecord:
    """Type, settings and other state of a module.

    Args:
        type: Name of the class.
        config: Settings that affect the output, such as ``{"stride": [2, 2]}``, and the
            ``extra_repr`` of classes from outside torch.
        state: Digest of each entry of the `state_dict` that is neither a parameter nor a buffer:
            extra state, packed weights.
    """

    type: str
    config: dict[str, Any]
    state: dict[str, str]

    @classmethod
    def of(cls, module: nn.Module) -> ModuleRecord:
        """Returns the record of a module, without its children."""
        kind = users_class(module)
        state = {
            key: hashlib.sha256(_canonical(value)).hexdigest()
            for key, value in other_state(module).items()
        }
        name = "BatchNorm" if kind.__name__ in _BATCH_NORMS else kind.__name__
        return cls(name, _config(module, kind), state)

    def difference(self, other: ModuleRecord) -> str | None:
        """Returns how another record differs from this record, None if it does not.

        Settings that only one of the two records has are ignored: versions of torch differ in the
        attributes of a class.
        """
        if other.type != self.type:
            return f"is {other.type} where {self.type} was recorded"
        for key in sorted(self.config.keys() & other.config.keys()):
            if other.config[key] != self.config[key]:
                return f"has {key} {other.config[key]} where {self.config[key]} was recorded"
        if other.state != self.state:
            return f"has other state in {sorted({**self.state, **other.state})}"
        return None

    def without_children(self, name: str, children: Collection[str]) -> ModuleRecord:
        """Returns the record of the module `name` without some children, given by full name."""
        order = self.config.get("order")
        if not children or not isinstance(order, list):
            return self
        kept = [key for key in order if (f"{name}.{key}" if name else key) not in children]
        return replace(self, config={**self.config, "order": kept})


def record_modules(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, ModuleRecord]:
    """Returns the record of every module that affects the output in evaluation mode."""
    return {name: ModuleRecord.of(module) for name, module in modules if not _has_no_effect(module)}


def other_state(module: nn.Module) -> dict[str, Any]:
    """Returns a module's saved state besides parameters and buffers, without its children.

    Examples are extra state and the packed weights of quantized layers.
    """
    kind = type(module)
    if (
        kind.get_extra_state is nn.Module.get_extra_state
        and kind._save_to_state_dict is nn.Module._save_to_state_dict
    ):
        return {}
    saved: dict[str, Any] = {}
    module._save_to_state_dict(saved, "", True)
    return {
        key: value
        for key, value in saved.items()
        if key not in module._parameters and key not in module._buffers
    }


def _has_no_effect(module: nn.Module) -> bool:
    """Returns whether a module does not change the output in evaluation mode.

    Such a module has no tensors, and returns its input or is a loss.
    """
    if any(
        tensor is not None for tensor in (*module._parameters.values(), *module._buffers.values())
    ):
        return False
    return isinstance(module, nn.modules.loss._Loss) or returns_input(module, users_class(module))


def _config(module: nn.Module, kind: type[nn.Module]) -> dict[str, Any]:
    settings = {
        name: _as_json(module.__dict__.get(name, _NO_SETTING)) for name in _setting_names(kind)
    }
    config = {name: value for name, value in settings.items() if value is not _NO_SETTING}
    if _TRACKING in config and (
        kind.forward in _IGNORE_TRACKING or ignores_setting(module, kind, _TRACKING)
    ):
        del config[_TRACKING]
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        # They run their children in this order.
        config["order"] = [
            name
            for name, child in module._modules.items()
            if child is not None and not _has_no_effect(child)
        ]
    return config | _shown(module, kind)


def _setting_names(kind: type[nn.Module]) -> list[str]:
    """Returns the names of a class's settings.

    These are the names in `__constants__` and `_CONFIGURATION`, and for classes of torch.nn the
    constructor arguments. Other classes may count or cache in an attribute named as an argument.
    """
    constants = {key for cls in kind.__mro__ for key in cls.__dict__.get("__constants__", ())}
    names = constants | set(_CONFIGURATION)
    if kind.__module__.startswith("torch.nn."):
        code = kind.__init__.__code__
        names |= set(code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount])
    return sorted(names - _NOT_COMPUTED_WITH)


def _as_json(value: object) -> Any:
    """Converts a setting to JSON values, a function to its name."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if value - value == 0 else str(value)  # JSON has no infinity
        case list() | tuple():
            items = [_as_json(item) for item in value]
            return _NO_SETTING if _NO_SETTING in items else items
        case FunctionType() | BuiltinFunctionType():
            return value.__name__
    return _NO_SETTING


def _shown(module: nn.Module, kind: type[nn.Module]) -> dict[str, str]:
    """Returns the ``extra_repr`` of a class from outside torch.

    The texts of torch's classes differ between versions of torch.
    """
    owner = next(cls for cls in kind.__mro__ if "extra_repr" in cls.__dict__)
    if owner.__module__.partition(".")[0] == "torch":
        return {}
    try:
        text = str(module.extra_repr())
    except Exception:  # a module that cannot be printed may still run
        return {}
    # Addresses of objects differ between processes.
    return {"extra_repr": re.sub(r" at 0x[0-9a-fA-F]+", "", text)}


def _canonical(value: object) -> bytes:
    """Serializes a value of a state_dict to bytes that are equal in every process."""
    if isinstance(value, Tensor):
        text = f"{dtype_name(value)} {tuple(value.shape)} "
        return text.encode() + bytes(raw_bytes(value))
    if isinstance(value, Mapping):
        items = (_canonical(key) + b":" + _canonical(item) for key, item in value.items())
        return b"{" + b",".join(items) + b"}"
    if isinstance(value, list | tuple):
        return b"[" + b",".join(map(_canonical, value)) + b"]"
    if isinstance(value, bytes | bytearray):
        return repr(bytes(value)).encode()
    if value is None or isinstance(value, bool | int | float | str):
        return json.dumps(value).encode()
    if isinstance(value, torch.dtype):
        return str(value).encode()
    # The repr of another object may differ between processes.
    return f"<{type(value).__qualname__}>".encode()
