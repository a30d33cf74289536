"""Small modules as plain data: the type and sizes of torch's own layers, from which they are built again. Nothing is executed."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

__all__ = ["blueprint_of", "build_from"]

_TYPES: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (
        *(nn.Linear, nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm),
        *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Tanh, nn.Sigmoid, nn.Softmax, nn.LogSoftmax),
        *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity, nn.Flatten),
        *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
        *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
        *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    )
}
_DEEPEST = 16


def blueprint_of(module: nn.Module) -> dict[str, Any] | None:
    """Describes a module made of torch's own layers; None if it has anything else in it."""
    kind = type(module)
    if kind is nn.Sequential:
        children = {name: None if child is None else blueprint_of(child) for name, child in module._modules.items()}
        return None if None in children.values() else {"type": "Sequential", "children": children}
    if _TYPES.get(kind.__name__) is not kind:
        return None
    settings = {}
    for name in _settings(kind):
        value = module.__dict__[name] if name in module.__dict__ else module._parameters.get(name) is not None
        settings[name] = list(value) if isinstance(value, tuple) else value
    described = {"type": kind.__name__, "settings": settings}
    try:
        with torch.device("meta"):
            same = _shape(build_from(described)) == _shape(module)
    except ValueError:
        same = False
    return described if same else None


def build_from(blueprint: Any) -> nn.Module:
    """Builds a module from its description, trusting nothing in it. Under ``torch.device("meta")`` it costs no memory.

    Raises:
        ValueError: It is no description, or no module can be of such sizes.
    """
    try:
        return _build(blueprint, 0)
    except Exception as error:  # whatever constructors make of absurd sizes
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _build(blueprint: Any, depth: int) -> nn.Module:
    if not isinstance(blueprint, dict) or depth > _DEEPEST:
        raise ValueError("no description of a module")
    if blueprint.get("type") == "Sequential":
        module = nn.Sequential()
        for name, child in dict(blueprint["children"]).items():
            module.add_module(name, _build(child, depth + 1))
        return module
    kind = _TYPES.get(str(blueprint.get("type")))
    if kind is None:
        raise ValueError(f"{blueprint.get('type')!r} is none of torch's layers that can be told as data")
    given = dict(blueprint["settings"])
    if set(given) != set(_settings(kind)) or not all(_is_plain(value) for value in given.values()):
        raise ValueError(f"no settings of {kind.__name__}: {sorted(given)}")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def _settings(kind: type[nn.Module]) -> list[str]:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(kind).parameters.values()
    return [each.name for each in parameters if each.name not in ("device", "dtype", "inplace") and each.kind not in variadic]


def _is_plain(value: object) -> bool:
    if isinstance(value, list):
        return all(type(item) in (int, bool) for item in value)
    return value is None or type(value) in (bool, int, float, str)


def _shape(module: nn.Module) -> tuple[Any, ...]:
    tensors = (*module._parameters.items(), *module._buffers.items())
    return module.extra_repr(), [(key, None if tensor is None else tuple(tensor.shape)) for key, tensor in tensors]
