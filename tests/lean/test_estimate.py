"""What a step is told to take is what it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from measuring import bytes_saved
from support import picture, small_net, small_resnet
from torch import Tensor, nn
from torchvision.models import densenet121, efficientnet_b0, resnet18, resnet50, resnext50_32x4d
from torchvision.models.video import r3d_18

import resadapt
from resadapt import estimate_training
from resadapt.lean.estimate import cost_of_step

MODELS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any], tuple[int, ...]]] = {
    "resnet18": (resnet18, {"head": "fc"}, (4, 3, 64, 64)),
    "resnet50, lora": (
        resnet50,
        {"layers": "layer*.*.conv2", "bottleneck": 4, "family": "lora"},
        (2, 3, 64, 64),
    ),
    "groups": (resnext50_32x4d, {"layers": "layer4", "norm": "affine"}, (2, 3, 64, 64)),
    "depthwise": (
        efficientnet_b0,
        {"layers": "features.3", "bottleneck": 8, "head": "classifier"},
        (2, 3, 64, 64),
    ),
    "dense": (densenet121, {"layers": "features.transition2", "bottleneck": 8}, (2, 3, 64, 64)),
    "video": (r3d_18, {"layers": "layer3", "bottleneck": 8}, (2, 3, 4, 64, 64)),
}


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_bytes_are_those_that_are_measured(name: str, optimized: bool) -> None:
    build, arguments, shape = MODELS[name]
    plain = build(num_classes=3).train()
    model = resadapt.inject_adapters(build(num_classes=3), **arguments).train()
    if optimized:
        resadapt.optimize_backbone(model)
    found = estimate_training(model, shape)
    x = torch.randn(shape)
    model(x)  # what is folded, is folded
    assert found.adapters.saved_bytes == pytest.approx(bytes_saved(model, x)[0], rel=0.05)
    assert found.full.saved_bytes == pytest.approx(bytes_saved(plain, x)[0], rel=0.05)
    assert found.adapters.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.full.trained == sum(p.numel() for p in plain.parameters())
    for live, told in ((model, found.adapters), (plain, found.full)):
        real = cost_of_step(live, x)
        assert told.peak_bytes == pytest.approx(real.peak_bytes, rel=0.05)
        assert (told.forward_flops, told.backward_flops) == (
            real.forward_flops,
            real.backward_flops,
        )


@pytest.mark.parametrize(
    ("name", "optimized"),
    [
        *((name, False) for name in ("resnet18", "groups", "depthwise", "video")),
        ("resnet18", True),
    ],
)
def test_bytes_under_autocast_are_those_that_are_measured(name: str, optimized: bool) -> None:
    build, arguments, shape = MODELS[name]
    dtype = torch.bfloat16
    plain = build(num_classes=3).train()
    model = resadapt.inject_adapters(build(num_classes=3), **arguments).train()
    if optimized:
        resadapt.optimize_backbone(model)
    found, x = estimate_training(model, shape, autocast=dtype), torch.randn(shape)
    for live, told in ((model, found.adapters), (plain, found.full)):
        real = cost_of_step(live, x, dtype)
        saved = bytes_saved(live, x, "bf16 autocast")[0]
        assert told.saved_bytes == pytest.approx(saved, rel=0.02)
        assert told.peak_bytes == pytest.approx(real.peak_bytes, rel=0.02)
        assert (told.forward_flops, told.backward_flops) == (
            real.forward_flops,
            real.backward_flops,
        )


def test_autocast_around_an_estimate_changes_nothing() -> None:
    model = resadapt.inject_adapters(small_net(), "conv", 2)
    expected = estimate_training(model, (2, 3, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert estimate_training(model, (2, 3, 8, 8)) == expected
    assert estimate_training(model, (2, 3, 8, 8), autocast=torch.bfloat16) != expected


def test_operations_by_hand() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(4, 6, 3), nn.Conv2d(6, 8, 3, groups=2, stride=2)
            self.third, self.head = nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.third(self.second(self.first(x))).mean((2, 3)))

    found = estimate_training(resadapt.inject_adapters(Net(), "first", family="ssf"), (2, 4, 9, 9))
    # multiplications of a sample: 7x7 positions of 4x3x3 -> 6; 3x3 of 3x3x3 -> 8; 3x3 of 8 ->
    # 4x2x2; 4 -> 5
    each = [49 * 36 * 6, 9 * 27 * 8, 9 * 8 * 16, 20]
    assert found.full.forward_flops == found.adapters.forward_flops == 2 * 2 * sum(each)
    assert found.full.backward_flops == 2 * 2 * (2 * sum(each) - each[0]), (
        "no gradient of the input of the first"
    )
    assert found.adapters.backward_flops == 2 * 2 * sum(each[1:]), (
        "of inputs only, down to the first site"
    )


def test_nothing_is_moved_and_no_element_is_needed() -> None:
    model = small_resnet().eval()
    for name, norm in (("a", "affine+stats"), ("b", "frozen")):
        resadapt.inject_adapters(
            model, "layer3", name=name, norm=norm, head={"fc": nn.Linear(512, 7)}
        )
    before, state = picture(model), torch.get_rng_state()
    with_norms = []
    for name in ("a", "b"):
        resadapt.set_active_adapters(model, name)
        with_norms.append(estimate_training(model, (2, 3, 32, 32)).adapters.saved_bytes)
    assert with_norms[0] > with_norms[1]
    assert picture(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    huge = estimate_training(model, (100_000, 3, 224, 224)).adapters
    assert huge.saved_bytes > 2**36


def test_the_table() -> None:
    found = estimate_training(resadapt.inject_adapters(small_net(), "conv", 2), (2, 3, 8, 8))
    lines = str(found).splitlines()
    assert [line[:20].strip() for line in lines[1:]] == [
        *("trained parameters", "saved for backward", "peak of all tensors", "forward", "backward")
    ]
    assert f"{found.adapters.trained:,}" in lines[1]


def test_bad_arguments() -> None:
    model = resadapt.inject_adapters(small_net(), "conv", 2)
    for shape in ((), (2, 0, 8, 8), "2388", 4, (2.0, 3, 8, 8)):
        with pytest.raises(resadapt.AdapterError, match="give the sizes of an input"):
            estimate_training(model, shape)  # type: ignore[arg-type]
    for dtype in (torch.float32, "bfloat16", True):
        with pytest.raises(resadapt.AdapterError, match=r"give torch\.bfloat16 or"):
            estimate_training(model, (2, 3, 8, 8), autocast=dtype)  # type: ignore[arg-type]
    with pytest.raises(resadapt.InjectionError, match=r"with an input of shape \[2, 5, 8, 8\]"):
        estimate_training(model, (2, 5, 8, 8))
    resadapt.set_active_adapters(model, None)
    with pytest.raises(resadapt.InjectionError, match="No adapter set is active"):
        estimate_training(model, (2, 3, 8, 8))
    with pytest.raises(resadapt.InjectionError, match="was not injected into"):
        estimate_training(small_net(), (2, 3, 8, 8))

    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) if x.sum().item() > 0 else x

    with pytest.raises(resadapt.InjectionError, match="cannot be run on the meta device"):
        estimate_training(resadapt.inject_adapters(Looks(), "conv", 2), (2, 3, 8, 8))
