"""Injecting, switching, disabling and removing adapter sets."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from resadapt.adapters.family import default_of, takes
from resadapt.base.errors import (
    AdapterError,
    AdapterWarning,
    InjectionError,
    check_flag,
    quote_names,
)
from resadapt.base.inputs import describe
from resadapt.base.overlay import class_of
from resadapt.base.spec import SetSpec, form_of
from resadapt.injection.building import family_named, json_options
from resadapt.injection.freeze import freeze_parameters, norms_of
from resadapt.injection.installation import check_model, install, take_place, uninstall
from resadapt.injection.ledger import Ledger, ledger_of, set_tensors
from resadapt.injection.mixture import Mixture
from resadapt.injection.private import convert, private_module
from resadapt.injection.select import RESNET_STAGES, heads_to_give, select_head, select_sites
from resadapt.injection.switching import (
    activated,
    check_switchable,
    lone_samples_refused,
    mixed,
    on_backbone,
    switch,
)
from resadapt.injection.walk import (
    are_sharded,
    backbone_modules,
    find_module,
    reshard,
    slots_of,
    unwrap,
)

__all__ = [
    "adapters_disabled",
    "adapters_for",
    "inject_adapters",
    "remove_adapters",
    "set_active_adapters",
]

ModelT = TypeVar("ModelT", bound=nn.Module)


def inject_adapters(
    model: ModelT,
    layers: str | Iterable[str] | Mapping[str, int | float] = RESNET_STAGES,
    bottleneck: int | float = 64,
    *,
    family: str = "pooled",
    name: str = "default",
    head: str | Iterable[str] | Mapping[str, nn.Module] = (),
    norm: str = "frozen",
    dropout: float | None = None,
    example_input: object = None,
    channel_dim: int | Mapping[str, int] | None = None,
    dtype: torch.dtype | None = torch.float32,
    **family_options: Any,
) -> ModelT:
    """Injects small trainable adapters into a model, in place, and freezes everything else.

    The backbone's parameters get no gradients, and running statistics are not updated, in train
    mode too. The new set becomes active. A failing call leaves the model unchanged.

    Args:
        model: Any module, usually a torchvision ResNet. Inject before wrapping it in DDP or
            torch.compile.
        layers: Names of the modules whose outputs ``[N, C, ...]`` or ``[N, ..., C]`` are adapted,
            as in ``model.named_modules()``; globs, in which a star does not match dots
            (``"layer*.*"`` is every block); or a mapping from either to a bottleneck. Empty for a
            set that has only a head or norms.
        bottleneck: Width of the adapters' hidden layer: a number of channels, or a fraction of the
            site's channels in (0, 1). For ``"lora"`` it is the rank. Families without a hidden
            layer do not take it.
        family: Kind of adapter, one of `list_families`.
        name: Name of the set; a model can have several sets.
        head: Names or globs of modules to train and save with the adapters, such as ``"fc"``: the
            set gets copies of them. Modules without parameters that a glob matches are skipped. Or
            a mapping from names to modules that replace the named ones while the set is active,
            such as ``{"fc": nn.Linear(512, 10)}``: the set gets copies of the given modules.
        norm: What the set has a private copy of in the backbone's norms outside the head:
            ``"frozen"`` nothing, and running statistics are not updated, in train mode too;
            ``"affine"`` trainable weights and biases; ``"stats"`` running statistics, updated in
            train mode; ``"affine+stats"`` both. The backbone's norms do not change.
        dropout: Probability of dropping a hidden unit of an adapter in train mode, in [0, 1). None
            is the family's default: 0.1 for ``"pooled"``.
        example_input: An input for one call of the model (a tuple: positional arguments; a dict:
            keyword arguments), in eval mode, which measures the sites' outputs. Without it, an
            input is generated where the modules' types do not give the shapes.
        channel_dim: Dimension of the channels in the sites' outputs: 1 for ``[N, C, ...]``, -1 for
            ``[N, ..., C]``; or a mapping from names or globs of sites to 1 or -1. None, and sites
            that the mapping leaves out: detected, as the dimension that stays the same when the
            size of the input changes; raises where it remains ambiguous.
        dtype: Least floating-point dtype of the set's adapters, head and norms. In a backbone in
            bfloat16 or float16, they are float32 by default, so that small steps of the optimizer
            are not rounded away; in a backbone in float64 they are float64. None: the dtypes of
            the backbone. The set computes in its own dtype, and its results are converted to the
            dtype of the feature map.
        **family_options: Options of the family, such as ``init="identity"``; the page "Families"
            lists them.

    Returns:
        The same model.

    Raises:
        InjectionError: A layer or head is not found, cannot be adapted, or an option does not
            exist.

    References:
        Residual adapters: Rebuffi et al. 2017, arXiv:1705.08045; bottleneck adapters: Houlsby et
        al. 2019, arXiv:1902.00751.

    Example:
        >>> from torchvision.models import resnet18
        >>> model = inject_adapters(resnet18(num_classes=3), bottleneck=64, head="fc")
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        125635
    """
    check_model(model)
    for argument, value in (("family", family), ("name", name), ("norm", norm)):
        if not isinstance(value, str):
            raise InjectionError(f"{argument}={value!r} is {type(value).__name__}, not a string.")
    if isinstance(dropout, bool) or not isinstance(dropout, int | float | None):
        raise InjectionError(
            f"dropout={dropout!r} is {type(dropout).__name__}: give a probability, a number in [0, "
            "1)."
        )
    _check_dtype(dtype)
    kind = family_named(family)
    if dropout is not None and not takes(kind, "dropout"):
        raise InjectionError(f"family {family!r} has no dropout; remove dropout=.")
    start = {key: family_options.pop(key) for key in ("init",) if key in family_options}
    with on_backbone(model):
        heads = select_head(model, head)
        spec = SetSpec(
            name=name,
            family=family,
            options=json_options(kind, family_options),
            dropout=float(default_of(kind, "dropout", 0.0) if dropout is None else dropout),
            norm=norm,
            sites=select_sites(model, kind, layers, bottleneck, example_input, channel_dim),
            head=tuple(heads),
            norms=norms_of(model, norm, heads),
            blueprints={
                path: form
                for path, module in heads.items()
                if (form := form_of(module)) is not None
            },
        )
        to_give = heads_to_give(model, heads)
    if not spec.sites and not spec.private:
        raise InjectionError(
            "layers is empty, and the set has no head and no private norms: name at least one "
            "module, such as layers=('layer4',), or head='fc'."
        )
    if to_give:
        _warn_of_heads({name: class_of(heads[name]).__name__ for name in to_give})
    install(model, spec, describe(example_input), heads, dtype=dtype, **start)
    return model


def remove_adapters(model: ModelT, name: str | None = None, *, keep_head: bool = False) -> ModelT:
    """Removes adapters; removing the last set restores the model from before the injection.

    Parameters, buffers, `requires_grad`, training flags, hooks and module types are restored, so a
    model that was injected in train mode is in train mode afterwards: call ``model.eval()`` for
    eval mode.

    Args:
        model: An injected model.
        name: The set to remove; None removes all.
        keep_head: Keeps the trained head (the removed set's, or the active set's if all are
            removed) in the model, converted to the dtypes of the modules that it replaces. Only if
            no set remains.

    Returns:
        The same model.

    Raises:
        InjectionError: Nothing was injected, or `keep_head` while other sets remain.
        AdapterKeyError: There is no such set.

    Example:
        >>> from torchvision.models import resnet18
        >>> model = resnet18()
        >>> names = list(model.state_dict())
        >>> list(remove_adapters(inject_adapters(model)).state_dict()) == names
        True
    """
    check_flag("keep_head", keep_head)
    ledger = ledger_of(model)
    inner = unwrap(model)
    going = list(ledger.sets) if name is None else [ledger.set_named(name).spec.name]
    kept = _set_to_keep(ledger, going, name) if keep_head else None
    check_switchable(inner, ledger)
    if are_sharded(module for _, module in backbone_modules(inner)):
        raise InjectionError(
            "Sets cannot be removed from a sharded model (fully_shard). Remove sets before "
            "sharding."
        )
    head = {}
    if kept is not None:
        spec = ledger.sets[kept].spec
        head = {path: private_module(inner, spec, path) for path in spec.head}
    uninstall(inner, ledger, going)
    for path, module in head.items():
        for key, parameter in module.named_parameters(prefix=path):
            parameter.requires_grad_(ledger.requires_grad.get(key, True))
        convert(module, find_module(inner, path))
        take_place(inner, path, module)
    return model


def set_active_adapters(model: nn.Module, name: str | None) -> None:
    """Switches between named sets, with their heads, and freezes the backbone.

    Call it for the set that is active already after other code changed `requires_grad`: the
    backbone and the other sets are frozen again. If other code froze the whole set, its parameters
    require gradients again; a part that you froze by hand stays frozen. Values do not change: a
    backbone that was trained meanwhile has drifted.

    Gradients of the backbone and of the other sets are dropped, so that an optimizer over all
    parameters cannot apply them later.

    Args:
        model: An injected model.
        name: The set to use; None is the backbone without adapters.

    Raises:
        InjectionError: Nothing was injected.
        AdapterKeyError: There is no such set.

    Example:
        >>> from torchvision.models import resnet18
        >>> from resadapt import list_adapters
        >>> model = inject_adapters(inject_adapters(resnet18(), name="day"), name="night")
        >>> set_active_adapters(model, "day")
        >>> [info.name for info in list_adapters(model) if info.active]
        ['day']
    """
    ledger, inner = ledger_of(model), unwrap(model)
    adapter_set = None if name is None else ledger.set_named(name)
    again = name == ledger.active or name in ledger.trained  # after a mixed batch
    switch(inner, ledger, name)
    reshard(inner)
    freeze_parameters(inner)
    if not again and (adapter_set is None or any(adapter_set.requires_grad.values())):
        return  # the switch has restored the flags
    tensors = {} if adapter_set is None else set_tensors(inner, adapter_set.spec)
    if again:
        _freeze_others(inner, {id(tensor) for tensor in tensors.values()})
    if adapter_set is not None:
        own = {path: tensors[path] for path in tensors.keys() & adapter_set.trainable}
        frozen = not any(tensor.requires_grad for tensor in own.values())
        for path, tensor in tensors.items():
            tensor.requires_grad_(path in own and (frozen or tensor.requires_grad))


@contextmanager
def adapters_disabled(model: ModelT) -> Iterator[ModelT]:
    """Runs the body without adapters, with the backbone's head; the norms stay frozen.

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


@contextmanager
def adapters_for(model: ModelT, names: Iterable[str | None]) -> Iterator[ModelT]:
    """Runs the body with one set for each sample of a batch, in one pass through the backbone.

    Every sample goes through the adapters, norms and head of the named set; the result equals that
    of a forward with that set alone, up to rounding. Where the heads' outputs have different
    shapes, the model returns a list with one entry for each sample. Statistics of a set's private
    norms are computed over the set's samples only.

    In training, every named set is trainable: give the optimizer the parameters of all sets.
    Afterwards the sets stay trainable until the active set changes.

    Args:
        model: An injected model.
        names: For each sample of the batch the name of a set, or None for the backbone without
            adapters.

    Yields:
        The same model.

    Raises:
        InjectionError: Nothing was injected; or the model changes the batch size inside, so that
            rows no longer belong to samples; or, in train mode, a norm gets one value per channel
            from the only sample of a set.
        AdapterKeyError: There is no such set.
        AdapterError: `names` is not a list of names.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> model = inject_adapters(resnet18(), name="day", head={"fc": nn.Linear(512, 3)})
        >>> model = inject_adapters(model, name="night", head={"fc": nn.Linear(512, 10)}).eval()
        >>> with adapters_for(model, ["day", "night", "day"]):
        ...     [tuple(row.shape) for row in model(torch.randn(3, 3, 32, 32))]
        [(3,), (10,), (3,)]
    """
    ledger = ledger_of(model)
    if isinstance(names, str) or not isinstance(names, Iterable) or not (listed := list(names)):
        raise AdapterError(
            f"names={names!r}: give a list with the name of a set, or None, for each sample of the "
            "batch."
        )
    for name in listed:
        if name is not None:
            ledger.set_named(name)
    inner, mixture = unwrap(model), Mixture(listed)
    with mixed(inner, ledger, mixture), lone_samples_refused(inner, ledger, mixture):
        yield model


def _check_dtype(dtype: object) -> None:
    # Numbers of 8 bits have no arithmetic.
    if dtype is not None and not (
        isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1
    ):
        raise InjectionError(
            f"dtype={dtype!r} is not a dtype that a set can be trained in: give torch.float32, "
            "torch.float64, torch.bfloat16, torch.float16, or None for the backbone's."
        )


def _warn_of_heads(classes: Mapping[str, str]) -> None:
    """Warns of head modules, by name, whose classes no file can describe."""
    given = ", ".join(f"{name!r}: {kind}(...)" for name, kind in classes.items())
    warnings.warn(
        f"An adapter file cannot describe the head {{{given}}}, which differs from the backbone's: "
        "a file describes stock torch.nn layers only. Loading the file needs such a head: "
        f"load_adapters(model, path, head={{{given}}}), or a backbone that has one. A save is "
        "verified with a copy of the live head; to verify on one that is built afresh, pass "
        "rebuild=, a function that returns a backbone with such a head. A Sequential of stock "
        "layers as head needs none of this.",
        AdapterWarning,
        stacklevel=3,
    )


def _freeze_others(model: nn.Module, own: set[int]) -> None:
    """Freezes the sets' parameters whose ids are not among the given ones."""
    for slot in slots_of(model):
        for parameter in slot.parameters():
            if id(parameter) not in own:
                parameter.requires_grad_(False)
                parameter.grad = None


def _set_to_keep(ledger: Ledger, going: list[str], name: str | None) -> str:
    """Returns the name of the set whose head stays in the model."""
    if len(going) < len(ledger.sets):
        raise InjectionError(
            "keep_head would change the backbone under the other sets. Remove them first."
        )
    kept = name or ledger.active or (going[0] if len(going) == 1 else None)
    if kept is None:
        raise InjectionError(
            f"keep_head keeps the head of the active set, but none of {quote_names(going)} is "
            "active. Call set_active_adapters(model, name) first."
        )
    return kept
