"""Reducing the memory that frozen layers save for the backward pass, and undoing that."""

from __future__ import annotations

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from resadapt.base.errors import check_flag
from resadapt.base.overlay import CONSTANTS, PAIRS, Overlay, class_of, mixin_of, put_class, strip
from resadapt.injection.ledger import ledger_of
from resadapt.injection.private import private_modules
from resadapt.injection.walk import backbone_modules, unwrap
from resadapt.lean.constants import Constants
from resadapt.lean.folding import FoldsNorms, pairs_in
from resadapt.lean.layers import LEAN

__all__ = ["optimize_backbone", "restore_backbone"]


def optimize_backbone(model: nn.Module, *, fold_norms: bool = True) -> nn.Module:
    """Makes frozen layers save only what the gradient of their input needs, in place.

    A frozen convolution then saves a reference to its weight, a norm references to its statistics,
    a ReLU one bit per element and a max pooling one byte; stock layers save inputs or outputs.
    Parameters, names, hooks, files and fingerprints do not change, so the model can be optimized
    and restored at any time, and its adapter files load into any copy of the backbone.

    Under autocast, frozen weights are converted once and not in each forward.

    Supported are convolutions, Linears, BatchNorms, ReLUs and 2-D max poolings of torch.nn, and
    torchvision's 3-D convolutions; other layers do not change. A layer that is trained (a head, a
    private norm), exported, traced or transformed by torch.func runs like the stock layer. Under
    torch.compile only the compiler folds.

    Args:
        model: An injected model; changed in place. On the CPU it is fastest in channels_last:
            ``model.to(memory_format=torch.channels_last)``.
        fold_norms: Fold each frozen norm into the convolution before it, with a weight and bias
            computed in float64. Pairs are found by tracing the forward of the modules around them.
            Folding is faster, needs memory for a second copy of the weights, and rounds
            differently. A pair is not folded if an adapter, a hook or a private norm needs the
            tensor between them, or while a file is verified. False: outputs equal those of the
            stock layers bit for bit.

    Returns:
        The model.

    Raises:
        InjectionError: Nothing was injected.

    References:
        Saving only the tensors that the requested gradients need: Bhatia and Dangel 2024,
        arXiv:2404.12406.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from resadapt import inject_adapters
        >>> model, x = inject_adapters(resnet18()), torch.randn(1, 3, 64, 64)
        >>> expected = model.eval()(x)
        >>> torch.allclose(optimize_backbone(model)(x), expected, rtol=1e-4, atol=1e-4)
        True
        >>> torch.equal(optimize_backbone(model, fold_norms=False)(x), expected)
        True
    """
    check_flag("fold_norms", fold_norms)
    restore_backbone(model)
    layers = _layers(model)
    for module in layers:
        kind, mixin = class_of(module), mixin_of(module)
        if kind in LEAN and not is_parametrized(module):
            if not issubclass(kind, Overlay):  # torch.fx treats classes of torch.nn as leaves
                module.__dict__["__module__"] = kind.__module__
            put_class(module, LEAN[kind], mixin)
            if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
                module.__dict__[CONSTANTS] = Constants()
    for module in layers if fold_norms else ():
        if mixin_of(module) is None and (pairs := pairs_in(module)):
            put_class(module, class_of(module), FoldsNorms)
            module.__dict__[PAIRS] = pairs
    return model


def restore_backbone(model: nn.Module) -> nn.Module:
    """Undoes `optimize_backbone`.

    Args:
        model: An injected model, optimized or not; changed in place.

    Returns:
        The model.

    Raises:
        InjectionError: Nothing was injected.

    Example:
        >>> from torchvision.models import resnet18
        >>> from resadapt import inject_adapters
        >>> model = optimize_backbone(inject_adapters(resnet18()))
        >>> type(model.conv1).__name__, type(restore_backbone(model).conv1).__name__
        ('LeanConv2d', 'Conv2d')
    """
    stock = {lean: before for before, lean in LEAN.items()}
    for module in _layers(model):
        strip(module)
        if mixin_of(module) is FoldsNorms:
            put_class(module, class_of(module), None)
        if (kind := class_of(module)) in stock:
            put_class(module, stock[kind], mixin_of(module))
    return model


def _layers(model: nn.Module) -> list[nn.Module]:
    """Returns the modules of the backbone, and the private modules of all sets."""
    ledger, inner = ledger_of(model), unwrap(model)
    found = {id(module): module for _, module in backbone_modules(inner)}
    for adapter_set in ledger.sets.values():
        found |= {id(module): module for _, module in private_modules(inner, adapter_set.spec)}
    return list(found.values())
