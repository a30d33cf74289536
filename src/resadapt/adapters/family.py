"""What a family of adapters is, the place that an adapter is built for, and the families by name."""

# No annotations from the future here or in a family: torch.jit.script cannot read annotations that
# are text.
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

__all__ = [
    "FAMILIES",
    "Adapter",
    "Site",
    "apply",
    "check_choice",
    "default_of",
    "options_of",
    "register_family",
    "takes",
]


@dataclass(frozen=True)
class Site:
    """The place that an adapter is built for.

    Args:
        channels: C, size of the channel dimension of the module's output.
        spatial_dims: Number of dimensions besides batch and channels: 2 for images, 3 for video, 0
            for ``[N, C]``.
        channel_dim: Where the channels are: 1 for ``[N, C, ...]``, -1 for ``[N, ..., C]``.
        module: The module whose output is adapted, to look at when the adapter is built. An adapter
            must not keep it.
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
    """Base class of the families: the mathematics of one adapter, and nothing else.

    A family's constructor is called as ``family(site, bottleneck=..., dropout=..., **options)``,
    with `bottleneck` and `dropout` only if it has parameters of these names. Options are JSON
    values, which travel in the adapter file; only ``init``, how an adapter starts, does not. It
    raises ValueError at a site where the family has no meaning, and keeps nothing of the site's
    module. Its forward returns the adapted output, of the same shape. Non-linearities should be
    modules: attribution methods look for them.

    Attributes:
        reads: What its forward is called with: ``"output"`` of the site's module; ``"input"``:
            output and input; ``"weight"``: output, input, weight and bias.
        formula: What the adapted output is, as text.
        size: Number of parameters, as text.
        starts: How it starts.
        source: Where it is from, with an arXiv number or DOI.

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
        """Returns the weight and bias with which the site's module alone gives the adapted output,
        in evaluation.

        It changes nothing. Only linear families can.

        Raises:
            ValueError: The family is not linear, or the module has no tensor that could take this
                up.
        """
        raise ValueError("it is not linear")


AdapterT = TypeVar("AdapterT", bound=type[Adapter])
FAMILIES: dict[str, type[Adapter]] = {}


def register_family(name: str) -> Callable[[AdapterT], AdapterT]:
    """Makes a class a family of adapters, usable, saved and loaded by its name; a class decorator.

    A file has the family's name and options, not its code: what loads the file must have registered
    the class before.

    Args:
        name: The family's name, for ``inject_adapters(family=)`` and in files.

    Returns:
        The decorator.

    Raises:
        ValueError: Another class has the name.
        TypeError: The class does not derive from `resadapt.Adapter`, or the name is no text.

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
            f"register_family({name!r}): give the family's name as text, @register_family('name')."
        )

    def register(family: AdapterT) -> AdapterT:
        if not (isinstance(family, type) and issubclass(family, Adapter)):
            raise TypeError(
                f"register_family({name!r}): {family!r} must be a class that derives from "
                "resadapt.Adapter."
            )
        known = FAMILIES.get(name)
        # The same class once more, as a notebook's cell that is run again makes it, takes the place
        # of the first.
        if known is not None and (known.__module__, known.__qualname__) != (
            family.__module__,
            family.__qualname__,
        ):
            raise ValueError(
                f"The family {name!r} is {known.__module__}.{known.__qualname__} already. Register "
                f"{family.__qualname__} under another name."
            )
        FAMILIES[name] = family
        return family

    return register


def takes(family: type[Adapter], argument: str) -> bool:
    """Tells whether a family's constructor has a parameter of this name."""
    return argument in inspect.signature(family).parameters


def default_of(family: type[Adapter], argument: str, otherwise: Any) -> Any:
    """Returns the value that a parameter of a family's constructor has by itself."""
    parameter = inspect.signature(family).parameters.get(argument)
    return (
        otherwise
        if parameter is None or parameter.default is parameter.empty
        else parameter.default
    )


def options_of(family: type[Adapter], given: dict[str, Any]) -> dict[str, Any]:
    """Returns a family's options: those given, and its own values for the others."""
    own = {
        name: parameter.default
        for name, parameter in inspect.signature(family).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        and parameter.default is not parameter.empty
    }
    return {name: value for name, value in own.items() if name not in ("dropout", "init")} | given


def check_choice(argument: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuses a value that is none of the choices.

    Raises:
        ValueError: It is none.
    """
    if value not in choices:
        raise ValueError(
            f"{argument}={value!r} is not known: use {' or '.join(map(repr, choices))}"
        )


def apply(adapter: Any, module: Any, args: tuple[Any, ...], output: Any) -> Any:
    """Returns an adapter's result at its site's module, which was called with some arguments and returned an output."""
    if adapter.reads == "output":
        return adapter(output)
    if adapter.reads == "input":
        return adapter(output, args[0])
    return adapter(output, args[0], module.weight, module.bias)
