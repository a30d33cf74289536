"""Where adapters live: a slot, the reserved child of the module whose output they adapt."""

from __future__ import annotations

from collections.abc import Iterator
from threading import get_ident

import torch
from torch import Tensor, fx, nn
from typing_extensions import override

from resadapt.base.errors import InjectionError
from resadapt.base.spec import SiteSpec

__all__ = ["SLOT", "AdapterSlot", "backbone_modules", "backbone_tensors", "fleeting", "is_leaf", "slots_of"]

SLOT = "resadapt"
"""Name of the reserved child."""


class AdapterSlot(nn.Module):
    """Holds the adapters of one module, by set name, and applies the active one.

    The slot sits beside what it adapts, so that moving, copying, sharding or slicing the module takes the adapters along.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sites: dict[str, SiteSpec] = {}
        self.active: str | None = None
        self.calls: dict[int, int] = {}
        """How often the owner ran in the current forward of the whole model, by thread; empty when nobody counts."""

    def adapt(self, output: Tensor) -> Tensor:
        """Returns the active adapter's result for the owner's output ``[N, C, ...]``."""
        runs = self._counted() if self.calls else 1
        if self.active is None:
            return output
        if not isinstance(output, fx.Proxy):  # a symbolic value has no type or shape to look at
            self._check(output, self.sites[self.active], runs)
        adapted: Tensor = self._modules[self.active](output)  # type: ignore[misc]
        return adapted

    def _counted(self) -> int:
        """Counts one run of the owner in this thread's forward, if that is counted."""
        calls = self.calls  # another thread may end the count by putting a new one in its place
        if get_ident() in calls:
            calls[get_ident()] += 1
        return calls.get(get_ident(), 1)

    def _check(self, output: object, site: SiteSpec, runs: int) -> None:
        if not isinstance(output, Tensor):
            raise InjectionError(
                f"Site {site.name!r} returned {type(output).__name__}, but an adapter needs one tensor [N, C, ...]. "
                "Call remove_adapters(model) and choose a module inside it that returns a tensor."
            )
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return
        if output.ndim != site.spatial_dims + 2 or output.shape[1] != site.channels:
            dims = ", ".join(["N", str(site.channels)] + ["*"] * site.spatial_dims)
            raise InjectionError(
                f"Site {site.name!r} returned shape {list(output.shape)}, but its adapter was built for [{dims}]. "
                "Call remove_adapters(model) and inject with example_input=, a real input, so that shapes are measured."
            )
        if runs > 1:
            raise InjectionError(
                f"Site {site.name!r} ran more than once in one forward, and one adapter cannot serve several places. "
                "Call remove_adapters(model) and choose a module that runs once, such as the block around it."
            )

    @override
    def forward(self, *args: object) -> None:
        """Refuses: only the hook of the owner applies adapters."""
        names = sorted({site.name for site in self.sites.values()})
        raise InjectionError(
            f"The module at site {names} runs over its own children and met the adapter among them. "
            "Call remove_adapters(model) and choose a module inside it."
        )


def backbone_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Walks the modules as `nn.Module.named_modules` does, without slots, and once for each name of a shared module."""
    yield prefix, model
    for key, child in model._modules.items():
        if child is not None and not isinstance(child, AdapterSlot):
            yield from backbone_modules(child, f"{prefix}.{key}" if prefix else key)


def backbone_tensors(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Walks every parameter and buffer of the backbone, non-persistent buffers included."""
    for name, module in backbone_modules(model, prefix):
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield f"{name}.{key}" if name else key, tensor


def is_leaf(module: nn.Module) -> bool:
    """Tells whether a module has no children of the backbone's."""
    return all(child is None or isinstance(child, AdapterSlot) for child in module._modules.values())


def slots_of(model: nn.Module) -> Iterator[AdapterSlot]:
    """Walks the slots of a model."""
    for _, module in backbone_modules(model):
        if isinstance(slot := module._modules.get(SLOT), AdapterSlot):
            yield slot


def fleeting(model: nn.Module) -> set[str]:
    """Returns the names of non-persistent buffers, which a module may make while it runs."""
    return {
        f"{name}.{key}" if name else key for name, module in backbone_modules(model) for key in module._non_persistent_buffers_set
    }
