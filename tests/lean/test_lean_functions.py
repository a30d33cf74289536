"""Functions of an optimized backbone, against finite differences and torch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import images
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import resadapt
from resadapt.lean.bits import packed, unpacked
from resadapt.lean.functions import FrozenConvolution, FrozenNorm, PackedReLU, SmallIndexPool
from resadapt.lean.layers import LeanMaxPool2d


@given(
    st.lists(
        st.sampled_from([-1.0, -0.0, 0.0, 0.5, float("nan"), float("inf"), -float("inf")]),
        max_size=40,
    )
)
def test_bits_are_those_of_the_mask(values: list[float]) -> None:
    x = torch.tensor(values, requires_grad=True)
    bits = packed(torch.relu(x).detach())
    assert bits.dtype == torch.uint8
    assert len(bits) == (len(values) + 7) // 8
    (passes,) = torch.autograd.grad(torch.relu(x).sum(), x)
    assert unpacked(bits, len(values)).tolist() == passes.tolist()


@pytest.mark.parametrize("double", [gradcheck, gradgradcheck])
def test_functions_against_finite_differences(double: Callable[..., bool]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(6, 2, 3, 2, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    assert double(lambda x: FrozenConvolution.apply(x, weight, bias, (2, 1), (1, 0), (1, 2), 2), x)
    mean, var, scale, shift = torch.randn(4, 4, dtype=torch.float64).unbind()
    assert double(lambda x: FrozenNorm.apply(x, mean, var.abs(), scale, shift, 1e-3), x)
    assert double(lambda x: FrozenNorm.apply(x, mean, var.abs(), None, None, 1e-3), x)
    assert double(lambda x: PackedReLU.apply(x, False), x)
    assert double(lambda x: SmallIndexPool.apply(x, (3, 2), (2, 1), (1, 0), (1, 2), False), x)


@given(
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.booleans(),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),  # sums round differently
)
def test_pooling_of_any_geometry(
    kernel: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    ceil_mode: bool,
    last: bool,
    dtype: torch.dtype,
) -> None:
    padding = tuple(min(size, side // 2) for size, side in zip(padding, kernel, strict=True))
    layer = nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=ceil_mode)
    x = torch.randint(-3, 4, (2, 3, 9, 8)).to(dtype)  # with ties
    x[0, 0, 4, 4] = float("nan")
    x = x.to(
        memory_format=torch.channels_last if last else torch.contiguous_format
    ).requires_grad_()
    results = []
    for kind in (nn.MaxPool2d, LeanMaxPool2d):
        layer.__class__ = kind
        out = layer(x)
        weights = torch.arange(out.numel()).reshape(out.shape).to(dtype) / 7
        results.append((out, *torch.autograd.grad(out, x, weights)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "form", ["contiguous", "channels_last", "strided", "expanded", "empty", "scalar"]
)
def test_relu_of_any_layout(form: str, inplace: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layout = {
        "contiguous": torch.randn(3, 5, 7, 2),
        "channels_last": torch.randn(3, 5, 7, 2).to(memory_format=torch.channels_last),
        "strided": torch.randn(6, 5, 7, 2)[::2, :, 1:6].transpose(1, 2),
        "expanded": torch.randn(3, 1, 7, 1).expand(3, 5, 7, 2),
        "empty": torch.randn(0, 5),
        "scalar": torch.randn(()),
    }[form]
    x = layout.to(dtype).requires_grad_()
    results = []
    for run in (lambda h: PackedReLU.apply(h, inplace), torch.relu):
        out = run(x * 1)
        grad = torch.where(x < -1, -float("inf"), out).detach() + 1  # infinite where not passed
        results.append((out, *torch.autograd.grad(out, x, grad)))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "size",
    [{"kernel_size": (2,)}, {"stride": (2,)}, {"padding": (1,)}, {"stride": []}, {"dilation": [1]}],
)
def test_poolings_with_sizes_of_one_number(size: dict[str, Any]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(**{"kernel_size": 3, **size}))
    model, x = resadapt.inject_adapters(net, "0", 2, init="normal").eval(), images()
    plain = torch.autograd.grad(model(x).square().sum(), list(resadapt.trainable_parameters(model)))
    resadapt.optimize_backbone(model)
    for ours, theirs in zip(
        torch.autograd.grad(model(x).square().sum(), list(resadapt.trainable_parameters(model))),
        plain,
        strict=True,
    ):
        assert torch.equal(ours, theirs)
