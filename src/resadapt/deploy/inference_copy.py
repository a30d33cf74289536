"""A copy of an injected model for tools that support only stock modules."""

from __future__ import annotations

from torch import nn

from resadapt.deploy.adapted import InOwnDtype, adapted
from resadapt.deploy.same_outputs import check_outputs
from resadapt.deploy.stock_copy import stock_copy
from resadapt.injection.installation import take_place
from resadapt.injection.ledger import ledger_of
from resadapt.injection.own_dtype import dtype_of
from resadapt.injection.walk import backbone_tensors, find_module

__all__ = ["inference_copy"]


def inference_copy(model: nn.Module, name: str | None = None) -> nn.Module:
    """Returns a copy with a single set and stock modules, to fuse, quantize, script or export.

    The copy has stock norm classes, no hooks of this library, and no sets to switch. It is in
    evaluation mode, and no parameter requires gradients: call ``requires_grad_(True)`` before
    pruning or training it. The copy returns the same outputs as the model, which is checked on a
    generated input.

    A module with an adapter becomes a Sequential of module and adapter, so names inside that module
    get a ``.0``: ``layer4.1.conv1`` becomes ``layer4.1.0.conv1``. The Sequential has the module's
    attributes, except methods and, for a layer, its sizes, from which other tools would build a
    layer without the adapter. A module with several arguments becomes a Sequential with a custom
    forward, which torch.jit.script does not support. In a backbone of another dtype than the set's,
    so do adapters, heads and norms: convert a deepcopy of the model before, if that is not wanted.

    Args:
        model: An injected model.
        name: Name of the set; None means the active set.

    Returns:
        The copy.

    Raises:
        InjectionError: Nothing was injected, or the model has meta tensors (offloaded).
        AdapterKeyError: There is no such set.
        AdapterError: The model cannot be copied, or the outputs of the copy differ.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from resadapt import inject_adapters
        >>> model = inject_adapters(resnet18()).eval()
        >>> stock, x = inference_copy(model), torch.randn(1, 3, 64, 64)
        >>> torch.equal(stock(x), model(x)), type(stock.bn1).__name__
        (True, 'BatchNorm2d')
    """
    name = ledger_of(model).chosen(name).spec.name
    copied = stock_copy(model, name)
    stock, adapters = copied.model, copied.adapters
    for path, replaced in copied.replaced.items():
        private = find_module(stock, path)
        if not isinstance(private, InOwnDtype) and dtype_of(private) != dtype_of(replaced):
            take_place(stock, path, InOwnDtype(private))
    tensors = [
        tensor for each in (stock, *adapters.values()) for _, tensor in backbone_tensors(each)
    ]
    mixed = len({tensor.dtype for tensor in tensors if tensor.is_floating_point()}) > 1
    for owner in sorted(adapters, reverse=True):  # inner modules first, before their names change
        parent, _, key = owner.rpartition(".")
        module = find_module(stock, owner)
        adapter = InOwnDtype(adapters[owner]) if mixed else adapters[owner]
        container = adapted(module, adapter)
        find_module(stock, parent)._modules[key] = container
        _move_hooks(module, container, copied.later_hooks[owner])
    check_outputs(model, name, stock.eval().requires_grad_(False))
    return stock


def _move_hooks(module: nn.Module, container: nn.Module, hooks: list[int]) -> None:
    """Moves the forward hooks that read the adapted output to the new container."""
    for place in ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
        source, target = getattr(module, place), getattr(container, place)
        target.update({hook: source.pop(hook) for hook in hooks if hook in source})
