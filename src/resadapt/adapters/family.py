"""The base class of adapter families, the description of a site, and the registry of families."""

# Without `from __future__ import annotations`, and so in the families: torch.jit.script cannot read
# string annotations.
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from resadapt.adapters.summing import Terms

__all__ = [
    "FAMILIES",
    "Adapter",
    "Site",
    "check_choice",
    "default_of",
    "options_of",
    "register_family",
    "sums_changes",
    "takes",
]


@dataclass(frozen=True)
class Site:
    """The site that an adapter is built for.

    Args:
        channels: C, size of the channel dimension of the module's output.
        spatial_dims: Number of dimensions besides batch and channels: 2 for images, 3 for video, 0
            for ``[N, C]``.
        channel_dim: The channel dimension: 1 for ``[N, C, ...]``, -1 for ``[N, ..., C]``.
        module: The module whose output is adapted. The constructor of an adapter may inspect the
            module but must not keep a reference to it.
    """

    channels: int
    spatial_dims: int = 2
    channel_dim: int = 1
    module: nn.Module | None = None

    @property
    def kind(self) -> str:
        """Name of the module's class, for messages."""
        return type(self.module).__name__


class Adapter(nn.Module):
    """Base class of the families: the mathematics of one adapter.

    A family's constructor is called as ``family(site, bottleneck=..., dropout=..., **options)``,
    with `bottleneck` and `dropout` only if the constructor has parameters of these names. Options
    are JSON values and are saved in the adapter file, except ``init``, which matters only for a new
    adapter. The constructor raises ValueError at sites that the family cannot adapt, and keeps no
    reference to the site's module. ``forward`` returns the adapted output, of the same shape; it
    gets its inputs in the dtype of the adapter's parameters, except under autocast.
    Non-linearities should be modules, since attribution methods look for them.

    Attributes:
        reads: Arguments of ``forward``. ``"output"``: the output of the site's module;
            ``"input"``: output and input; ``"weight"``: output, input, weight and bias.
        formula: The adapted output, as text.
        size: Number of parameters, as text.
        starts: Initialization, as text.
        source: Paper or code of the family, with an arXiv number or DOI.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from resadapt import inject_adapters
        >>> @register_family("shift")
        ... class Shift(Adapter):
        ...     formula = "x + beta"
        ...
        ...     def __init__(self, site):
        ...         super().__init__()
        ...         self.beta = nn.Parameter(torch.zeros(site.channels, *[1] * site.spatial_dims))
        ...
        ...     def forward(self, x):
        ...         return x + self.beta
        >>> model = inject_adapters(resnet18(), "layer4", family="shift")
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        512
    """

    reads = "output"
    formula = ""
    size = ""
    starts = ""
    source = ""

    def folded(self, module: nn.Module) -> "tuple[Tensor, Tensor | None]":
        """Returns the merged weight and bias of the site's module.

        With them the module alone returns the adapted output in evaluation mode. Neither module nor
        adapter changes. Only linear families can be merged.

        Raises:
            ValueError: The family is not linear, or the module has no suitable weight or bias.
        """
        raise ValueError("it is not linear")

    def summed(self, terms: Terms) -> dict[str, Tensor]:
        """Returns the tensors with which this adapter adds the weighted sum of adapters' changes.

        An adapter's change is the adapted output minus the output. This adapter is new, and its
        bottleneck is the sum of the bottlenecks. `combine_adapters` calls this method if
        ``sum_of="changes"``, which is the default for families that also have `folded`.

        Args:
            terms: For each adapter its weight, and its parameters and persistent buffers by name,
                in float64.

        Raises:
            ValueError: No adapter of this family adds such a sum.
        """
        raise ValueError("no adapter of the family adds the sum of two adapters' changes")


AdapterT = TypeVar("AdapterT", bound=type[Adapter])
FAMILIES: dict[str, type[Adapter]] = {}


def register_family(name: str) -> Callable[[AdapterT], AdapterT]:
    """Class decorator that registers an adapter family under a name.

    An adapter file has the family's name and options, but no code: the class must be registered
    before the file is loaded.

    Args:
        name: The family's name, for ``inject_adapters(family=)`` and in files.

    Returns:
        The decorator.

    Raises:
        ValueError: Another class has the name.
        TypeError: The class does not derive from `resadapt.Adapter`, or the name is not a str.

    Example:
        >>> import torch
        >>> @register_family("scaled")
        ... class Scaled(Adapter):
        ...     formula = "a x"
        ...
        ...     def __init__(self, site):
        ...         super().__init__()
        ...         self.a = nn.Parameter(torch.ones(1))
        ...
        ...     def forward(self, x):
        ...         return self.a * x
    """
    if not isinstance(name, str) or not name:
        raise TypeError(
            f"register_family({name!r}): pass the family's name, @register_family('name')."
        )

    def register(family: AdapterT) -> AdapterT:
        if not (isinstance(family, type) and issubclass(family, Adapter)):
            raise TypeError(
                f"register_family({name!r}): {family!r} must be a class that derives from "
                "resadapt.Adapter."
            )
        known = FAMILIES.get(name)
        # A class of the same module and name replaces the registered class, since rerunning a
        # notebook's cell defines the class again.
        if known is not None and (known.__module__, known.__qualname__) != (
            family.__module__,
            family.__qualname__,
        ):
            raise ValueError(
                f"The family {name!r} is already {known.__module__}.{known.__qualname__}. Register "
                f"{family.__qualname__} under another name."
            )
        FAMILIES[name] = family
        return family

    return register


def takes(family: type[Adapter], argument: str) -> bool:
    """Returns whether a family's constructor has a parameter of this name."""
    return argument in inspect.signature(family).parameters


def sums_changes(family: type[Adapter]) -> bool:
    """Returns whether `combine_adapters` sums changes of a family by default, and not tensors."""
    return family.folded is not Adapter.folded and family.summed is not Adapter.summed


def default_of(family: type[Adapter], argument: str, otherwise: Any) -> Any:
    """Returns the default of a constructor parameter, `otherwise` if there is none."""
    parameter = inspect.signature(family).parameters.get(argument)
    if parameter is None or parameter.default is parameter.empty:
        return otherwise
    return parameter.default


def options_of(family: type[Adapter], given: dict[str, Any]) -> dict[str, Any]:
    """Returns a family's options: the given values, and the defaults of the other options."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(family).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        and parameter.default is not parameter.empty
        and name not in ("dropout", "init")
    }
    return defaults | given


def check_choice(argument: str, value: object, choices: tuple[str, ...]) -> None:
    """Checks that an argument is one of some choices.

    Raises:
        ValueError: The value is not among the choices.
    """
    if value not in choices:
        raise ValueError(
            f"{argument}={value!r} is not known: use {' or '.join(map(repr, choices))}"
        )
