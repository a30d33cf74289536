"""Having the frozen layers of a backbone keep no more for the backward pass than it needs, and undoing that."""

from __future__ import annotations

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from resadapt.base.errors import check_flag
from resadapt.base.overlay import FOLDED, Overlay, class_of, mixin_of, put_class, strip
from resadapt.injection.ledger import ledger_of
from resadapt.injection.private import private_modules
from resadapt.injection.walk import backbone_modules, unwrap
from resadapt.lean.blocks import FOLDING, in_residual_blocks
from resadapt.lean.layers import LEAN
from resadapt.lean.pairs import FoldedPair

__all__ = ["optimize_backbone", "restore_backbone"]


def optimize_backbone(model: nn.Module, *, fold_norms: bool = True) -> nn.Module:
    """Has the frozen layers of an injected model keep no more for the backward pass than the
    gradient of their input needs.

    A frozen convolution then saves its weight, which it has anyway, a norm its statistics, a ReLU
    one bit an element, a max pooling one byte; stock ones save their inputs and outputs.
    Parameters, names, hooks, files and fingerprints do not change, so this can be done and undone
    at any time, and what is trained so loads anywhere.

    Convolutions, BatchNorms, ReLUs and 2-D max poolings of torch.nn are served, and torchvision's
    3-D convolutions; other layers stay as they are. A layer that is trained (a head, a set's own
    norms), exported, traced or transformed by torch.func runs as the stock one. Under torch.compile
    nothing is folded but by the compiler.

    Args:
        model: An injected model; it is changed in place.
        fold_norms: In torchvision's residual blocks and in Sequentials, compute a frozen norm and
            the convolution before it in one step, with a weight and bias made from both in float64.
            That is faster, takes the memory of the weights once more, and rounds differently. It is
            left where anything could see what is between them: an adapter, a hook, a set's own
            norm; and where files are proven. False: outputs are those of the plain backbone to the
            last bit.

    Returns:
        The model.

    Raises:
        InjectionError: Nothing was injected.

    References:
        Saving what the gradients that are asked for need: Bhatia and Dangel 2024, arXiv:2404.12406.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from resadapt import inject_adapters
        >>> model, x = inject_adapters(resnet18()), torch.randn(1, 3, 64, 64)
        >>> plain = model.eval()(x)
        >>> torch.allclose(optimize_backbone(model)(x), plain, rtol=1e-4, atol=1e-4)
        True
        >>> torch.equal(optimize_backbone(model, fold_norms=False)(x), plain)
        True
    """
    check_flag("fold_norms", fold_norms)
    restore_backbone(model)
    layers = _layers(model)
    inside = in_residual_blocks(layers)
    for module in layers:
        kind, mixin = class_of(module), mixin_of(module)
        if is_parametrized(module):
            continue
        if kind in LEAN:
            if not issubclass(kind, Overlay):  # for torch.fx, a leaf is what torch.nn has
                module.__dict__["__module__"] = kind.__module__
            put_class(module, LEAN[kind], mixin)
            if fold_norms and isinstance(module, nn.modules.conv._ConvNd):
                module.__dict__[FOLDED] = FoldedPair(id(module) in inside)
        elif fold_norms and kind in FOLDING:
            put_class(module, FOLDING[kind], mixin)
    return model


def restore_backbone(model: nn.Module) -> nn.Module:
    """Undoes `optimize_backbone`.

    Args:
        model: An injected model, optimized or not; it is changed in place.

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
    stock = {lean: before for before, lean in (LEAN | FOLDING).items()}
    for module in _layers(model):
        strip(module)
        if (kind := class_of(module)) in stock:
            put_class(module, stock[kind], mixin_of(module))
    return model


def _layers(model: nn.Module) -> list[nn.Module]:
    """Returns the modules of the backbone, and those that sets run in place of them."""
    ledger, inner = ledger_of(model), unwrap(model)
    found = {id(module): module for _, module in backbone_modules(inner)}
    for adapter_set in ledger.sets.values():
        found |= {id(module): module for _, module in private_modules(inner, adapter_set.spec)}
    return list(found.values())
