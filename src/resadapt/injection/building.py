"""Building a set's adapters from its description."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from resadapt.adapters import FAMILIES, Adapter, Site
from resadapt.adapters.family import options_of, takes
from resadapt.base.errors import InjectionError, quote_names
from resadapt.base.overlay import stock_classes
from resadapt.base.spec import SetSpec, SiteSpec
from resadapt.base.tensors import is_dense
from resadapt.injection.channels import declared
from resadapt.injection.own_dtype import promoted
from resadapt.injection.walk import (
    backbone_modules,
    backbone_tensors,
    find_module,
    ids_of_parts,
    persistent_tensors,
)

__all__ = [
    "build",
    "family_named",
    "fitting_places",
    "json_options",
    "meta_adapter",
    "saved_shapes",
    "saved_tensors",
]


def family_named(name: str) -> type[Adapter]:
    """Returns the family registered under a name.

    Raises:
        InjectionError: No family has that name.
    """
    if not isinstance(name, str) or name not in FAMILIES:
        raise InjectionError(
            f"family={name!r} does not exist; there is {quote_names(FAMILIES)}. Register a custom "
            f"family first, with @resadapt.register_family({name!r}) on its class."
        )
    return FAMILIES[name]


def json_options(family: type[Adapter], given: dict[str, Any]) -> dict[str, Any]:
    """Returns a family's options as loaded from a file: JSON values, with lists for tuples.

    Raises:
        InjectionError: An option is not a JSON value.
    """
    if misplaced := sorted({"bottleneck", "dropout", "site"} & given.keys()):
        raise InjectionError(f"{quote_names(misplaced)} is not a family option. Remove it.")
    options = options_of(family, given)
    for name, value in options.items():
        try:
            options[name] = json.loads(json.dumps(value, allow_nan=False))
            if _lists(value) != options[name]:
                raise ValueError(f"it would be loaded as {options[name]!r:.100}")
        except (TypeError, ValueError, RecursionError) as error:
            raise InjectionError(
                f"{family.__name__}: {name}={value!r:.100} is not a JSON value, but options are "
                f"saved as JSON: {error}. Use dict, list, str, int, finite float, bool, None."
            ) from error
    return options


def _lists(value: Any) -> Any:
    """Returns a value with every tuple converted to a list."""
    if isinstance(value, dict):
        return {key: _lists(each) for key, each in value.items()}
    return [_lists(each) for each in value] if isinstance(value, list | tuple) else value


def build(
    model: nn.Module,
    spec: SetSpec,
    site: SiteSpec,
    start: Mapping[str, Any],
    dtype: torch.dtype | None = None,
) -> Adapter:
    """Returns a new adapter for a site, on the device of the site's module.

    Args:
        model: The model.
        spec: The set.
        site: The site.
        start: Options that only affect the initial values.
        dtype: Least dtype of the adapter; None for the dtype of the site's module.

    Raises:
        InjectionError: The family does not exist, does not take the options, or cannot adapt the
            site.
    """
    with torch.device("cpu"):  # a seed gives the same values for a model on any device
        adapter = _checked(model, spec, site, start)
    owner = find_module(model, site.owner)
    near = [
        t
        for m in (owner, model)
        for _, t in backbone_tensors(m)
        if isinstance(t, nn.Parameter) and t.is_floating_point()
    ]
    if not type(adapter).__module__.startswith("resadapt."):
        # Loading a file builds the adapter on the meta device: fail before training, not after.
        meta_adapter(model, spec, site)
    if near:
        device, dtype = near[0].device, promoted(dtype, near[0].dtype)
        adapter._apply(lambda t: t.to(device, dtype if t.is_floating_point() else t.dtype))  # type: ignore[no-untyped-call]
    return adapter.train(model.training)


def saved_tensors(adapter: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields the parameters and persistent buffers of an adapter, once for each name."""
    for key, module in adapter.named_modules(remove_duplicate=False):
        yield from persistent_tensors(module, key)


def saved_shapes(adapter: nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of `saved_tensors`."""
    return {path: tuple(tensor.shape) for path, tensor in saved_tensors(adapter)}


def meta_adapter(model: nn.Module, spec: SetSpec, site: SiteSpec, **start: Any) -> Adapter:
    """Returns an adapter with meta tensors, which take no memory.

    Raises:
        InjectionError: As `build`.
    """
    with torch.device("meta"), _SkipMetaInit():
        return _checked(model, spec, site, start)


def buildable(model: nn.Module, spec: SetSpec, site: SiteSpec) -> bool:
    """Tells whether a set's family can build an adapter for a site."""
    try:
        with torch.device("meta"), _SkipMetaInit():
            _new(model, spec, site, {})
    except Exception:  # a family's constructor may raise anything
        return False
    return True


def fitting_places(model: nn.Module, spec: SetSpec) -> str:
    """Returns a sentence that lists the modules a set's family can adapt; "" if there are none.

    Only modules whose type gives the output shape are considered.
    """
    found = []
    bottleneck = max((site.bottleneck for site in spec.sites), default=1)
    for name, module in backbone_modules(model):
        if not name or isinstance(module, nn.Sequential) or (shape := declared(module)) is None:
            continue
        if buildable(
            model,
            spec,
            SiteSpec(name, name, shape.channels, shape.spatial_dims, bottleneck, shape.channel_dim),
        ):
            found.append(name)
    return f"It can adapt {quote_names(found)}." if found else ""


def _checked(model: nn.Module, spec: SetSpec, site: SiteSpec, start: Mapping[str, Any]) -> Adapter:
    try:
        adapter = _new(model, spec, site, start)
    except InjectionError:
        raise
    except TypeError as error:
        family = family_named(spec.family)
        known = [name for name in ("bottleneck", "dropout", "init") if takes(family, name)]
        known += options_of(family, {})
        raise InjectionError(
            f"family {spec.family!r} does not take these options: {error}. It takes "
            f"{quote_names(known) or 'none'}."
        ) from error
    except ValueError as error:
        kind = type(find_module(model, site.name)).__name__
        message = f"family {spec.family!r} cannot adapt site {site.name!r} ({kind}): {error}."
        raise InjectionError(f"{message} {fitting_places(model, spec)}".rstrip()) from error
    except Exception as error:  # sizes read from a file or a custom family may raise anything
        where = " on the meta device, where the constructor must run too, without tensor values"
        raise InjectionError(
            f"family {spec.family!r}, bottleneck {site.bottleneck}: cannot build an adapter for "
            f"site {site.name!r}{where if _is_on_meta() else ''}: {type(error).__name__}: {error}."
        ) from error
    _check_adapter(adapter, spec, find_module(model, site.owner))
    if adapter.reads != "output" and site.owner != site.name:
        message = (
            f"Site {site.name!r} is a Sequential: its adapter is attached to the last block "
            f"{site.owner!r} and would read that block's input, but {spec.family!r} needs the "
            "Sequential's input. Choose a module that is not a Sequential."
        )
        raise InjectionError(f"{message} {fitting_places(model, spec)}".rstrip())
    return adapter


def _is_on_meta() -> bool:
    """Tells whether the default device is the meta device."""
    return torch.empty(0).is_meta


def _check_adapter(adapter: Adapter, spec: SetSpec, owner: nn.Module) -> None:
    """Checks an adapter for mistakes that a custom family can make."""
    if "_parameters" not in adapter.__dict__:
        raise InjectionError(
            f"family {spec.family!r}: the constructor of {type(adapter).__name__} does not call "
            "super().__init__()."
        )
    if adapter.reads not in ("output", "input", "weight"):
        raise InjectionError(
            f"family {spec.family!r}: reads={adapter.reads!r}: use 'output', 'input' or 'weight'."
        )
    if adapter.reads == "weight" and not (hasattr(owner, "weight") and hasattr(owner, "bias")):
        raise InjectionError(
            f"family {spec.family!r} reads a weight and a bias, but {type(owner).__name__} has "
            "none."
        )
    for path, tensor in (*adapter.named_parameters(), *adapter.named_buffers()):
        if is_lazy(tensor):
            raise InjectionError(
                f"family {spec.family!r}: {path!r} has no size yet. Lazy modules cannot be "
                "used: the constructor gets sizes from its site (channels, spatial_dims, module)."
            )
        if tensor.is_meta and not _is_on_meta():
            raise InjectionError(
                f"family {spec.family!r}: {path!r} is created on the meta device. Remove the "
                "device argument."
            )
        if is_dense(tensor) and any(
            step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)
        ):
            raise InjectionError(
                f"family {spec.family!r}: elements of {path!r} share memory, as after expand. "
                "Clone the tensor."
            )
    if ids_of_parts(owner) & ids_of_parts(adapter):
        raise InjectionError(
            f"family {spec.family!r} stores a module or tensor of its site, which would be saved "
            "and trained with the adapter. The constructor may read site.module but must not store "
            "it; forward gets the weight with reads = 'weight'."
        )


def _new(model: nn.Module, spec: SetSpec, site: SiteSpec, start: Mapping[str, Any]) -> Adapter:
    family = family_named(spec.family)
    sizes = {"bottleneck": site.bottleneck, "dropout": spec.dropout}
    arguments = (
        copy.deepcopy(spec.options)
        | dict(start)
        | {name: value for name, value in sizes.items() if takes(family, name)}
    )
    module = find_module(model, site.name)
    with stock_classes(each for _, each in backbone_modules(module)):
        return family(Site(site.channels, site.spatial_dims, site.channel_dim, module), **arguments)


class _SkipMetaInit(TorchFunctionMode):
    """Skips random initialisation of meta tensors, the slowest part of building on meta."""

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensor = args[0] if args else kwargs.get("tensor")  # torch.nn.init passes it by keyword
        if (
            getattr(func, "__name__", "") in ("normal_", "uniform_")
            and isinstance(tensor, Tensor)
            and tensor.is_meta
        ):
            return tensor
        return func(*args, **kwargs)
