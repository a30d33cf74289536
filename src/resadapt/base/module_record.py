"""What a module computes with besides its tensors.

Its type, its configuration, and other state that it saves.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from resadapt.base.overlay import is_ours
from resadapt.base.tensors import dtype_name, raw_bytes

__all__ = ["ModuleRecord", "other_state", "record_modules"]

# They return their input in evaluation, so a model may be built with or without them.
_PASS_THROUGH = frozenset(
    {
        *(
            "Identity",
            "Dropout",
            "Dropout1d",
            "Dropout2d",
            "Dropout3d",
            "AlphaDropout",
            "FeatureAlphaDropout",
        ),
        *("StochasticDepth", "DropPath", "DropBlock2d", "DropBlock3d"),
    }
)
# They compute the same in evaluation, and training on several processes turns the others into the
# last.
_BATCH_NORMS = frozenset({"BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"})
# What only training, or only memory, depends on.
_NOT_COMPUTED_WITH = frozenset({"training", "inplace", "momentum", "dropout"})
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
    """What is known of a module without having it.

    Args:
        type: Name of its class.
        config: Settings that it computes with, such as ``{"stride": [2, 2]}``, and what a class of
            one's own shows of itself.
        state: Digest of each entry of its `state_dict` that is neither a parameter nor a buffer:
            extra state, packed weights.
    """

    type: str
    config: dict[str, Any]
    state: dict[str, str]

    @classmethod
    def of(cls, module: nn.Module) -> ModuleRecord:
        """Returns the record of a module, without its children."""
        kind = next(cls for cls in type(module).__mro__ if not is_ours(cls))
        state = {
            key: hashlib.sha256(_canonical(value)).hexdigest()
            for key, value in other_state(module).items()
        }
        name = "BatchNorm" if kind.__name__ in _BATCH_NORMS else kind.__name__
        return cls(name, _config(module, kind), state)

    def difference(self, other: ModuleRecord) -> str | None:
        """Says how another record differs from this one, None if it does not.

        A setting that only one of them has does not count: versions of torch differ in what a class
        keeps.
        """
        if other.type != self.type:
            return f"is {other.type} where {self.type} was recorded"
        for key in sorted(self.config.keys() & other.config.keys()):
            if other.config[key] != self.config[key]:
                return f"has {key} {other.config[key]} where {self.config[key]} was recorded"
        if other.state != self.state:
            return f"has other state in {sorted({**self.state, **other.state})}"
        return None


def record_modules(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, ModuleRecord]:
    """Returns the record of every module but those on which the output in evaluation does not depend."""
    return {name: ModuleRecord.of(module) for name, module in modules if not _has_no_effect(module)}


def other_state(module: nn.Module) -> dict[str, Any]:
    """Returns what a module itself saves besides parameters and buffers.

    Extra state, packed weights of quantized layers.
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
    if any(
        tensor is not None for tensor in (*module._parameters.values(), *module._buffers.values())
    ):
        return False
    return type(module).__name__ in _PASS_THROUGH or isinstance(module, nn.modules.loss._Loss)


def _config(module: nn.Module, kind: type[nn.Module]) -> dict[str, Any]:
    settings = {
        name: _as_json(module.__dict__.get(name, _NO_SETTING)) for name in _setting_names(kind)
    }
    config = {name: value for name, value in settings.items() if value is not _NO_SETTING}
    if isinstance(
        module, nn.Sequential | nn.ModuleList | nn.ModuleDict
    ):  # which run their children in this order
        config["order"] = [
            name
            for name, child in module._modules.items()
            if child is not None and not _has_no_effect(child)
        ]
    return config | _shown(module, kind)


def _setting_names(kind: type[nn.Module]) -> list[str]:
    """Returns the names of a class's settings.

    Its `__constants__`, the usual ones, and torch.nn's constructor arguments.
    """
    names = {name for cls in kind.__mro__ for name in cls.__dict__.get("__constants__", ())} | set(
        _CONFIGURATION
    )
    if kind.__module__.startswith(
        "torch.nn."
    ):  # a class of one's own may count or cache in such an attribute
        code = kind.__init__.__code__
        names |= set(code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount])
    return sorted(names - _NOT_COMPUTED_WITH)


def _as_json(value: object) -> Any:
    """Returns a setting as JSON values; of a function, its name."""
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
    """Returns what a class from outside torch shows of itself.

    Torch's own texts change from version to version.
    """
    owner = next(cls for cls in kind.__mro__ if "extra_repr" in cls.__dict__)
    if owner.__module__.partition(".")[0] == "torch":
        return {}
    try:
        text = str(module.extra_repr())
    except Exception:  # a module that cannot be printed can be used
        return {}
    return {
        "extra_repr": re.sub(r" at 0x[0-9a-fA-F]+", "", text)
    }  # an address is another one in every process


def _canonical(value: object) -> bytes:
    """Returns bytes that stand for a value of a state_dict, the same in every process."""
    if isinstance(value, Tensor):
        text = f"{dtype_name(value)} {tuple(value.shape)} "
        return text.encode() + bytes(raw_bytes(value))
    if isinstance(value, Mapping):
        return (
            b"{"
            + b",".join(_canonical(key) + b":" + _canonical(item) for key, item in value.items())
            + b"}"
        )
    if isinstance(value, list | tuple):
        return b"[" + b",".join(map(_canonical, value)) + b"]"
    if isinstance(value, bytes | bytearray):
        return repr(bytes(value)).encode()
    if value is None or isinstance(value, bool | int | float | str):
        return json.dumps(value).encode()
    if isinstance(value, torch.dtype):
        return str(value).encode()
    return (
        f"<{type(value).__qualname__}>".encode()
    )  # the value itself may be another in every process
