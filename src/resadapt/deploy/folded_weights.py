"""Adapters and norms folded into the weights of layers, in float64 until these are written."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from resadapt.adapters import Adapter
from resadapt.adapters.folding import swap_if_transposed
from resadapt.base.tensors import address
from resadapt.deploy.stock_copy import StockCopy
from resadapt.injection.walk import backbone_tensors, find_module

__all__ = ["FoldedWeights"]


class FoldedWeights:
    """New weights and biases of a model's layers, which the model gets when they are written.

    Args:
        model: A model with stock modules.
    """

    def __init__(self, model: nn.Module) -> None:
        self._uses = Counter(address(tensor) for _, tensor in backbone_tensors(model))
        self._tensors: dict[nn.Module, dict[str, Tensor]] = {}

    def fold_adapters(self, copied: StockCopy) -> dict[str, str]:
        """Folds the adapters that can be folded, and removes them from `copied.adapters`.

        Returns:
            For every other adapter, by the name of its module, why it cannot be folded.
        """
        refused = {}
        for owner, adapter in list(copied.adapters.items()):
            module = find_module(copied.model, owner)
            try:
                _check_not_altered(module, copied.later_hooks[owner])
                self._fold_adapter(module, adapter)
            except Exception as error:  # custom families may raise anything
                reason = str(error) if isinstance(error, ValueError) else _quoted(error)
                refused[owner] = f"({type(module).__name__}): {reason}"
            else:
                del copied.adapters[owner]
        return refused

    @torch.no_grad()
    def _fold_adapter(self, module: nn.Module, adapter: Adapter) -> None:
        """Folds an adapter into the module that it adapts.

        Raises:
            ValueError: The adapter cannot be folded.
        """
        folded = copy.deepcopy(adapter).double().folded(self._in_float64(module))
        _check_shapes(module, folded)
        tensors = {
            key: value
            for key, value in zip(("weight", "bias"), folded, strict=True)
            if value is not None
        }
        for key in tensors:
            if self._uses[address(getattr(module, key))] > 1:
                raise ValueError(f"its {key} is shared with another module")
        self._tensors[module] = tensors

    @torch.no_grad()
    def fold_norm(self, convolution: nn.Module, norm: nn.Module) -> None:
        """Folds a norm into the convolution before it, which gets a bias."""
        before, after = self._in_float64(convolution), self._in_float64(norm)
        weight, bias = fuse_conv_bn_weights(
            swap_if_transposed(before, before.weight),
            before.bias,
            after.running_mean,
            after.running_var,
            after.eps,
            after.weight,
            after.bias,
        )
        self._tensors[convolution] = {"weight": swap_if_transposed(before, weight), "bias": bias}

    @torch.no_grad()
    def losses(self, module: nn.Module) -> Iterator[tuple[str, torch.dtype, float]]:
        """Yields a layer's new tensors, with what rounding costs as a fraction of the change."""
        for key, value in self._tensors.get(module, {}).items():
            tensor: Tensor = getattr(module, key)
            change = float((value - tensor).norm())
            lost = float((value - value.to(tensor.dtype)).norm())
            if change > 1e-12 * float(value.norm()):  # more than float64's rounding
                yield key, tensor.dtype, lost / change

    @torch.no_grad()
    def write(self) -> None:
        """Rounds the new weights to the dtypes of the layers and writes them."""
        for module, tensors in self._tensors.items():
            _write(module, tensors)

    def _in_float64(self, module: nn.Module) -> Any:
        """Returns a copy of a layer in float64, with the new weights."""
        wide = copy.deepcopy(module).double()
        _write(wide, self._tensors.get(module, {}))
        return wide


def _write(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    for key, value in tensors.items():
        tensor: Any = getattr(module, key)  # a parameter, or a buffer of FrozenBatchNorm2d
        if tensor is None:
            empty = torch.empty_like(value, dtype=module.weight.dtype)  # type: ignore[arg-type]
            tensor = module._parameters[key] = nn.Parameter(empty, requires_grad=False)
        tensor.copy_(value)  # keeps the dtype and the memory format


def _quoted(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _check_shapes(module: nn.Module, changed: object) -> None:
    """Checks the result of `folded`, since custom families may return anything.

    Raises:
        ValueError: The result is not a tuple of weight and bias with the module's shapes.
    """
    current = [getattr(module, key, None) for key in ("weight", "bias")]
    shapes = [None if tensor is None else tuple(tensor.shape) for tensor in current]
    given = (
        [tuple(part.shape) if isinstance(part, Tensor) else part for part in changed]
        if isinstance(changed, tuple)
        else changed
    )
    if (
        not isinstance(given, list)
        or len(given) != 2
        or given[0] != shapes[0]
        or given[1] not in (None, shapes[1])
    ):
        raise ValueError(
            f"folded returned {given}, expected a weight and a bias of shapes {shapes}"
        )


def _check_not_altered(module: nn.Module, later: Collection[int]) -> None:
    """Checks that the adapter reads the module's output as computed from weight and bias.

    Raises:
        ValueError: The module's forward was replaced, or a hook runs before the adapter.
    """
    if "forward" in module.__dict__:
        raise ValueError("its forward was replaced on the instance, and may compute something else")
    if set(module._forward_hooks) - set(later):
        raise ValueError(
            "it has forward hooks from before the injection, which may change the adapter's input: "
            "remove them"
        )
