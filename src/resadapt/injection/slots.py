"""Where adapters and a set's private modules live.

A slot, the reserved child of a module of the backbone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from typing_extensions import override

from resadapt.adapters.family import apply
from resadapt.base.errors import InjectionError
from resadapt.base.spec import SiteSpec
from resadapt.base.undisturbed import is_checkpointed
from resadapt.injection.mixture import Mixture

__all__ = ["SLOT", "AdapterSlot"]

SLOT = "resadapt"
"""Name of the reserved child."""


class AdapterSlot(nn.Module):
    """Holds what sets have at one module: adapters of its output, by set name, and private modules
    that run in its place.

    The slot sits beside what it adapts, so that moving, copying, sharding or slicing the module
    takes its content along.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sites: dict[str, SiteSpec] = {}
        """The sets that have an adapter in this slot, and the sites that they adapt."""
        self.routes: dict[str, str] = {}
        """The sets that have a private module in this slot, and the modules of the backbone that these run in place of."""
        self.active: str | None = None
        self.mixture: Mixture | None = None
        """Which set each sample runs with, while a batch is mixed."""
        self._last: object = None
        """What ran in the last forward that a backward pass may follow."""

    def insert(self, name: str, site: SiteSpec, adapter: nn.Module) -> None:
        """Takes in a set's adapter, which is not active yet."""
        self.sites[name] = site
        self.add_module(name, adapter)

    def insert_private(self, name: str, place: str, module: nn.Module) -> None:
        """Takes in the module that a set runs in place of one of the backbone.

        Raises:
            InjectionError: The set has one in this slot already.
        """
        if name in self.routes and (
            self.routes[name] != place or self._modules[_key(name, place)] is not module
        ):
            raise InjectionError(
                f"Set {name!r}: {self.routes[name]!r} and {place!r} end in one module that both "
                "share, and each needs a module of its own there. Take one of them out of head."
            )
        self.routes[name] = place
        self.add_module(_key(name, place), module)

    def take_out(self, name: str) -> None:
        """Lets go of what a set has here, if it has anything."""
        if name in self.routes:
            del self._modules[_key(name, self.routes.pop(name))]
        if self.sites.pop(name, None):
            del self._modules[name]
        self.activate(self.active)

    def activate(self, name: str | None) -> None:
        """Chooses the set that runs; one that has nothing here leaves the module as it is."""
        self.active = name if name in self.sites or name in self.routes else None

    def private(self, name: str | None, place: str) -> nn.Module | None:
        """Returns the module that a set runs in place of one of the backbone, None if it has none."""
        return self._modules[_key(name, place)] if self.routes.get(name) == place else None  # type: ignore[arg-type]

    def site(self) -> SiteSpec:
        """Returns the site that is adapted now: the active set's, in a mixed batch any set's."""
        return (
            self.sites[self.active]
            if self.active in self.sites
            else next(iter(self.sites.values()))
        )

    def adapt(self, owner: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Returns an adapter's result where the owner was called with some arguments and returned
        an output.

        Which adapter it is, is decided here and nowhere else: the active set's, or in a mixed batch
        that of each sample's set.
        """
        if not torch.compiler.is_compiling():
            self._check_again()
        if self.mixture is None:
            return self._adapted(self.active, owner, args, output)
        return self.mixture.run(
            self.site().owner,
            self.sites,
            lambda name, values: self._adapted(name, owner, *values),
            (args, output),
        )

    def _check_again(self) -> None:
        """Refuses to compute checkpointed activations anew with another set than they were computed with."""
        now = self.active if self.mixture is None else self.mixture.turn
        if torch._C._current_graph_task_id() == -1:  # no backward pass is going on
            if self.training or torch.is_grad_enabled():
                self._last = now
        elif now != self._last and is_checkpointed():
            raise InjectionError(
                f"Activations around {self.site().owner!r} are computed anew for the backward "
                f"pass, with {now!r} where it was {self._last!r}: call backward before sets are "
                "switched, and inside the body of adapters_for."
            )

    def _adapted(
        self, name: str | None, owner: nn.Module, args: tuple[Any, ...], output: Any
    ) -> Any:
        if name not in self.sites:
            return output
        site, adapter = self.sites[name], self._modules[name]
        if not isinstance(output, fx.Proxy):  # a symbolic value has no type or shape to look at
            _check_output(output, site)
        if not args and adapter.reads != "output":  # type: ignore[union-attr]
            raise InjectionError(
                f"Site {site.name!r} was given its input by keyword, where its adapter cannot see "
                "it. Pass it as first argument."
            )
        adapted = apply(adapter, self.private(name, site.owner) or owner, args, output)
        if not isinstance(output, fx.Proxy):
            _check_adapted(adapted, output, site)
        return adapted

    @override
    def forward(self, *args: object) -> None:
        """Refuses: only the hook of the owner applies adapters."""
        names = sorted({site.name for site in self.sites.values()} | {*self.routes.values()})
        raise InjectionError(
            f"The module at site {names} runs over its own children and met the adapter among "
            "them. Choose a module inside it; if it was injected into already, call "
            "remove_adapters(model) first."
        )


def _key(name: str | None, place: str) -> str:
    """Returns the child that a set's private module is, such as ``day@fc``.

    An adapter's has the name of the set alone.
    """
    return f"{name}@{place.rpartition('.')[2]}"


def _check_adapted(adapted: object, output: Tensor, site: SiteSpec) -> None:
    if torch.jit.is_tracing() or (isinstance(adapted, Tensor) and adapted.shape == output.shape):  # type: ignore[attr-defined, no-untyped-call]
        return
    what = f"shape {list(adapted.shape)}" if isinstance(adapted, Tensor) else type(adapted).__name__
    raise InjectionError(
        f"The adapter at site {site.name!r} returned {what} where its site returned shape "
        f"{list(output.shape)}: the forward of a family returns the adapted output, of the same "
        "shape."
    )


def _check_output(output: object, site: SiteSpec) -> None:
    if not isinstance(output, Tensor):
        raise InjectionError(
            f"Site {site.name!r} returned {type(output).__name__}, but an adapter needs one tensor "
            "[N, C, ...]. Call remove_adapters(model) and choose a module inside it that returns a "
            "tensor."
        )
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return
    if output.ndim != site.spatial_dims + 2 or output.shape[site.channel_dim] != site.channels:
        raise InjectionError(
            f"Site {site.name!r} returned shape {list(output.shape)}, but its adapter was built "
            f"for {site.shape_text}. Call remove_adapters(model) and inject with example_input=, a "
            "real input, so that shapes are measured."
        )
