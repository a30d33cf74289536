"""A copy of an injected model for tools that support only stock modules."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from resadapt.base.errors import AdapterError, AdapterWarning, check_flag, quote_names
from resadapt.base.tensors import dtype_name
from resadapt.deploy.adapted import InOwnDtype, adapted
from resadapt.deploy.folded_weights import FoldedWeights
from resadapt.deploy.norm_pairs import norm_pairs
from resadapt.deploy.same_outputs import check_outputs, check_rounding, reference_for
from resadapt.deploy.stock_copy import StockCopy, stock_copy
from resadapt.injection.installation import take_place
from resadapt.injection.ledger import ledger_of
from resadapt.injection.own_dtype import dtype_of
from resadapt.injection.walk import backbone_tensors, find_module, replace_module

__all__ = ["inference_copy"]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_FORMATS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)


def inference_copy(
    model: nn.Module,
    name: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    fold: bool = False,
) -> nn.Module:
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

    With ``fold=True`` linear adapters are folded into the modules at their sites, and then each
    BatchNorm, of the set or frozen, into the convolution before it. The BatchNorm becomes an
    Identity, and the convolution gets a bias. Weights are computed in float64 and rounded once, to
    the dtype of the copy. Adapters that are not linear stay beside their modules. Norms are found
    by running the copy: a norm stays if another module or operation uses the convolution's output,
    if one of the two has a hook or a class that is not torch's or torchvision's, or if the model
    cannot be run on a generated input (give ``example_input=`` at the injection).

    Args:
        model: An injected model.
        name: Name of the set; None means the active set.
        dtype: A floating-point dtype for all parameters and buffers of the copy; None keeps theirs.
            Inputs are not cast: pass them in this dtype. The outputs are compared before the cast,
            and again after it: a copy in bfloat16 or float16 that differs from the model by more
            than 0.5 or 0.1 of the largest output gives a warning, and so do tensors with values
            that the dtype cannot hold. ``benchmarks/inference.py`` measures the differences of
            torchvision's ResNets; random weights may amplify rounding beyond these bounds.
        memory_format: The memory format of the copy's weights, such as ``torch.channels_last``;
            None keeps theirs.
        fold: Whether to fold linear adapters and BatchNorms.

    Returns:
        The copy.

    Raises:
        InjectionError: Nothing was injected, or the model has meta tensors (offloaded).
        AdapterKeyError: There is no such set.
        AdapterError: The model cannot be copied, or the outputs of the copy differ; `dtype` or
            `memory_format` has another type, or the weights cannot have this memory format.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from resadapt import inject_adapters
        >>> model = inject_adapters(resnet18()).eval()
        >>> stock, x = inference_copy(model), torch.randn(1, 3, 64, 64)
        >>> torch.equal(stock(x), model(x)), type(stock.bn1).__name__
        (True, 'BatchNorm2d')
        >>> fast = inference_copy(
        ...     model, dtype=torch.bfloat16, memory_format=torch.channels_last, fold=True
        ... )
        >>> fast(x.bfloat16()).dtype, type(fast.bn1).__name__
        (torch.bfloat16, 'Identity')
    """
    _check_arguments(dtype, memory_format, fold)
    name = ledger_of(model).chosen(name).spec.name
    copied = stock_copy(model, name)
    reference = reference_for(model, name)
    weights = FoldedWeights(copied.model)
    if fold:
        weights.fold_adapters(copied)
    stock = _with_adapters(copied)
    if fold and reference is not None:
        for convolution, norm in norm_pairs(stock, reference.inputs):
            weights.fold_norm(find_module(stock, convolution), find_module(stock, norm))
            replace_module(stock, find_module(stock, norm), nn.Identity())
    weights.write()
    if memory_format is not None:
        try:
            stock.to(memory_format=memory_format)
        except RuntimeError as error:
            raise AdapterError(
                f"memory_format={memory_format} does not fit the model's weights: {error}. Give "
                "torch.channels_last for 2-D, torch.channels_last_3d for 3-D convolutions."
            ) from error
    check_outputs(reference, stock)
    if dtype is not None:
        for module in list(stock.modules()):
            if isinstance(module, InOwnDtype):
                replace_module(stock, module, module[0])
        _warn_of_overflow(stock, dtype)
        stock.to(dtype)
        weights.write()  # again from float64, not from what was rounded
        check_rounding(reference, stock, dtype)
    return stock


def _check_arguments(dtype: object, memory_format: object, fold: object) -> None:
    if dtype is not None and not any(dtype is each for each in _DTYPES):
        raise AdapterError(
            f"dtype={dtype!r:.100}: give a floating-point dtype, such as torch.bfloat16, or None."
        )
    if memory_format is not None and not any(memory_format is each for each in _FORMATS):
        raise AdapterError(
            f"memory_format={memory_format!r:.100}: give torch.channels_last, "
            "torch.channels_last_3d or torch.contiguous_format, or None."
        )
    check_flag("fold", fold)


def _warn_of_overflow(stock: nn.Module, dtype: torch.dtype) -> None:
    """Warns of tensors with finite values that a dtype cannot hold: outputs may not show it."""
    if names := [
        path
        for path, tensor in backbone_tensors(stock)
        if tensor.is_floating_point() and bool((tensor.isfinite() & tensor.to(dtype).isinf()).any())
    ]:
        warnings.warn(
            f"Values of {quote_names(names)} are beyond the largest {dtype_name(dtype)} "
            f"({torch.finfo(dtype).max:.3g}) and become infinite in the copy. Give another "
            "dtype; for statistics of norms fold=True may help too.",
            AdapterWarning,
            stacklevel=3,
        )


def _with_adapters(copied: StockCopy) -> nn.Module:
    """Puts each adapter beside its module."""
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
        module = find_module(stock, owner)
        adapter = InOwnDtype(adapters[owner]) if mixed else adapters[owner]
        container = adapted(module, adapter)
        parent, _, key = owner.rpartition(".")
        find_module(stock, parent)._modules[key] = container
        _move_hooks(module, container, copied.later_hooks[owner])
    return stock.eval().requires_grad_(False)


def _move_hooks(module: nn.Module, container: nn.Module, hooks: list[int]) -> None:
    """Moves the forward hooks that read the adapted output to the new container."""
    for place in ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
        source, target = getattr(module, place), getattr(container, place)
        target.update({hook: source.pop(hook) for hook in hooks if hook in source})
