"""How many channels a site has, and where: read off the modules, measured, or asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import images, picture, small_net
from torch import Tensor, nn
from torchvision import models

import resadapt

X = images(2, 8)


def only_site(model: nn.Module) -> resadapt.types.SiteSpec:
    ((site,),) = (info.sites for info in resadapt.list_adapters(model))
    return site


class Tokens(nn.Module):
    """A small transformer: patches, blocks over [N, L, C], a head."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 2, 2)
        self.block = TokenBlock(width)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


class TokenBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class ChannelsFirstNorm(nn.LayerNorm):
    """As timm's LayerNorm2d: over the channels of [N, C, H, W]."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Gate(nn.Module):
    """Squeeze and excitation with linear layers."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.layers(x.mean((2, 3)))[:, :, None, None].sigmoid()


def gated(channels: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, channels, 1), Gate(channels, hidden))


@pytest.mark.parametrize(
    ("build", "layer", "example", "expected"),
    [
        (Tokens, "block", X, (12, 1, -1)),
        (Tokens, "block", None, (12, 1, -1)),
        (Tokens, "block.mlp", None, (12, 1, -1)),
        (Tokens, "block.mlp.0", None, (24, 1, -1)),
        (Tokens, "head", None, (2, 0, 1)),
        (Tokens, "patches", None, (12, 2, 1)),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 8, 1)),
            "0",
            images(2, 8),
            (8, 2, 1),
        ),  # as wide as its output: still a convolution
        (
            lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.LayerNorm(4)),
            "1",
            images(2, 4),
            (8, 2, 1),
        ),
        (
            lambda: gated(8, 4),
            "1",
            images(2, 4),
            (8, 2, 1),
        ),  # as wide as its hidden layer: the last layer tells
        (lambda: gated(8, 4), "1", None, (8, 2, 1)),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), ChannelsFirstNorm(8)), "1", X, (8, 2, 1)),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sigmoid()), "1", X, (8, 2, 1)),
        (lambda: nn.Sequential(nn.Conv1d(3, 8, 1), nn.Sigmoid()), "1", None, (8, 1, 1)),
        (lambda: nn.Sequential(nn.Conv3d(3, 8, 1), nn.Sigmoid()), "1", None, (8, 3, 1)),
        (lambda: models.swin_t(weights=None), "features.7", None, (768, 2, -1)),
        (
            lambda: models.swin_t(weights=None),
            "features.6",
            None,
            (768, 2, -1),
        ),  # patch merging: the norm is wider
        (
            lambda: models.vit_b_16(weights=None),
            "encoder.layers.encoder_layer_3",
            None,
            (768, 1, -1),
        ),
        (lambda: models.convnext_tiny(weights=None), "features.5", None, (384, 2, 1)),
        (lambda: models.regnet_y_400mf(weights=None), "trunk_output.block3", None, (208, 2, 1)),
        (lambda: models.densenet121(weights=None), "features.transition2", None, (256, 2, 1)),
        (lambda: models.efficientnet_b0(weights=None), "features.4.1", None, (80, 2, 1)),
        (
            lambda: models.googlenet(weights=None, init_weights=False),
            "inception4a",
            None,
            (512, 2, 1),
        ),
        (
            lambda: models.inception_v3(weights=None, init_weights=False),
            "Mixed_6b",
            None,
            (768, 2, 1),
        ),  # takes 224, not 64
        (lambda: models.shufflenet_v2_x0_5(weights=None), "stage3", None, (96, 2, 1)),
        (lambda: models.mnasnet0_5(weights=None), "layers.9", None, (24, 2, 1)),
        (lambda: models.video.s3d(weights=None), "features.5", None, (256, 3, 1)),
    ],
)
def test_channels_are_found(
    build: Callable[[], nn.Module], layer: str, example: Any, expected: tuple[int, int, int]
) -> None:
    torch.manual_seed(0)
    model = build()
    before = picture(model)
    resadapt.inject_adapters(model, layer, 4, example_input=example)
    site = only_site(model)
    assert (site.channels, site.spatial_dims, site.channel_dim) == expected
    resadapt.remove_adapters(model)
    assert picture(model) == before


def test_the_adapter_adapts_the_channels_of_tokens() -> None:
    torch.manual_seed(0)
    model = resadapt.inject_adapters(Tokens(), "block", 3).eval()
    adapter = model.block.resadapt.default
    nn.init.normal_(adapter.up.weight)
    nn.init.normal_(adapter.down.weight)
    tokens = torch.randn(2, 5, 12)
    with resadapt.adapters_disabled(model):
        plain = model.block(tokens)
    mean = plain.mean(1)
    expected = plain + adapter.up(torch.relu(adapter.down(mean)))[:, None, :]
    assert torch.equal(model.block(tokens), expected)
    model(X).sum().backward()
    assert adapter.down.weight.shape == (3, 12)
    assert adapter.up.weight.grad.abs().sum() > 0


def test_a_linear_layer_that_no_input_can_be_made_for() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))
    resadapt.inject_adapters(model, "0", 2)
    assert (only_site(model).channels, only_site(model).spatial_dims) == (5, 0)
    with pytest.raises(
        resadapt.InjectionError, match=r"built for \[N, 5\].*inject with example_input="
    ):
        model(torch.zeros(2, 3, 6))
    resadapt.remove_adapters(model)
    with pytest.raises(resadapt.InjectionError, match="Pass example_input="):
        resadapt.inject_adapters(model, "0", 2, channel_dim=-1)
    resadapt.inject_adapters(model, "0", 2, channel_dim=-1, example_input=torch.zeros(2, 3, 6))
    assert model(torch.zeros(2, 4, 6)).shape == (2, 4, 2)


def test_a_model_that_takes_no_made_up_input() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.act = Gate(4, 2)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.act(self.conv(x) * mask)

    model = Masked()
    before = picture(model)
    with pytest.raises(
        resadapt.InjectionError, match=r"'act' \(Gate\) does not declare .* Pass example_input="
    ):
        resadapt.inject_adapters(model, "act", 2)
    assert picture(model) == before
    resadapt.inject_adapters(model, ["conv"], 2)
    resadapt.inject_adapters(model, "act", 2, name="b", example_input=(X, X[:, :1]))


def test_measuring_beside_a_set_that_is_there() -> None:
    model = resadapt.inject_adapters(small_net(), "c2", 2)
    model(X)
    resadapt.inject_adapters(model, ["c2", "bn"], 2, name="b", example_input=X)
    resadapt.set_active_adapters(model, "default")
    model(X)
    assert [len(info.sites) for info in resadapt.list_adapters(model)] == [1, 2]


def test_a_form_with_channels_last_is_told_by_the_file(path: Any) -> None:
    torch.manual_seed(0)
    model = resadapt.inject_adapters(Tokens(), "block", 3)
    resadapt.save_adapters(model, path)
    assert resadapt.read_adapter_info(path).set.sites[0].shape_text == "[N, *, 12]"
    torch.manual_seed(0)
    assert torch.equal(resadapt.load_adapters(Tokens(), path).eval()(X), model.eval()(X))


def test_complex_numbers_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, dtype=torch.complex64))
    with pytest.raises(resadapt.InjectionError, match="'0' has complex parameters"):
        resadapt.inject_adapters(model, "0", 2, family="lora")
