"""Convolutions on small maps as matrix products.

The same outputs and gradients as torch's, and used where they apply only.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from av1partition.models.backbones import build_backbone
from av1partition.training import small_maps
from av1partition.training.small_maps import SmallMaps, convolve
from hypothesis import given, settings
from hypothesis import strategies as st


@given(
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    bias=st.booleans(),
    groups=st.sampled_from([1, 2, 4]),
)
@settings(max_examples=200, deadline=None)
def test_equal_to_torch_whatever_the_geometry(size, kernel, stride, padding, bias, groups) -> None:  # type: ignore[no-untyped-def]
    if any(s + 2 * p < k for s, k, p in zip(size, kernel, padding, strict=True)):
        return  # torch refuses a window that is larger than the padded map
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, *size, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(
        4, 4 // groups, *kernel, generator=generator, dtype=torch.float64, requires_grad=True
    )
    b = (
        torch.randn(4, generator=generator, dtype=torch.float64, requires_grad=True)
        if bias
        else None
    )
    ours, theirs = (f(x, weight, b, stride, padding, 1, groups) for f in (convolve, F.conv2d))
    torch.testing.assert_close(ours, theirs)
    along = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    wanted = [x, weight] if b is None else [x, weight, b]
    for found, expected in zip(
        torch.autograd.grad(ours, wanted, along),
        torch.autograd.grad(theirs, wanted, along),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name(padding: str) -> None:
    layer = torch.nn.Conv2d(4, 4, 3, padding=padding, groups=4)
    for size in (3, 2) if padding == "same" else (3,):
        x = torch.randn(2, 4, size, size)
        torch.testing.assert_close(
            convolve(x, layer.weight, layer.bias, (1, 1), padding, (1, 1), 4), layer(x)
        )


@pytest.mark.parametrize(
    "arguments", [{"groups": 3}, {"dilation": 2}, {"padding": "same"}, {"padding": 1, "stride": 1}]
)
def test_other_convolutions_are_left_alone(arguments: dict[str, object]) -> None:
    x, weight = torch.randn(2, 3, 2, 2), torch.randn(6, 1 if "groups" in arguments else 3, 1, 1)
    with SmallMaps():
        found = F.conv2d(x, weight, **arguments)  # type: ignore[arg-type]
        conv = torch.nn.Conv2d(3, 6, 1, **arguments)  # type: ignore[arg-type]
        inside = conv(x)
    torch.testing.assert_close(found, F.conv2d(x, weight, **arguments), rtol=0, atol=0)  # type: ignore[arg-type]
    torch.testing.assert_close(inside, conv(x))


def test_a_resnet_on_blocks_uses_it_from_its_small_maps_on(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    backbone = build_backbone("plain").eval()
    x = torch.rand(4, 1, 16, 16)
    products: list[int] = []
    linear = F.linear
    monkeypatch.setattr(small_maps.F, "linear", lambda *args: products.append(1) or linear(*args))
    with SmallMaps():
        found = backbone(x)
    # layer2 has 3 convolutions on 2x2 maps, of four positions each; layer3 has 4 and layer4 has 5
    # of one position. The fifth of layer3, a 1x1 of stride 2 on a 2x2 map, sees a quarter of it.
    assert len(products) == 3 * 4 + 4 + 5
    torch.testing.assert_close(found, backbone(x))
