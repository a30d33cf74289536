"""Layers that save only what the input's gradient needs while the layers are frozen.

Only the class of a stock layer changes: parameters, buffers, hooks and names stay the same objects.
A layer that is trained, exported, traced or transformed runs like the stock layer.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torchvision.models.video.resnet import Conv3DNoTemporal, Conv3DSimple
from typing_extensions import override

from resadapt.base.overlay import CONSTANTS, Overlay
from resadapt.injection.freeze import (
    FrozenBatchNorm1d,
    FrozenBatchNorm2d,
    FrozenBatchNorm3d,
    FrozenStatistics,
    FrozenSyncBatchNorm,
)
from resadapt.lean.constants import Constants, autocast_dtype, is_constant
from resadapt.lean.folding import fold, is_folded, norm_behind, parts, will_be_normalised
from resadapt.lean.functions import (
    CompiledReLU,
    FrozenConvolution,
    FrozenNorm,
    PackedReLU,
    SmallIndexPool,
    can_be_lean,
    is_compiled,
    is_ordinary,
)

__all__ = ["LEAN"]


class _LeanConvolution(Overlay, _ConvNd):
    @override
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not is_ordinary(input):
            return self._convolved(input, weight, bias)
        if (norm := norm_behind(self)) is None:
            return self._convolved(input, *_converted(self, weight, bias))
        dtype, constants = autocast_dtype(weight), self.__dict__[CONSTANTS]
        sources, key = parts(self, norm), (norm, norm.eps, dtype)
        folded = constants.of(sources, key, partial(fold, self, norm, dtype))
        return will_be_normalised(norm, self._convolved(input, *folded))

    def _convolved(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # Batches only: the stock forward turns an unbatched sample into a batch by views.
        if (
            not can_be_lean(input, weight, bias)
            or isinstance(self.padding, str)
            or input.ndim != weight.ndim
        ):
            return super()._conv_forward(input, weight, bias)
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0,) * len(self.stride)
        out: Tensor = FrozenConvolution.apply(
            input, weight, bias, self.stride, padding, self.dilation, self.groups
        )
        return out


def _converted(
    layer: nn.Module, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Returns a layer's weight and bias in the dtype that the layer computes in.

    Autocast would convert frozen tensors anew in each forward.
    """
    dtype = autocast_dtype(weight)
    if dtype is weight.dtype or not (is_constant(weight) and is_constant(bias)):
        return weight, bias
    constants: Constants = layer.__dict__[CONSTANTS]
    return constants.of(  # type: ignore[return-value]
        (weight, bias), dtype, lambda: (weight.to(dtype), None if bias is None else bias.to(dtype))
    )


class LeanLinear(Overlay, nn.Linear):
    """`torch.nn.Linear` whose frozen weight is converted for autocast once."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        """Returns the product with the weight, plus the bias."""
        if not is_ordinary(input):
            return super().forward(input)
        return F.linear(input, *_converted(self, self.weight, self.bias))


class _LeanNorm(FrozenStatistics):
    @override
    def forward(self, input: Tensor) -> Tensor:
        """Normalises a batch ``[N, C, ...]``."""
        if is_folded(self, input):
            return input
        if (
            self.running_mean is None
            or self.running_var is None
            or not can_be_lean(input, self.weight, self.bias)
        ):
            return super().forward(input)
        out: Tensor = FrozenNorm.apply(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.eps
        )
        return out


class LeanReLU(Overlay, nn.ReLU):
    """`torch.nn.ReLU` that saves one bit per element."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        """Returns the ReLU of the input."""
        if not can_be_lean(input):
            return super().forward(input)
        if is_compiled(input):
            compiled: Tensor = CompiledReLU.apply(input)
            return input.copy_(compiled) if self.inplace else compiled
        out: Tensor = PackedReLU.apply(input, self.inplace)
        return out


class LeanMaxPool2d(Overlay, nn.MaxPool2d):
    """`torch.nn.MaxPool2d` that saves one byte per element of the output."""

    @override
    def forward(self, input: Tensor) -> Any:
        """Returns the largest element of each window."""
        kernel = _pair(self.kernel_size)
        if (
            self.return_indices
            or not can_be_lean(input)
            or input.ndim != 4
            or math.prod(kernel) > 256
        ):
            return super().forward(input)
        stride: Any = self.stride
        geometry = (
            kernel if stride in (None, [], ()) else _pair(stride),
            _pair(self.padding),
            _pair(self.dilation),
        )
        return SmallIndexPool.apply(input, kernel, *geometry, self.ceil_mode)


def _pair(size: Any) -> Any:
    return (size, size) if isinstance(size, int) else (*size, *size)[:2]


class LeanConv1d(_LeanConvolution, nn.Conv1d):
    """`torch.nn.Conv1d` that does not save its input."""


class LeanConv2d(_LeanConvolution, nn.Conv2d):
    """`torch.nn.Conv2d` that does not save its input."""


class LeanConv3d(_LeanConvolution, nn.Conv3d):
    """`torch.nn.Conv3d` that does not save its input."""


class LeanConv3DSimple(_LeanConvolution, Conv3DSimple):  # type: ignore[misc]
    """torchvision's `Conv3DSimple` that does not save its input."""


class LeanConv3DNoTemporal(_LeanConvolution, Conv3DNoTemporal):  # type: ignore[misc]
    """torchvision's `Conv3DNoTemporal` that does not save its input."""


class LeanBatchNorm1d(_LeanNorm, FrozenBatchNorm1d):
    """`torch.nn.BatchNorm1d` with frozen statistics that does not save its input."""


class LeanBatchNorm2d(_LeanNorm, FrozenBatchNorm2d):
    """`torch.nn.BatchNorm2d` with frozen statistics that does not save its input."""


class LeanBatchNorm3d(_LeanNorm, FrozenBatchNorm3d):
    """`torch.nn.BatchNorm3d` with frozen statistics that does not save its input."""


class LeanSyncBatchNorm(_LeanNorm, FrozenSyncBatchNorm):
    """`torch.nn.SyncBatchNorm` with frozen statistics that does not save its input."""


LEAN: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: LeanConv1d,
    nn.Conv2d: LeanConv2d,
    nn.Conv3d: LeanConv3d,
    Conv3DSimple: LeanConv3DSimple,
    Conv3DNoTemporal: LeanConv3DNoTemporal,
    FrozenBatchNorm1d: LeanBatchNorm1d,
    FrozenBatchNorm2d: LeanBatchNorm2d,
    FrozenBatchNorm3d: LeanBatchNorm3d,
    FrozenSyncBatchNorm: LeanSyncBatchNorm,
    nn.Linear: LeanLinear,
    nn.MaxPool2d: LeanMaxPool2d,
    nn.ReLU: LeanReLU,
}
"""Stock and frozen layers, and the classes that replace them."""
