"""Convolutions on maps no larger than their kernels, as the matrix products that they are.

Much faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class SmallMaps(TorchFunctionMode):
    """While this context is active, ``F.conv2d`` skips the taps that see nothing but padding.

    A 16x16 block is 1x1 from a ResNet's third stage on. There a 3x3 kernel meets eight zeros and
    one number, and a library made for larger maps multiplies all nine, in the gradient of the
    weights too. Where every window covers the whole map, each output position is a matrix product
    of map and window. Results differ by the order of sums only.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute what can be computed so, and leave the rest alone."""
        if func is F.conv2d and not kwargs:
            return convolve(*args)
        return func(*args, **(kwargs or {}))


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """``F.conv2d`` of [N, C, H, W], by matrix products where every window covers the whole map.

    Example:
        >>> x, weight = torch.randn(4, 8, 2, 2), torch.randn(6, 8, 3, 3)
        >>> as_product = convolve(x, weight, None, (1, 1), (1, 1))
        >>> torch.allclose(as_product, F.conv2d(x, weight, padding=1), atol=1e-5)
        True
    """
    if padding == "same" and stride in (1, (1, 1)) and all(size % 2 for size in weight.shape[2:]):
        padding = tuple(size // 2 for size in weight.shape[2:])
    usual = (
        isinstance(stride, tuple)
        and isinstance(padding, tuple)
        and dilation in (1, (1, 1))
        and x.ndim == 4
    )
    rows = _starts(x.shape[2], weight.shape[2], stride[0], padding[0]) if usual else None
    columns = _starts(x.shape[3], weight.shape[3], stride[1], padding[1]) if usual else None
    if rows is None or columns is None:
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    height, width = x.shape[2:]
    windows = [
        weight[:, :, i : i + height, j : j + width].flatten(1) for i in rows for j in columns
    ]
    if groups == 1:
        flat = x.flatten(
            1
        )  # once: so the gradients of all windows are summed before they are those of x
        out = [F.linear(flat, window, bias) for window in windows]
    else:
        grouped = x.reshape(len(x), groups, -1)
        out = [
            torch.einsum(
                "ngi,goi->ngo", grouped, window.reshape(groups, -1, window.shape[1])
            ).flatten(1)
            for window in windows
        ]
        out = out if bias is None else [each + bias for each in out]
    return torch.stack(out, dim=2).reshape(len(x), len(weight), len(rows), len(columns))


def _starts(size: int, kernel: int, stride: int, padding: int) -> list[int] | None:
    """For each output position the tap that meets the first row of the map.

    None where a window does not cover the map.
    """
    starts = [padding - i * stride for i in range((size + 2 * padding - kernel) // stride + 1)]
    return starts if all(0 <= start <= kernel - size for start in starts) else None
