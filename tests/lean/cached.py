"""What the tests of kept features share: data, models, and how often a module runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from support import images, small_resnet
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from torchvision.models import densenet121, mobilenet_v3_small, resnet50

import resadapt

BATCH = 4


class Skips(nn.Module):
    """An encoder and a decoder, with connections over what is between them."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            [nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, padding=1)]
        )
        self.middle = nn.Conv2d(4, 4, 3, padding=1)
        self.up = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        fine = torch.relu(self.down[0](x))
        coarse = self.middle(self.down[1](fine))
        larger = F.interpolate(coarse, size=fine.shape[-2:])
        return self.up(torch.cat([fine, larger], 1)).mean((2, 3))


def data(count: int = 11, size: int = 32, **kind: Any) -> TensorDataset:
    return TensorDataset(images(count, size, **kind), torch.arange(count) % 3)


def resnet(**arguments: Any) -> Any:
    return resadapt.inject_adapters(small_resnet(), dropout=0.0, **arguments)


def injected(model: nn.Module, *arguments: Any, **options: Any) -> Any:
    torch.manual_seed(3)
    return resadapt.inject_adapters(model, *arguments, **options)


def seeded(build: Callable[..., nn.Module], **arguments: Any) -> Any:
    torch.manual_seed(0)
    return build(**arguments)


CASES: dict[str, Callable[[], Any]] = {
    "last stage": lambda: resnet(layers="layer4", head="fc"),
    "second stage": lambda: resnet(layers="layer2"),
    "head alone": lambda: injected(small_resnet(), (), head="fc"),
    "input of a convolution": lambda: injected(
        small_resnet(), "layer3.1.conv2", 4, family="lora", head="fc"
    ),
    "middle of a block": lambda: injected(
        small_resnet(), "layer3.0.bn2", family="series", head="fc"
    ),
    "norms of the head": lambda: injected(small_resnet(), (), head=("layer4", "fc")),
    "optimized": lambda: resadapt.optimize_backbone(resnet(layers=("layer3", "layer4"), head="fc")),
    "optimized, bottlenecks": lambda: resadapt.optimize_backbone(
        injected(seeded(resnet50, num_classes=3), "layer4.*", 8, family="bottleneck", head="fc")
    ),
    "skips": lambda: injected(seeded(Skips), "middle", 2, family="bottleneck", init="normal"),
    "dense blocks": lambda: injected(
        seeded(densenet121, num_classes=3),
        "features.transition3",
        8,
        dropout=0.0,
        head="classifier",
    ),
    "no dropout before": lambda: injected(
        seeded(mobilenet_v3_small, num_classes=3, dropout=0.0), "features.12", 8, dropout=0.0
    ),
    "channels last": lambda: resnet(layers="layer4", head="fc").to(
        memory_format=torch.channels_last
    ),
    "double": lambda: resnet(layers="layer3", head="fc").double(),
    "bfloat16": lambda: injected(small_resnet().bfloat16(), "layer3", 8, dropout=0.0, head="fc"),
}


def counting(model: nn.Module, name: str) -> list[int]:
    runs: list[int] = []
    model.get_submodule(name).register_forward_hook(
        lambda module, args, output: runs.append(len(output))
    )
    return runs


class Noisy(Dataset[Any]):
    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Any:
        return images(5)[index] + torch.rand(()), index


class Listed(Dataset[Any]):
    """Samples as they are given."""

    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]
