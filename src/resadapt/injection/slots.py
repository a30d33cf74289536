"""Slots: reserved children of the backbone's modules that hold adapters and private modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from typing_extensions import override

from resadapt.base.errors import InjectionError
from resadapt.base.spec import SiteSpec
from resadapt.injection.mixture import Mixture
from resadapt.injection.own_dtype import apply
from resadapt.injection.recomputation import Choice, as_in_forward, thawed

__all__ = ["SLOT", "AdapterSlot"]

SLOT = "resadapt"
"""Name of the reserved child."""
_CURRENT = ""
"""Stands for the active set in compiled code.

torch.compile compiles again for every value of a string that the code reads.
"""


class Part(NamedTuple):
    """What a set has in a slot.

    Args:
        site: The site that the adapter adapts; None without an adapter.
        adapter: The adapter.
        place: The backbone's module that the private module replaces; None without one.
        private: The private module.
    """

    site: SiteSpec | None = None
    adapter: nn.Module | None = None
    place: str | None = None
    private: nn.Module | None = None


class AdapterSlot(nn.Module):
    """Holds the sets' adapters of one module's output, and private modules that replace the module.

    The slot is a child of the adapted module, so moving, copying, sharding or slicing that module
    includes the slot's content.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sites: dict[str, SiteSpec] = {}
        """Sets with an adapter in this slot, and the sites that they adapt."""
        self.routes: dict[str, str] = {}
        """Sets with a private module in this slot, and the backbone modules it replaces."""
        self.active: str | None = None
        self.current = Part()
        """The active set's part, for compiled code: one path to the parts of all sets."""
        self.mixture: Mixture | None = None
        """The set of each sample, while a mixed batch runs."""

    def insert(self, name: str, site: SiteSpec, adapter: nn.Module) -> None:
        """Adds a set's adapter, inactive at first."""
        self.sites[name] = site
        self.add_module(name, adapter)

    def insert_private(self, name: str, place: str, module: nn.Module) -> None:
        """Adds the module that a set runs in place of a module of the backbone.

        Raises:
            InjectionError: The set has another private module in this slot already.
        """
        if name in self.routes and (
            self.routes[name] != place or self._modules[_key(name, place)] is not module
        ):
            raise InjectionError(
                f"Set {name!r}: {self.routes[name]!r} and {place!r} share their last module, so "
                "they cannot both be in the head. Remove one of them from head."
            )
        self.routes[name] = place
        self.add_module(_key(name, place), module)

    def remove(self, name: str) -> None:
        """Removes a set's adapter and private module, if any."""
        if name in self.routes:
            del self._modules[_key(name, self.routes.pop(name))]
        if self.sites.pop(name, None):
            del self._modules[name]
        self.activate(self.active)

    def activate(self, name: str | None) -> None:
        """Activates a set, if the set has an adapter or private module in this slot."""
        self.active = name if name in self.sites or name in self.routes else None
        self.current = self.part(self.active)

    @override
    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Adds or replaces a child; `current` follows."""
        super().add_module(name, module)
        self.activate(self.active)

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute, or replaces a child as many tools do; `current` follows."""
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):
            self.activate(self.active)

    def part(self, name: str | None) -> Part:
        """Returns what a set has in this slot."""
        if name == _CURRENT:
            return self.current
        site, place = self.sites.get(name), self.routes.get(name)  # type: ignore[arg-type]
        return Part(
            site,
            None if site is None else self._modules[name],  # type: ignore[index]
            place,
            None if place is None else self._modules[_key(name, place)],
        )

    def private(self, name: str | None, place: str, default: Any = None) -> Any:
        """Returns the module that a set runs in place of a module of the backbone."""
        part = self.part(name)
        return part.private if part.place == place else default

    def parameters_of(self, choice: Choice) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields the parameters of the chosen sets, by name in the slot."""
        mixture = choice.mixture
        for name in {choice.active} if mixture is None else {*mixture.names}:
            part = self.part(name)
            if part.adapter is not None:
                yield from part.adapter.named_parameters(str(name))
            if part.private is not None:
                yield from part.private.named_parameters(_key(name, str(part.place)))

    @property
    def names(self) -> list[str]:
        """The sites and replaced modules of all sets, for messages."""
        return sorted({site.name for site in self.sites.values()} | {*self.routes.values()})

    def site(self) -> SiteSpec:
        """Returns the active set's site; in a mixed batch the site of any set."""
        return self.sites.get(self.active or "") or next(iter(self.sites.values()))

    def choice(self) -> Choice:
        """Returns the active set or the set of each sample; in recomputations, as in the forward.

        Whatever depends on the active set asks this method.
        """
        if torch.compiler.is_compiling():
            return Choice(_CURRENT, self.mixture)
        return as_in_forward(self, Choice(self.active, self.mixture))

    def run(
        self,
        choice: Choice,
        place: str,
        changes: Callable[[str | None], bool],
        function: Callable[[Part, Any], Any],
        values: Any,
    ) -> Any:
        """Calls a function with the chosen set's part, or in a mixed batch once for each set.

        Args:
            choice: What to run, from `choice`.
            place: Name of the module that runs, for messages.
            changes: Tells whether a set, by name, changes the module.
            function: Called with a set's part and that set's rows of the values; with an empty part
                for the sets that do not change the module.
            values: Tensors with the whole batch in dimension 0, in tuples and dicts.
        """
        with thawed(self, choice) if choice.trainable else nullcontext():
            if choice.mixture is None:
                return function(self.part(choice.active), values)
            return choice.mixture.run(
                place, changes, lambda name, rows: function(self.part(name), rows), values
            )

    def adapt(self, choice: Choice, owner: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Returns the adapted output of a call of the slot's owner."""
        part = self.part(choice.active)
        site = part.site if choice.mixture is None else next(iter(self.sites.values()), None)
        if site is None:
            return output
        return self.run(
            choice,
            site.owner,
            lambda name: name in self.sites,
            lambda part, values: _adapted(part, owner, *values),
            (args, output),
        )

    @override
    def forward(self, *args: object) -> None:
        """Raises: only the owner's forward hook applies adapters."""
        raise InjectionError(
            f"The module at site {self.names} iterates over its children and called the adapter as "
            "one of them. Choose a module inside it; if adapters were injected there already, call "
            "remove_adapters(model) first."
        )


def _key(name: str | None, place: str) -> str:
    """Returns the child name of a set's private module, such as ``day@fc``.

    An adapter's child name is the name of the set.
    """
    return f"{name}@{place.rpartition('.')[2]}"


def _adapted(part: Part, owner: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    site, adapter = part.site, part.adapter
    if site is None:
        return output
    if not isinstance(output, fx.Proxy):  # symbolic values have no type or shape to check
        _check_output(output, site)
    if not args and adapter.reads != "output":  # type: ignore[union-attr]
        raise InjectionError(
            f"Site {site.name!r} was called with keyword arguments only, but its adapter needs "
            "the input. Pass the input as first positional argument."
        )
    adapted = apply(adapter, part.private if part.place == site.owner else owner, args, output)
    if not isinstance(output, fx.Proxy):
        _check_adapted(adapted, output, site)
    return adapted


def _check_adapted(adapted: object, output: Tensor, site: SiteSpec) -> None:
    if torch.jit.is_tracing() or (isinstance(adapted, Tensor) and adapted.shape == output.shape):  # type: ignore[attr-defined, no-untyped-call]
        return
    what = f"shape {list(adapted.shape)}" if isinstance(adapted, Tensor) else type(adapted).__name__
    raise InjectionError(
        f"The adapter at site {site.name!r} returned {what}, but its site returned shape "
        f"{list(output.shape)}: the forward of a family must return the adapted output, of the "
        "same shape."
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
