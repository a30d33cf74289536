"""The description of an adapter set as JSON: everything needed to inject the set again."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from typing_extensions import Self

from resadapt.base.overlay import class_of

__all__ = ["SetSpec", "SiteSpec", "blueprint_of", "build_from", "form_of", "is_buildable", "within"]

_MOST_DIMS = 8
_SET_FIELDS = {
    "name": str,
    "family": str,
    "options": dict,
    "dropout": float,
    "norm": str,
    "sites": list,
    "head": list,
    "norms": list,
    "blueprints": dict,
}
_SITE_FIELDS = {
    "name": str,
    "owner": str,
    "channels": int,
    "spatial_dims": int,
    "bottleneck": int,
    "channel_dim": int,
}
# Fields in which two sets must agree for the tensors of one set to fit the other.
_STRUCTURE = ("family", "options", "norm", "sites", "head", "norms")


@dataclass(frozen=True)
class SiteSpec:
    """A site and the size of its adapter.

    Args:
        name: Name of the site, as in ``model.named_modules()``.
        owner: The module that carries the adapter: the site itself, or the last block of a
            Sequential.
        channels: C, size of the output's channel dimension.
        spatial_dims: Number of dimensions other than batch and channels (2 for images, 3 for video,
            0 for ``[N, C]``).
        bottleneck: Width of the adapter's hidden layer, in channels; 0 if the family has none.
        channel_dim: The channel dimension: 1 for ``[N, C, ...]``, -1 for ``[N, ..., C]``.
    """

    name: str
    owner: str
    channels: int
    spatial_dims: int
    bottleneck: int
    channel_dim: int = 1

    @property
    def shape_text(self) -> str:
        """The shape of the site's output, such as ``"[N, 64, *, *]"``."""
        sizes = ["N", *["*"] * self.spatial_dims]
        sizes.insert(1 if self.channel_dim == 1 else len(sizes), str(self.channels))
        return f"[{', '.join(sizes)}]"


@dataclass(frozen=True)
class SetSpec:
    """An adapter set: the adapters at all sites, the head and the norm policy under one name.

    Args:
        name: Name of the set.
        family: Kind of adapter.
        options: Options of the family that the trained adapter depends on, as JSON values.
        dropout: Probability of dropping a hidden unit in training, in [0, 1).
        norm: Norm policy.
        sites: The sites, in the order of ``model.named_modules()``.
        head: Names of the backbone's modules that are trained and saved with the adapters.
        norms: Names of the backbone's norms that the set has a private copy of, under the norm
            policy.
        blueprints: JSON descriptions of the head's modules, by name, as from `form_of`.
    """

    name: str
    family: str
    options: dict[str, Any]
    dropout: float
    norm: str
    sites: tuple[SiteSpec, ...]
    head: tuple[str, ...]
    norms: tuple[str, ...] = ()
    blueprints: dict[str, Any] = field(default_factory=dict)

    @property
    def private(self) -> tuple[str, ...]:
        """Names of the backbone's modules that the set has private versions of: head and norms."""
        return self.head + self.norms

    def to_json(self) -> dict[str, Any]:
        """Returns the description as JSON values."""
        lists = {"head": list(self.head), "norms": list(self.norms)}
        return asdict(self) | {"sites": [asdict(site) for site in self.sites]} | lists

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Reads a description from the untrusted JSON values of a file.

        Args:
            data: JSON values, as from `to_json`.

        Returns:
            The description.

        Raises:
            ValueError: The data does not have the exact form that `to_json` returns.
        """
        record = _typed(data, "set", _SET_FIELDS)
        sites = tuple(SiteSpec(**_typed(site, "site", _SITE_FIELDS)) for site in record["sites"])
        if any(site.channels < 1 or site.bottleneck < 0 or site.spatial_dims < 0 for site in sites):
            raise ValueError("a site has a size below 1")
        if any(site.spatial_dims > _MOST_DIMS for site in sites):
            raise ValueError(f"a site has more than {_MOST_DIMS} spatial dimensions")
        if any(site.channel_dim not in (1, -1) for site in sites):
            raise ValueError("a site's channel_dim is neither 1 nor -1")
        private = record["head"] + record["norms"]
        if not all(isinstance(name, str) for name in private):
            raise ValueError("head and norms: expected lists of names")
        if not set(record["blueprints"]) <= set(record["head"]):
            raise ValueError("blueprints: expected names of head modules only")
        names, owners = {site.name for site in sites}, {site.owner for site in sites}
        if (
            not (sites or private)
            or not len(sites) == len(names) == len(owners)
            or len(set(private)) != len(private)
        ):
            raise ValueError("the set is empty, or a site, owner, head or norm is named twice")
        lists = {"sites": sites, "head": tuple(record["head"]), "norms": tuple(record["norms"])}
        return cls(**record | lists)

    def differences(self, other: SetSpec) -> list[str]:
        """Names the fields that must agree for one set's tensors to fit the other, and differ."""
        differing = [name for name in _STRUCTURE if getattr(self, name) != getattr(other, name)]
        for name in self.blueprints.keys() | other.blueprints.keys():
            pair = [self.blueprints.get(name), other.blueprints.get(name)]
            # Files of 0.2 name no classes.
            if pair[0] != pair[1] and (None not in pair or any(map(is_buildable, pair))):
                return [*differing, "blueprints"]
        return differing


def _typed(data: Any, what: str, kinds: Mapping[str, type]) -> dict[str, Any]:
    if not isinstance(data, dict) or set(data) != set(kinds):
        raise ValueError(f"{what}: expected exactly the fields {sorted(kinds)}")
    for key, kind in kinds.items():
        if type(data[key]) is not kind:
            raise ValueError(
                f"{what}.{key}: expected {kind.__name__}, found {type(data[key]).__name__}"
            )
    return data


_TYPES: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (
        *(
            nn.Linear,
            nn.Bilinear,
            nn.Conv1d,
            nn.Conv2d,
            nn.Conv3d,
            nn.ConvTranspose1d,
            nn.ConvTranspose2d,
            nn.ConvTranspose3d,
        ),
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm),
        *(
            nn.ReLU,
            nn.ReLU6,
            nn.LeakyReLU,
            nn.GELU,
            nn.SiLU,
            nn.Hardswish,
            nn.Tanh,
            nn.Sigmoid,
            nn.Softmax,
            nn.LogSoftmax,
        ),
        *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity, nn.Flatten),
        *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
        *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
        *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    )
}
_DEEPEST = 16


def form_of(module: nn.Module) -> dict[str, Any] | None:
    """Describes a module of a head as JSON values.

    The blueprint; or for a module that cannot be built from one, the names of the classes in it
    that are not torch's; None if all are.
    """
    blueprint, classes = blueprint_of(module), sorted(set(_own_classes(module)))
    return blueprint or ({"classes": classes} if classes else None)


def _own_classes(module: nn.Module) -> Iterator[str]:
    """Yields the names of the classes in a module that belong neither to torch nor to resadapt."""
    kind = class_of(module)
    if not kind.__module__.startswith("torch."):
        yield kind.__name__
    for child in module._modules.values():
        if child is not None and not type(child).__module__.startswith("resadapt."):
            yield from _own_classes(child)


def is_buildable(blueprint: Any) -> bool:
    """Returns whether a module can be built from a description, if the description is valid."""
    return blueprint is not None and not (isinstance(blueprint, dict) and "classes" in blueprint)


def blueprint_of(module: nn.Module) -> dict[str, Any] | None:
    """Describes a module made of torch.nn layers only; None if another class is in it."""
    kind = type(module)
    if kind is nn.Sequential:
        children = {
            name: None if child is None else blueprint_of(child)
            for name, child in module._modules.items()
        }
        return None if None in children.values() else {"type": "Sequential", "children": children}
    if _TYPES.get(kind.__name__) is not kind:
        return None
    settings = {}
    for name in _settings(kind):
        value = (
            module.__dict__[name]
            if name in module.__dict__
            else module._parameters.get(name) is not None
        )
        settings[name] = list(value) if isinstance(value, tuple) else value
    described = {"type": kind.__name__, "settings": settings}
    try:
        with torch.device("meta"):
            same = _shape(build_from(described)) == _shape(module)
    except ValueError:
        same = False
    return described if same else None


def build_from(blueprint: Any) -> nn.Module:
    """Builds a module from an untrusted description.

    Under ``torch.device("meta")`` the module takes no memory.

    Raises:
        ValueError: The description is malformed, or the sizes are impossible.
    """
    try:
        return _build(blueprint, 0)
    except Exception as error:  # constructors raise anything for absurd sizes
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _build(blueprint: Any, depth: int) -> nn.Module:
    if not isinstance(blueprint, dict) or depth > _DEEPEST:
        raise ValueError("not a module description")
    if blueprint.get("type") == "Sequential":
        module = nn.Sequential()
        for name, child in dict(blueprint["children"]).items():
            module.add_module(name, _build(child, depth + 1))
        return module
    kind = _TYPES.get(str(blueprint.get("type")))
    if kind is None:
        raise ValueError(f"{blueprint.get('type')!r} is not one of the known torch.nn layers")
    given = dict(blueprint["settings"])
    if set(given) != set(_settings(kind)) or not all(_is_json(value) for value in given.values()):
        raise ValueError(f"not the arguments of {kind.__name__}: {sorted(given)}")
    return kind(**{key: tuple(v) if isinstance(v, list) else v for key, v in given.items()})


def _settings(kind: type[nn.Module]) -> list[str]:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(kind).parameters.values()
    return [
        each.name
        for each in parameters
        if each.name not in ("device", "dtype", "inplace") and each.kind not in variadic
    ]


def _is_json(value: object) -> bool:
    if isinstance(value, list):
        return all(type(item) in (int, bool) for item in value)
    return value is None or type(value) in (bool, int, float, str)


def _shape(module: nn.Module) -> tuple[Any, ...]:
    tensors = (*module._parameters.items(), *module._buffers.items())
    return module.extra_repr(), [
        (key, None if tensor is None else tuple(tensor.shape)) for key, tensor in tensors
    ]


def within(name: str, modules: Collection[str]) -> bool:
    """Returns whether a name is one of the given modules, or of a module or tensor inside them."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)
