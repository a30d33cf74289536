"""From what the user writes (names, globs, sizes) to sites: which modules, who carries the adapter, how many channels."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.video import resnet as video
from torchvision.ops import FrozenBatchNorm2d, SqueezeExcitation

from resadapt.base.errors import InjectionError, listing
from resadapt.base.quiet import call, undisturbed
from resadapt.base.spec import SiteSpec
from resadapt.injection.slots import SLOT, AdapterSlot, backbone_modules

__all__ = ["expand", "owner_of", "select_sites"]

Size = int | float


def select_sites(
    model: nn.Module, layers: str | Iterable[str] | Mapping[str, Size], bottleneck: Size, example_input: object = None
) -> tuple[SiteSpec, ...]:
    """Finds the sites that `layers` means.

    Args:
        model: The model.
        layers: Names or globs, or a mapping from them to bottlenecks.
        bottleneck: Size where `layers` gives none: a number of channels, or a fraction of the site's channels in (0, 1).
        example_input: What the model is called with once to measure the sites' outputs; None reads the sizes off the modules.

    Returns:
        The sites, in the order of ``model.named_modules()``.

    Raises:
        InjectionError: A pattern matches nothing, two meet at one place, or a module cannot be a site.
    """
    patterns = expand_argument(layers, "layers")
    sizes = dict(layers) if isinstance(layers, Mapping) else dict.fromkeys(patterns, bottleneck)
    if not sizes:
        raise InjectionError("layers is empty: name at least one module to adapt, such as layers=('layer4',).")
    modules = dict(backbone_modules(model))
    size_of: dict[str, Size] = {}
    site_at: dict[str, str] = {}
    for pattern, size in sizes.items():
        _check_size(pattern, size)
        for name in expand(modules, pattern, "layers"):
            owner = owner_of(model, name)
            if owner in site_at:
                raise InjectionError(
                    f"Layers {site_at[owner]!r} and {name!r} (pattern {pattern!r}) meet at the output of {owner!r}. "
                    "Keep one of them in layers."
                )
            site_at[owner] = name
            size_of[name] = size
    owners = {name: owner for owner, name in site_at.items()}
    measured = _measure(model, owners, example_input) if example_input is not None else None
    sites = []
    for name in sorted(owners, key=list(modules).index):
        shape = measured[name] if measured else _declared(modules[name])
        if shape is None:
            raise InjectionError(
                f"Module {name!r} ({type(modules[name]).__name__}) does not tell how many channels it returns. "
                "Pass example_input=, an input that the model can be called with once."
            )
        channels, spatial_dims = shape
        size = size_of[name]
        width = size if isinstance(size, int) else max(1, round(size * channels))
        sites.append(SiteSpec(name, owners[name], channels, spatial_dims, width))
    return tuple(sites)


def expand_argument(names: str | Iterable[str], argument: str) -> list[str]:
    """Returns a names argument as a list, and refuses what is not text."""
    if not isinstance(names, Iterable):
        raise InjectionError(f"{argument} takes names of modules, found {names!r}. Give a name, or a list of them.")
    listed = [names] if isinstance(names, str) else list(names)
    for name in listed:
        if not isinstance(name, str):
            raise InjectionError(f"{argument} takes names of modules, found {name!r} ({type(name).__name__}).")
    return listed


def expand(modules: Mapping[str, nn.Module], pattern: str, argument: str) -> list[str]:
    """Returns the module names that a name or glob matches; a star stands for anything between two dots.

    Raises:
        InjectionError: Nothing matches; the message lists near misses.
    """
    parts = pattern.split(".")
    found = (
        [pattern]
        if pattern and pattern in modules
        else [
            name
            for name in modules
            if name
            and len(segments := name.split(".")) == len(parts)
            and all(fnmatchcase(segment, part) for segment, part in zip(segments, parts, strict=True))
        ]
    )
    if not found:
        near = difflib.get_close_matches(pattern, [name for name in modules if name], n=5, cutoff=0.5)
        near += [name for name in modules if name.endswith(f".{pattern}") and name not in near][:5]
        hint = f"Did you mean {listing(near)}?" if near else f"The model has {listing([n for n in modules if n])}."
        raise InjectionError(f"{argument}: {pattern!r} matches no module of {type(next(iter(modules.values()))).__name__}. {hint}")
    return found


def owner_of(model: nn.Module, name: str) -> str:
    """Returns the name of the module that carries a site's adapter: the last block for a Sequential, else the site.

    A Sequential iterates over its children, so an adapter cannot be one of them; its last block's output is its own.

    Raises:
        InjectionError: The module cannot be a site.
    """
    module = model.get_submodule(name)
    while type(module).forward is nn.Sequential.forward and "forward" not in module.__dict__:
        if not module._modules:
            raise InjectionError(f"Module {name!r} is an empty container with no output of its own. Choose another layer.")
        name = f"{name}.{list(module._modules)[-1]}"
        module = model.get_submodule(name)
    kind = type(module).__name__
    if type(module).forward is nn.Module.forward:
        raise InjectionError(f"Module {name!r} ({kind}) is never called: it has no forward. Choose a module inside it.")
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        raise InjectionError(
            f"Module {name!r} ({kind}) is a container with a forward of its own, which would meet an adapter among its "
            "children. Choose a module inside it."
        )
    if SLOT in module._modules and not isinstance(module._modules[SLOT], AdapterSlot):
        raise InjectionError(f"Module {name!r} has a child of its own called {SLOT!r}, the name where adapters live. Rename it.")
    aliases = [other for other, candidate in backbone_modules(model) if candidate is module]
    if len(aliases) > 1:
        raise InjectionError(
            f"Module {name!r} is shared: it is also {listing([a for a in aliases if a != name])}, and one adapter cannot "
            "serve several places. Choose a module that has one name, or copy the shared one."
        )
    return name


def _check_size(pattern: str, size: object) -> None:
    whole = isinstance(size, int) and not isinstance(size, bool) and size >= 1
    fraction = isinstance(size, float) and 0.0 < size < 1.0
    if not (whole or fraction):
        raise InjectionError(
            f"bottleneck for {pattern!r} is {size!r}: give a number of channels (an int, 1 or more) or a fraction of the "
            "site's channels (a float between 0 and 1, both excluded)."
        )


def _measure(model: nn.Module, owners: Mapping[str, str], example_input: object) -> dict[str, tuple[int, int]]:
    outputs: dict[str, list[object]] = {name: [] for name in owners}
    handles = [
        model.get_submodule(owner).register_forward_hook(lambda _m, _a, output, seen=outputs[name]: seen.append(output))
        for name, owner in owners.items()
    ]
    try:
        with undisturbed(model):
            call(model, example_input)
    except InjectionError:
        raise
    except Exception as error:
        raise InjectionError(f"The model cannot be called with example_input: {type(error).__name__}: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    for name, seen in outputs.items():
        if len(seen) != 1:
            raise InjectionError(
                f"Site {name!r} ran {len(seen)} times in one forward of example_input, and an adapter needs a module that "
                "runs once. Choose another module, such as the block around it."
            )
        if not isinstance(seen[0], Tensor) or seen[0].ndim < 2 or not seen[0].is_floating_point():
            what = f"shape {list(seen[0].shape)} {seen[0].dtype}" if isinstance(seen[0], Tensor) else type(seen[0]).__name__
            raise InjectionError(
                f"Site {name!r} returned {what}, but an adapter needs one floating-point tensor [N, C, ...]. Choose a module "
                "inside it that returns one."
            )
    return {name: (seen[0].shape[1], seen[0].ndim - 2) for name, seen in outputs.items() if isinstance(seen[0], Tensor)}


_KEEPS_SHAPE = (
    nn.ReLU,
    nn.ReLU6,
    nn.SiLU,
    nn.GELU,
    nn.LeakyReLU,
    nn.Hardswish,
    nn.Identity,
    nn.Dropout,
    nn.Dropout2d,
    nn.Dropout3d,
)


def _declared(module: nn.Module) -> tuple[int, int] | None:
    """Returns channels and spatial dimensions of a module's output where its type tells; the first forward checks them."""
    match module:
        case nn.Conv1d() | nn.ConvTranspose1d():
            return module.out_channels, 1
        case nn.Conv2d() | nn.ConvTranspose2d():
            return module.out_channels, 2
        case nn.Conv3d() | nn.ConvTranspose3d():
            return module.out_channels, 3
        case nn.BatchNorm2d() | nn.InstanceNorm2d():
            return module.num_features, 2
        case nn.BatchNorm3d() | nn.InstanceNorm3d():
            return module.num_features, 3
        case FrozenBatchNorm2d():
            return module.weight.numel(), 2
        case nn.Linear():
            return module.out_features, 0
        case SqueezeExcitation():
            return _declared(module.fc2)
        case Bottleneck() | video.Bottleneck():
            return _declared(module.conv3)
        case BasicBlock() | video.BasicBlock():
            return _declared(module.conv2)
        case nn.Sequential() if type(module).forward is nn.Sequential.forward:
            telling = [child for child in module if not isinstance(child, _KEEPS_SHAPE)]
            return _declared(telling[-1]) if telling else None
    return None
