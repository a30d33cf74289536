"""From a set's description to its adapters: the family by name, and an adapter built for its place."""

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
from resadapt.injection.measure import declared
from resadapt.injection.walk import (
    backbone_modules,
    backbone_tensors,
    find_module,
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
    """Returns a family.

    Raises:
        InjectionError: There is none of that name.
    """
    if not isinstance(name, str) or name not in FAMILIES:
        raise InjectionError(
            f"family={name!r} does not exist; there is {quote_names(FAMILIES)}. A family of your "
            f"own must be registered first, with @resadapt.register_family({name!r}) on its class."
        )
    return FAMILIES[name]


def json_options(family: type[Adapter], given: dict[str, Any]) -> dict[str, Any]:
    """Returns a family's options as a file gives them back, where tuples are lists.

    Raises:
        InjectionError: One is no JSON value.
    """
    if misplaced := sorted({"bottleneck", "dropout", "site"} & given.keys()):
        raise InjectionError(f"{quote_names(misplaced)} is no option of a family. Leave it out.")
    options = options_of(family, given)
    for name, value in options.items():
        try:
            options[name] = json.loads(json.dumps(value, allow_nan=False))
            if _lists(value) != options[name]:
                raise ValueError(f"it would come back as {options[name]!r:.100}")
        except (TypeError, ValueError, RecursionError) as error:
            raise InjectionError(
                f"{family.__name__}: {name}={value!r:.100} is no JSON value, and options travel in "
                f"the file: {error}. Use dict, list, str, int, finite float, bool, None."
            ) from error
    return options


def _lists(value: Any) -> Any:
    """Returns a value with lists in place of tuples."""
    if isinstance(value, dict):
        return {key: _lists(each) for key, each in value.items()}
    return [_lists(each) for each in value] if isinstance(value, list | tuple) else value


def build(model: nn.Module, spec: SetSpec, site: SiteSpec, start: Mapping[str, Any]) -> Adapter:
    """Returns a new adapter for a site, in the device and dtype of what is there.

    Args:
        model: The model.
        spec: The set.
        site: The site.
        start: Options that only say how the adapter starts.

    Raises:
        InjectionError: The family does not exist, does not take the options, or has no meaning at
            the site.
    """
    with torch.device("cpu"):  # the same numbers from the same seed, wherever the model is
        adapter = _checked(model, spec, site, start)
    owner = find_module(model, site.owner)
    near = [
        t
        for m in (owner, model)
        for _, t in backbone_tensors(m)
        if isinstance(t, nn.Parameter) and t.is_floating_point()
    ]
    if not type(adapter).__module__.startswith("resadapt."):
        meta_adapter(
            model, spec, site
        )  # as it will be when a file is saved or loaded: better now than after training
    if near:
        like = near[0]
        adapter._apply(
            lambda t: t.to(like.device, like.dtype if t.is_floating_point() else t.dtype)
        )  # type: ignore[no-untyped-call]
    return adapter.train(model.training)


def saved_tensors(adapter: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Walks the parameters and persistent buffers of an adapter, also those that have two names."""
    for key, module in adapter.named_modules(remove_duplicate=False):
        yield from persistent_tensors(module, key)


def saved_shapes(adapter: nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of `saved_tensors`."""
    return {path: tuple(tensor.shape) for path, tensor in saved_tensors(adapter)}


def meta_adapter(model: nn.Module, spec: SetSpec, site: SiteSpec, **start: Any) -> Adapter:
    """Returns an adapter whose tensors have sizes but no values, and take no memory.

    Raises:
        InjectionError: As `build`.
    """
    with torch.device("meta"), _NoStart():
        return _checked(model, spec, site, start)


def buildable(model: nn.Module, spec: SetSpec, site: SiteSpec) -> bool:
    """Returns whether a set's family has an adapter for a site, of the site's width."""
    try:
        with torch.device("meta"), _NoStart():
            _new(model, spec, site, {})
    except Exception:  # a family's constructor may raise anything
        return False
    return True


def fitting_places(model: nn.Module, spec: SetSpec) -> str:
    """Says what in a model a set's family can adapt, as far as modules tell their shapes.

    Empty if nowhere.
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
        raise InjectionError(
            f"family {spec.family!r} does not take these options: {error}."
        ) from error
    except ValueError as error:
        kind = type(find_module(model, site.name)).__name__
        raise InjectionError(
            f"family {spec.family!r} cannot adapt site {site.name!r} ({kind}): {error}. {fitting_places(model, spec)}".rstrip()
        ) from error
    except (
        Exception
    ) as error:  # whatever sizes out of a file, or a family of one's own, bring about
        where = " on the meta device, where its constructor must run too and tensors have no values to read"
        raise InjectionError(
            f"family {spec.family!r}, bottleneck {site.bottleneck}: no adapter can be made for "
            f"site {site.name!r}{where if _is_on_meta() else ''}: {type(error).__name__}: {error}."
        ) from error
    _check_adapter(adapter, spec, find_module(model, site.owner))
    if adapter.reads != "output" and site.owner != site.name:
        raise InjectionError(
            f"Site {site.name!r} is a Sequential: its adapter sits at its last block "
            f"{site.owner!r} and would read that "
            f"block's input, not its own, which {spec.family!r} needs. Name a module itself. {fitting_places(model, spec)}".rstrip()
        )
    return adapter


def _is_on_meta() -> bool:
    """Tells whether tensors that are made now have no values."""
    return torch.empty(0).is_meta


def _check_adapter(adapter: Adapter, spec: SetSpec, owner: nn.Module) -> None:
    """Refuses what a family of one's own may get wrong."""
    if "_parameters" not in adapter.__dict__:
        raise InjectionError(
            f"family {spec.family!r}: the constructor of {type(adapter).__name__} does not call "
            "super().__init__()."
        )
    if adapter.reads not in ("output", "input", "weight"):
        raise InjectionError(
            f"family {spec.family!r}: reads={adapter.reads!r}, where it is 'output', 'input' or "
            "'weight'."
        )
    if adapter.reads == "weight" and not (hasattr(owner, "weight") and hasattr(owner, "bias")):
        raise InjectionError(
            f"family {spec.family!r} reads a weight and a bias, and {type(owner).__name__} has "
            "none."
        )
    for path, tensor in (*adapter.named_parameters(), *adapter.named_buffers()):
        if is_lazy(tensor):
            raise InjectionError(
                f"family {spec.family!r}: {path!r} has no size yet. Give lazy modules their sizes: "
                "the constructor is told them by its site (channels, spatial_dims, module)."
            )
        if tensor.is_meta and not _is_on_meta():
            raise InjectionError(
                f"family {spec.family!r}: {path!r} is made on the meta device, without values. "
                "Leave device out."
            )
        if is_dense(tensor) and any(
            step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)
        ):
            raise InjectionError(
                f"family {spec.family!r}: elements of {path!r} share memory, as after expand: "
                "clone it."
            )
    theirs = {
        id(part)
        for part in (
            *nn.Module.modules(owner),
            *nn.Module.parameters(owner),
            *nn.Module.buffers(owner),
        )
    }
    if any(
        id(part) in theirs
        for part in (*adapter.modules(), *adapter.parameters(), *adapter.buffers())
    ):
        raise InjectionError(
            f"family {spec.family!r} keeps a module or tensor of its site, which would travel in "
            "its file and be trained with it. Have its constructor only look at site.module; its "
            "forward gets the weight with reads = 'weight'."
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
    with stock_classes(nn.Module.modules(module)):
        return family(Site(site.channels, site.spatial_dims, site.channel_dim, module), **arguments)


class _NoStart(TorchFunctionMode):
    """While this is active, tensors without values get no random ones either, which takes torch longer than all else there."""

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensor = args[0] if args else kwargs.get("tensor")  # as torch.nn.init has it
        if (
            getattr(func, "__name__", "") in ("normal_", "uniform_")
            and isinstance(tensor, Tensor)
            and tensor.is_meta
        ):
            return tensor
        return func(*args, **kwargs)
