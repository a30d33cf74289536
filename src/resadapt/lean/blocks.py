"""Residual blocks of torchvision, and Sequentials, that compute each frozen convolution and the norm behind it in one step.

Each takes the place of a stock class by the class alone, as in `resadapt.lean.layers`, and runs as the stock one where it cannot.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops.misc import Conv2dNormActivation, Conv3dNormActivation
from typing_extensions import override

from resadapt.injection.freeze import FrozenStatistics, Overlay
from resadapt.lean.pairs import normalised

__all__ = ["FOLDING"]


class LeanSequential(Overlay, nn.Sequential):
    """`torch.nn.Sequential` that folds norms into the convolutions before them."""

    @override
    def forward(self, input: Any) -> Any:
        """Runs the modules one after another."""
        modules = list(self)
        while modules:
            module, *modules = modules
            if modules and isinstance(modules[0], FrozenStatistics):
                input = normalised(module, modules.pop(0), input)
            else:
                input = module(input)
        return input


class LeanConv2dNormActivation(LeanSequential, Conv2dNormActivation):  # type: ignore[misc]
    """torchvision's `Conv2dNormActivation` that folds its norm."""


class LeanConv3dNormActivation(LeanSequential, Conv3dNormActivation):  # type: ignore[misc]
    """torchvision's `Conv3dNormActivation` that folds its norm."""


class LeanBasicBlock(Overlay, BasicBlock):  # type: ignore[misc]
    """torchvision's `BasicBlock` that folds its norms."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Returns the block's output for a feature map."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(normalised(self.conv1, self.bn1, x))
        out = normalised(self.conv2, self.bn2, out)
        out += shortcut
        activated: Tensor = self.relu(out)
        return activated


class LeanBottleneck(Overlay, Bottleneck):  # type: ignore[misc]
    """torchvision's `Bottleneck` that folds its norms."""

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Returns the block's output for a feature map."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(normalised(self.conv1, self.bn1, x))
        out = self.relu(normalised(self.conv2, self.bn2, out))
        out = normalised(self.conv3, self.bn3, out)
        out += shortcut
        activated: Tensor = self.relu(out)
        return activated


class LeanResNet(Overlay, ResNet):  # type: ignore[misc]
    """torchvision's `ResNet` that folds the norm of its stem."""

    @override
    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(normalised(self.conv1, self.bn1, x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


FOLDING: dict[type[nn.Module], type[nn.Module]] = {
    nn.Sequential: LeanSequential,
    Conv2dNormActivation: LeanConv2dNormActivation,
    Conv3dNormActivation: LeanConv3dNormActivation,
    BasicBlock: LeanBasicBlock,
    Bottleneck: LeanBottleneck,
    ResNet: LeanResNet,
}
"""The class that takes the place of one that holds convolutions and norms."""
