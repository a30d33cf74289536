"""What several test files need: a full picture of a model, small inputs, training steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet18

# The models are small, and threads that wait for each other cost more than they give.
torch.set_num_threads(1)

LAYERS = ("layer1", "layer2", "layer3", "layer4")


def picture(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that an injection could leave behind, tensors as bytes."""
    state = [(key, _bytes(value) if isinstance(value, Tensor) else repr(value)) for key, value in model.state_dict().items()]
    seen: dict[str, Any] = {"state_dict": state}
    for name, module in model.named_modules(remove_duplicate=False):
        seen[name] = {
            "type": type(module),
            "training": module.training,
            "children": list(module._modules),
            "attributes": sorted(module.__dict__),
            "hooks": {
                key: list(value.values()) for key, value in module.__dict__.items() if "hook" in key and isinstance(value, dict)
            },
            "requires_grad": {key: p.requires_grad for key, p in module._parameters.items() if p is not None},
            "objects": {key: id(p) for key, p in module._parameters.items()},
            "buffers": {key: _bytes(b) for key, b in module._buffers.items() if b is not None},
        }
    return seen


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def backbone_bytes(model: nn.Module, outside: tuple[str, ...] = ()) -> dict[str, bytes]:
    """Parameters and buffers by name, adapters and the modules named left out."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        name: _bytes(tensor)
        for name, tensor in tensors.items()
        if "resadapt" not in name.split(".") and not name.startswith(outside)
    }


def small_resnet(seed: int = 0, classes: int = 3) -> nn.Module:
    """A resnet18 whose BatchNorms have seen data, so that their statistics are not the defaults."""
    torch.manual_seed(seed)
    model = resnet18(num_classes=classes)
    model.train()
    with torch.no_grad():
        model(images(8))
    return model


class SmallNet(nn.Module):
    """Takes images of any size, and other norms and heads."""

    def __init__(self, norm: nn.Module | None = None, head: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = norm or nn.BatchNorm2d(4)
        self.c2 = nn.Conv2d(4, 4, 1)
        self.head = head or nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c2(torch.relu(self.bn(self.conv(x)))).mean((2, 3)))


def small_net(**parts: Any) -> Any:
    torch.manual_seed(0)
    return SmallNet(**parts)


def images(count: int = 2, size: int = 32, channels: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2, inputs: Any = None) -> None:
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        total(model(images() if inputs is None else inputs)).backward()
        optimizer.step()


def total(output: Any) -> Tensor:
    """A number that depends on every floating-point tensor in an output."""
    if isinstance(output, Tensor):
        return output.float().square().mean() if output.is_floating_point() else torch.zeros(())
    items = output.values() if isinstance(output, dict) else output
    return sum((total(item) for item in items), torch.zeros(()))
