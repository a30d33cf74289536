"""Injecting, switching, disabling and removing adapter sets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from resadapt.base.errors import InjectionError
from resadapt.base.quiet import describe
from resadapt.base.spec import SetSpec, SiteSpec
from resadapt.injection.freeze import within
from resadapt.injection.installation import activate, activated, check_model, install, switch, uninstall
from resadapt.injection.ledger import adapter_tensors, find_ledger, head_tensors, ledger_of, unwrap
from resadapt.injection.select import expand, expand_argument, select_sites
from resadapt.injection.slots import backbone_modules, backbone_tensors

__all__ = [
    "AdapterSetInfo",
    "adapters_disabled",
    "inject_adapters",
    "list_adapters",
    "remove_adapters",
    "set_active_adapters",
]

ModelT = TypeVar("ModelT", bound=nn.Module)


def inject_adapters(
    model: ModelT,
    layers: str | Iterable[str] | Mapping[str, int | float] = ("layer1", "layer2", "layer3", "layer4"),
    bottleneck: int | float = 64,
    *,
    family: str = "pooled",
    name: str = "default",
    head: str | Iterable[str] = (),
    norm: str = "frozen",
    dropout: float = 0.1,
    example_input: object = None,
    **family_options: Any,
) -> ModelT:
    """Puts small trainable adapters into a model, in place, and freezes everything else for real.

    The backbone's parameters get no gradients and its BatchNorm statistics stop moving, in training mode too. The new set becomes
    the active one. A failing call leaves the model as it was.

    Args:
        model: Any module, usually a torchvision ResNet. Inject before wrapping it in DDP or torch.compile.
        layers: Names of the modules whose outputs ``[N, C, ...]`` are adapted, as in ``model.named_modules()``; globs, in which a
            star stands for anything between two dots (``"layer*.*"`` is every block); or a mapping from either to a bottleneck.
        bottleneck: Width of the adapters' hidden layer: a number of channels, or a fraction of the site's channels in (0, 1).
        family: Kind of adapter. ``"pooled"`` is the one there is.
        name: Name of the set; several sets can live on one backbone.
        head: Names or globs of modules that are trained with the adapters and saved with them, such as ``"fc"``.
        norm: What the backbone's norms do: ``"frozen"`` keeps their running statistics, in training too.
        dropout: Probability of dropping a hidden unit of an adapter in training, in [0, 1).
        example_input: An input the model is called with once (a tuple: its arguments; a dict: its keywords), in evaluation mode.
            Needed where a module does not tell how many channels it returns.
        **family_options: Options of the family; for ``"pooled"``: ``init="normal"`` or ``"identity"``.

    Returns:
        The same model.

    Raises:
        InjectionError: A layer or head is not found, cannot be adapted, or an option does not exist.

    References:
        Residual adapters: Rebuffi et al. 2017, arXiv:1705.08045; bottleneck adapters: Houlsby et al. 2019, arXiv:1902.00751.

    Example:
        >>> from torchvision.models import resnet18
        >>> model = inject_adapters(resnet18(num_classes=3), bottleneck=64, head="fc")
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        125635
    """
    check_model(model)
    spec = SetSpec(
        name=name,
        family=family,
        options=dict(family_options),
        dropout=float(dropout) if isinstance(dropout, int) else dropout,
        norm=norm,
        sites=select_sites(model, layers, bottleneck, example_input),
        head=_select_head(model, head),
    )
    install(model, spec, describe(example_input))
    return model


def remove_adapters(model: ModelT, name: str | None = None, *, keep_head: bool = False) -> ModelT:
    """Takes adapters out again; with the last set, the model becomes what it was before the injection.

    Parameters, buffers, `requires_grad`, training flags, hooks and module types are put back as they were, so a model that was
    injected in training mode is in training mode afterwards: call ``model.eval()`` if you want it otherwise.

    Args:
        model: An injected model.
        name: The set to remove; None removes all.
        keep_head: Leaves the trained head (the removed set's; the active one's if all go) in the model. Only for the last set.

    Returns:
        The same model.

    Raises:
        InjectionError: Nothing was injected, or `keep_head` with other sets left.
        AdapterKeyError: There is no such set.

    Example:
        >>> from torchvision.models import resnet18
        >>> model = resnet18()
        >>> names = list(model.state_dict())
        >>> list(remove_adapters(inject_adapters(model)).state_dict()) == names
        True
    """
    ledger = ledger_of(model)
    inner = unwrap(model)
    going = list(ledger.sets) if name is None else [ledger.set_named(name).spec.name]
    kept = (name or ledger.active or (going[0] if len(going) == 1 else None)) if keep_head else None
    if keep_head and len(going) < len(ledger.sets):
        raise InjectionError("keep_head would change the backbone under the other sets. Remove them first.")
    if keep_head and kept is None:
        raise InjectionError("keep_head: none of the sets is active, so whose head? Call set_active_adapters(model, name) first.")
    trained = {}
    if kept is not None:
        activate(inner, ledger, kept)
        trained = head_tensors(inner, ledger.sets[kept].spec.head)
    for each in going:
        uninstall(inner, ledger, each)
    with torch.no_grad():
        plain = dict(backbone_tensors(inner))
        for path, tensor in trained.items():
            plain[path].copy_(tensor)
    return model


def set_active_adapters(model: nn.Module, name: str | None) -> None:
    """Switches between named sets, their heads included; the backbone stays frozen throughout.

    Gradients of the set that is left are dropped, so that an optimizer over all parameters cannot apply them later.

    Args:
        model: An injected model.
        name: The set to use; None is the plain backbone.

    Raises:
        InjectionError: Nothing was injected.
        AdapterKeyError: There is no such set.

    Example:
        >>> from torchvision.models import resnet18
        >>> model = inject_adapters(inject_adapters(resnet18(), name="day"), name="night")
        >>> set_active_adapters(model, "day")
        >>> [info.name for info in list_adapters(model) if info.active]
        ['day']
    """
    ledger = ledger_of(model)
    if name is not None:
        ledger.set_named(name)
    switch(unwrap(model), ledger, name)


@contextmanager
def adapters_disabled(model: ModelT) -> Iterator[ModelT]:
    """Runs the body on the plain backbone, head included; its norms stay frozen.

    Args:
        model: An injected model.

    Yields:
        The same model.

    Raises:
        InjectionError: Nothing was injected.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> model, x = resnet18().eval(), torch.randn(1, 3, 32, 32)
        >>> before = model(x)
        >>> model = inject_adapters(model)
        >>> with adapters_disabled(model):
        ...     torch.equal(model(x), before)
        True
    """
    with activated(unwrap(model), ledger_of(model), None):
        yield model


@dataclass(frozen=True)
class AdapterSetInfo:
    """What one set is and holds.

    Args:
        name: Name of the set.
        active: Whether the model runs with it now.
        family: Kind of adapter.
        sites: Each site with its channels and bottleneck.
        head: Names of the modules trained with it.
        norm: Norm policy.
        adapter_parameters: Number of parameters in the adapters.
        head_parameters: Number of parameters in the head.
    """

    name: str
    active: bool
    family: str
    sites: tuple[SiteSpec, ...]
    head: tuple[str, ...]
    norm: str
    adapter_parameters: int
    head_parameters: int


def list_adapters(model: nn.Module) -> list[AdapterSetInfo]:
    """Tells what is injected where.

    Args:
        model: Any model.

    Returns:
        One entry a set, in the order of injection; empty if nothing was injected.

    Example:
        >>> from torchvision.models import resnet18
        >>> [(info.name, info.adapter_parameters) for info in list_adapters(inject_adapters(resnet18(), "layer4", 8))]
        [('default', 8712)]
    """
    ledger = find_ledger(model)
    if ledger is None:
        return []
    inner = unwrap(model)
    infos = []
    for name, record in ledger.sets.items():
        spec = record.spec
        head = record.parked_head or head_tensors(inner, spec.head)
        infos.append(
            AdapterSetInfo(
                name=name,
                active=name == ledger.active,
                family=spec.family,
                sites=spec.sites,
                head=spec.head,
                norm=spec.norm,
                adapter_parameters=sum(t.numel() for _, t in adapter_tensors(inner, spec) if isinstance(t, nn.Parameter)),
                head_parameters=sum(t.numel() for t in head.values() if isinstance(t, nn.Parameter)),
            )
        )
    return infos


def _select_head(model: nn.Module, head: str | Iterable[str]) -> tuple[str, ...]:
    modules = dict(backbone_modules(model))
    asked = [name for pattern in expand_argument(head, "head") for name in expand(modules, pattern, "head")]
    outermost = [name for name in modules if name in asked and not within(name.rpartition(".")[0], asked)]
    for name in outermost:
        owned = head_tensors(model, (name,))
        if not any(isinstance(tensor, nn.Parameter) for tensor in owned.values()):
            raise InjectionError(f"head: module {name!r} has no parameters to train. Choose one that has.")
        for path, tensor in backbone_tensors(model):
            if not within(path, [name]) and any(tensor is other for other in owned.values()):
                raise InjectionError(
                    f"head: {name!r} shares the tensor {path!r} with the backbone, which stays frozen. Untie them."
                )
    return tuple(outermost)
