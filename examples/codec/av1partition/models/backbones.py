"""The study's backbones: ResNet-18 on one luma channel, plain or with attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights, resnet18

BackboneKind = Literal["plain", "attention", "fine"]

FEATURES = 512
STAGE_CHANNELS = (64, 128, 256, 512)
STEM = ("conv1", "bn1", "relu", "maxpool")


def gray_resnet18(weights: ResNet18_Weights | None = None) -> nn.Module:
    """Torchvision's ResNet-18 with one input channel and no classifier.

    Args:
        weights: ImageNet weights to start from; the stem becomes their mean over RGB. None: random.

    Returns:
        A network from [N, 1, H, W] to [N, 512].
    """
    model: nn.Module = resnet18(weights=weights)
    colour = model.get_submodule("conv1")
    assert isinstance(colour, nn.Conv2d)
    model.conv1 = gray_stem(colour) if weights else _new_stem()
    model.fc = nn.Identity()
    return model


def gray_stem(colour: nn.Conv2d) -> nn.Conv2d:
    """A 1-channel copy of torchvision's 7x7 stem: the mean of its weights over RGB."""
    stem = _new_stem()
    with torch.no_grad():
        stem.weight.copy_(colour.weight.mean(dim=1, keepdim=True))
    return stem


def fine_resnet18() -> nn.Module:
    """`gray_resnet18` with a stem made for 16x16 blocks, a 3x3 convolution of stride 1.

    Random weights.
    """
    model = gray_resnet18()
    model.conv1 = _new_stem(3, stride=1)
    return model


def _new_stem(size: int = 7, stride: int = 2) -> nn.Conv2d:
    stem = nn.Conv2d(1, STAGE_CHANNELS[0], size, stride=stride, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(
        stem.weight, mode="fan_out", nonlinearity="relu"
    )  # As torchvision starts its own.
    return stem


class SqueezeExcitation(nn.Module):
    """Scale each channel by a gate computed from all channels' means.

    Args:
        channels: Of the input.
        reduction: Channels per hidden unit.

    References:
        Hu et al. 2018, Squeeze-and-Excitation Networks, arXiv:1709.01507.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        """See the class."""
        super().__init__()
        hidden = channels // reduction
        self.excitation = nn.Sequential(
            nn.Linear(channels, hidden, bias=False),
            nn.ReLU(),
            nn.Linear(hidden, channels, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Gate [N, C, H, W] by channel."""
        gate: Tensor = self.excitation(x.mean(dim=(2, 3)))
        return x * gate[:, :, None, None]


class SpatialAttention(nn.Module):
    """Scale each position by a gate computed from the channels' mean and maximum around it.

    References:
        Woo et al. 2018, CBAM, arXiv:1807.06521.
    """

    def __init__(self) -> None:
        """See the class."""
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Gate [N, C, H, W] by position."""
        evidence = torch.cat([x.mean(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)], dim=1)
        return x * torch.sigmoid(self.conv(evidence))


class AttentionResNet18(nn.Module):
    """The study's attention backbone, a ResNet-18 with two kinds of attention.

    Squeeze-excitation is after each stage, spatial attention at the end. The backbone's own modules
    stand beside ResNet-18's, whose names stay torchvision's.

    Args:
        weights: ImageNet weights for the ResNet-18 part. None: random.
    """

    conv1: nn.Module
    bn1: nn.Module
    relu: nn.Module
    maxpool: nn.Module
    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module
    avgpool: nn.Module
    fc: nn.Module
    se1: nn.Module
    se2: nn.Module
    se3: nn.Module
    se4: nn.Module

    def __init__(self, weights: ResNet18_Weights | None = None) -> None:
        """See the class."""
        super().__init__()
        for name, module in gray_resnet18(weights).named_children():
            self.add_module(name, module)
        for number, channels in enumerate(STAGE_CHANNELS, start=1):
            self.add_module(f"se{number}", SqueezeExcitation(channels))
        self.spatial_attn = SpatialAttention()

    def forward(self, x: Tensor) -> Tensor:
        """From [N, 1, H, W] to the output of ``fc``."""
        return rest(self, front(self, x, "maxpool"), "maxpool")


def parts(backbone: nn.Module) -> tuple[str, ...]:
    """The modules that make feature maps, in the order in which they run."""
    if isinstance(backbone, AttentionResNet18):
        return (
            *STEM,
            "layer1",
            "se1",
            "layer2",
            "se2",
            "layer3",
            "se3",
            "layer4",
            "se4",
            "spatial_attn",
        )
    return (*STEM, "layer1", "layer2", "layer3", "layer4")


def front(backbone: nn.Module, x: Tensor, end: str) -> Tensor:
    """A backbone up to one of its parts and with it.

    [N, 1, H, W] to that part's feature maps; "" is before the first.
    """
    return _through(backbone, parts(backbone)[: _until(backbone, end)], x)


def rest(backbone: nn.Module, h: Tensor, end: str) -> Tensor:
    """A backbone behind one of its parts, to the output of ``fc``."""
    h = _through(backbone, parts(backbone)[_until(backbone, end) :], h)
    return _through(backbone, ("fc",), torch.flatten(_through(backbone, ("avgpool",), h), 1))


def _until(backbone: nn.Module, end: str) -> int:
    return parts(backbone).index(end) + 1 if end else 0


def _through(backbone: nn.Module, names: Sequence[str], x: Tensor) -> Tensor:
    for name in names:
        x = backbone.get_submodule(name)(x)
    return x


def kind_of(backbone: nn.Module) -> BackboneKind:
    """What `build_backbone` was asked for."""
    if isinstance(backbone, AttentionResNet18):
        return "attention"
    return "plain" if backbone.get_parameter("conv1.weight").shape[-1] == 7 else "fine"


def build_backbone(kind: BackboneKind, weights: ResNet18_Weights | None = None) -> nn.Module:
    """A backbone from [N, 1, H, W] to [N, 512]; the fine one has no ImageNet weights.

    Raises:
        ValueError: Weights for the fine one.
    """
    if kind == "fine":
        if weights is not None:
            raise ValueError(
                "the fine backbone's stem is not ImageNet's, so there are no weights for it; leave "
                "them out"
            )
        return fine_resnet18()
    return AttentionResNet18(weights) if kind == "attention" else gray_resnet18(weights)
