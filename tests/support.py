"""What several test files need: a full picture of a model, small inputs, training steps."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from resadapt.adapters import Adapter
from resadapt.injection.own_dtype import apply
from resadapt.injection.private import private_module

# The models are small, and threads that wait for each other cost more than they give.
torch.set_num_threads(1)

LAYERS = ("layer1", "layer2", "layer3", "layer4")


def picture(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that an injection could leave behind, tensors as bytes."""
    state = [
        (key, _bytes(value) if isinstance(value, Tensor) else repr(value))
        for key, value in model.state_dict().items()
    ]
    seen: dict[str, Any] = {"state_dict": state}
    for name, module in model.named_modules(remove_duplicate=False):
        seen[name] = {
            "type": type(module),
            "training": module.training,
            "children": list(module._modules),
            "attributes": sorted(module.__dict__),
            "hooks": {
                key: list(value.values())
                for key, value in module.__dict__.items()
                if "hook" in key and isinstance(value, dict)
            },
            "requires_grad": {
                key: p.requires_grad for key, p in module._parameters.items() if p is not None
            },
            "objects": {key: id(p) for key, p in module._parameters.items()},
            "buffers": {key: _bytes(b) for key, b in module._buffers.items() if b is not None},
        }
    return seen


def private(model: nn.Module, place: str, name: str = "default") -> Any:
    """The module that a set runs in place of one of the backbone."""
    return private_module(model, model._resadapt.sets[name].spec, place)


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


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2, inputs: Any = None
) -> None:
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


def scramble(module: Any, seed: int = 0) -> Any:
    """Gives every parameter and statistic of a module values that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.is_floating_point():
                values = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.5
                tensor.copy_(values.abs() + 0.5 if "running_var" in name else values)
    return module


def assert_folds(adapter: Adapter, module: nn.Module, x: Tensor) -> None:
    """Checks that a module with the folded tensors alone gives what adapter and module give.

    Folding must change nothing. The bound is 256 rounding errors of the largest output.
    """
    adapter.eval()
    module.eval()
    with torch.no_grad():
        plain = module(x)
        expected = apply(adapter, module, (x,), plain)
        before = copy.deepcopy((adapter.state_dict(), module.state_dict()))
        weight, bias = adapter.folded(module)
        for state, now in zip(before, (adapter.state_dict(), module.state_dict()), strict=True):
            assert all(torch.equal(state[key], now[key]) for key in state)
        assert weight.dtype == module.weight.dtype
        assert bias is None or bias.dtype == module.bias.dtype
        folded = copy.deepcopy(module)
        tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        folded.load_state_dict({**before[1], **tensors})
        bound = 256 * torch.finfo(x.dtype).eps
        scale = expected.abs().max().item()
        torch.testing.assert_close(folded(x), expected, rtol=0, atol=bound * scale)
        assert (expected - plain).abs().max() > 1e-2 * scale, (
            "the adapter does nothing, so this shows nothing"
        )
