"""Where adapters live: a slot, the reserved child of the module whose output they adapt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from typing_extensions import override

from resadapt.adapters.family import apply
from resadapt.base.checkpointed import is_checkpointed
from resadapt.base.errors import InjectionError
from resadapt.base.spec import SiteSpec
from resadapt.injection.mixture import Mixture

__all__ = ["SLOT", "AdapterSlot"]

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
        self.mixture: Mixture | None = None
        """Which set's adapter each sample gets, while a batch is mixed."""
        self._last: object = None
        """What ran in the last forward that a backward pass may follow."""

    def insert(self, name: str, site: SiteSpec, adapter: nn.Module) -> None:
        """Takes in a set's adapter, which is not active yet."""
        self.sites[name] = site
        self.add_module(name, adapter)

    def take_out(self, name: str) -> None:
        """Lets go of a set's adapter, if it has one."""
        self.sites.pop(name, None)
        self._modules.pop(name, None)
        self.activate(self.active)

    def activate(self, name: str | None) -> None:
        """Chooses the set whose adapter is applied; a set that has none here leaves the output as it is."""
        self.active = name if name in self.sites else None

    @property
    def running(self) -> SiteSpec:
        """The site that is adapted now: the active set's, in a mixed batch any set's."""
        return self.sites[self.active] if self.active is not None else next(iter(self.sites.values()))

    def adapt(self, owner: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Returns an adapter's result where the owner was called with some arguments and returned an output.

        Which adapter it is, is decided here and nowhere else: the active set's, or in a mixed batch that of each sample's set.
        """
        if not torch.compiler.is_compiling():
            self._check_again()
        if self.mixture is None:
            return self._adapted(self.active, owner, args, output)
        return self.mixture.run(
            self.running.owner, self.sites, lambda name, values: self._adapted(name, owner, *values), (args, output)
        )

    def _check_again(self) -> None:
        """Refuses to compute checkpointed activations anew with another set than they were computed with."""
        now = self.active if self.mixture is None else self.mixture.turn
        if torch._C._current_graph_task_id() == -1:  # no backward pass is going on
            if self.training or torch.is_grad_enabled():
                self._last = now
        elif now != self._last and is_checkpointed():
            raise InjectionError(
                f"Activations around {self.running.owner!r} are computed anew for the backward pass, with {now!r} where it was "
                f"{self._last!r}: call backward before sets are switched, and inside the body of adapters_for."
            )

    def _adapted(self, name: str | None, owner: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if name is None:
            return output
        site, adapter = self.sites[name], self._modules[name]
        if not isinstance(output, fx.Proxy):  # a symbolic value has no type or shape to look at
            _check_output(output, site)
        if not args and adapter.reads != "output":  # type: ignore[union-attr]
            raise InjectionError(
                f"Site {site.name!r} was given its input by keyword, where its adapter cannot see it. Pass it as first argument."
            )
        if self.mixture is not None:
            owner = self.mixture.own.get(site.owner, {}).get(name, owner)
        adapted = apply(adapter, owner, args, output)
        if not isinstance(output, fx.Proxy):
            _check_adapted(adapted, output, site)
        return adapted

    @override
    def forward(self, *args: object) -> None:
        """Refuses: only the hook of the owner applies adapters."""
        names = sorted({site.name for site in self.sites.values()})
        raise InjectionError(
            f"The module at site {names} runs over its own children and met the adapter among them. Choose a module inside it; "
            "if it was injected into already, call remove_adapters(model) first."
        )


def _check_adapted(adapted: object, output: Tensor, site: SiteSpec) -> None:
    if torch.jit.is_tracing() or (isinstance(adapted, Tensor) and adapted.shape == output.shape):  # type: ignore[attr-defined, no-untyped-call]
        return
    what = f"shape {list(adapted.shape)}" if isinstance(adapted, Tensor) else type(adapted).__name__
    raise InjectionError(
        f"The adapter at site {site.name!r} returned {what} where its site returned shape {list(output.shape)}: the forward of a "
        "family returns the adapted output, of the same shape."
    )


def _check_output(output: object, site: SiteSpec) -> None:
    if not isinstance(output, Tensor):
        raise InjectionError(
            f"Site {site.name!r} returned {type(output).__name__}, but an adapter needs one tensor [N, C, ...]. "
            "Call remove_adapters(model) and choose a module inside it that returns a tensor."
        )
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return
    if output.ndim != site.spatial_dims + 2 or output.shape[site.channel_dim] != site.channels:
        raise InjectionError(
            f"Site {site.name!r} returned shape {list(output.shape)}, but its adapter was built for {site.shape_text}. "
            "Call remove_adapters(model) and inject with example_input=, a real input, so that shapes are measured."
        )
