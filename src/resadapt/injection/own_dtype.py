"""Running a set's modules in their own dtype beside a backbone of another dtype.

The dtype in force is that of a module's tensors, so a module that is converted by hand works too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from resadapt.base.autocast import current_autocast
from resadapt.base.inputs import map_tensors, named_in
from resadapt.base.tensors import all_tensors

__all__ = ["apply", "dtype_of", "in_own_dtype", "promoted"]


def apply(adapter: Any, module: Any, args: tuple[Any, ...], output: Any) -> Any:
    """Calls an adapter after its site's module was called with `args` and returned `output`."""
    if adapter.reads == "output":
        return in_own_dtype(adapter, (output,), {})
    if adapter.reads == "input":
        return in_own_dtype(adapter, (output, args[0]), {})
    return in_own_dtype(adapter, (output, args[0], module.weight, module.bias), {})


def in_own_dtype(
    module: nn.Module,
    args: Iterable[Any],
    kwargs: Mapping[str, Any],
    usual: torch.dtype | None = None,
) -> Any:
    """Calls a module with floating-point inputs in the dtype of the module's tensors.

    Floating-point results are converted to the dtype of the first floating-point input. Modules
    that convert inside get feature maps as they are: in a wider dtype these need more memory.

    Args:
        module: The module.
        args: Positional arguments.
        kwargs: Keyword arguments.
        usual: Dtype of the results if no input is a floating-point tensor; None for any.
    """
    own, values = dtype_of(module), (*args, *kwargs.values())
    first = _first_floating(values)
    if own is None or (isinstance(first, fx.Proxy) and _has_only(first.tracer, own)):
        return module(*args, **kwargs)

    def inwards(tensor: Tensor) -> Tensor:
        return tensor if _converts_inside(module, tensor, own) else _converted(tensor, own)

    if not all(isinstance(each, Tensor) and each.dtype == own for each in values):
        args = [map_tensors(value, inwards) for value in args]
        kwargs = {key: map_tensors(value, inwards) for key, value in kwargs.items()}
    result = module(*args, **kwargs)
    back = usual if first is None else first.dtype
    return result if back is None else map_tensors(result, lambda each: _converted(each, back))


def dtype_of(module: nn.Module, without: str = "") -> torch.dtype | None:
    """Returns the dtype of a module's first floating-point tensor, None if it has none.

    Parameters come before all buffers, since tools leave buffers behind, as thop leaves float64.

    Args:
        module: The module.
        without: Name of children to leave out.
    """
    return _first_dtype(module, "_parameters", without) or _first_dtype(module, "_buffers", without)


def _first_dtype(module: nn.Module, kind: str, without: str) -> torch.dtype | None:
    tensors = module.__dict__[kind]
    if kind == "_parameters" and not tensors:  # plain attributes in replicas of DataParallel
        tensors = module.__dict__.get("_former_parameters", {})
    for tensor in tensors.values():
        if tensor is not None and tensor.is_floating_point():
            return tensor.dtype  # type: ignore[no-any-return]
    for key, child in module._modules.items():
        if child is not None and key != without and (dtype := _first_dtype(child, kind, without)):
            return dtype
    return None


def promoted(one: torch.dtype | None, other: torch.dtype) -> torch.dtype:
    """Returns the smallest dtype with all numbers of two; the second if the first is None."""
    if one is None or one.itemsize == 1:  # torch does not promote numbers of 8 bits
        return other
    return one if other.itemsize == 1 else torch.promote_types(one, other)


def _first_floating(values: Iterable[Any]) -> Any:
    for value in values:
        if isinstance(value, fx.Proxy) or (isinstance(value, Tensor) and value.is_floating_point()):
            return value
        for _, tensor in named_in(value):
            if tensor.is_floating_point():
                return tensor
    return None


def _converted(tensor: Any, dtype: Any) -> Any:
    symbolic = isinstance(tensor, fx.Proxy)  # without a dtype
    if symbolic or (tensor.is_floating_point() and tensor.dtype != dtype):
        return tensor.to(dtype)
    return tensor


def _converts_inside(module: nn.Module, tensor: Any, own: torch.dtype) -> bool:
    """Tells whether a module takes a narrower tensor as it is, and saves no converted copy of it.

    Under autocast every module does, and BatchNorms always do.
    """
    if isinstance(tensor, fx.Proxy) or own is not torch.float32 or tensor.dtype.itemsize >= 4:
        return False
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return True
    return current_autocast(tensor.device.type) is not None


def _has_only(tracer: Any, dtype: torch.dtype) -> bool:
    """Tells whether all floating-point tensors of the model that torch.fx traces have a dtype."""
    tensors = all_tensors(getattr(tracer, "root", nn.Module()))
    return all(each.dtype == dtype for each in tensors if each.is_floating_point())
