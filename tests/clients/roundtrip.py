"""What the tests share: three steps, a proven file, and the same model in a fresh backbone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support import images, total
from torch import Tensor, nn
from torchvision.models import resnet18

import resadapt

PROVEN = ("file", "reconstruction", "backbone", "tensors", "sites", "outputs", "recorded outputs")
LABELS = torch.arange(4) % 3


def seeded(build: Callable[[], nn.Module]) -> Callable[[], Any]:
    """A backbone as every process builds it: the seed stands for pretrained weights."""

    def rebuild() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return build()

    return rebuild


small_backbone = seeded(lambda: resnet18(num_classes=3))


def three_steps(model: nn.Module, inputs: Tensor) -> None:
    """Training as a user does it, after which every tensor of the set has moved."""
    before = resadapt.adapter_state_dict(model)
    optimizer = torch.optim.AdamW(resadapt.parameter_groups(model, 1e-2))
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        total(model(inputs)).backward()
        optimizer.step()
    still = [
        key
        for key, value in resadapt.adapter_state_dict(model).items()
        if torch.equal(value, before[key])
    ]
    assert still == []


def save_and_reload(
    model: nn.Module, rebuild: Callable[[], Any], path: Path, inputs: Tensor
) -> Any:
    """Saves with proof on `inputs` and on an input made up, loads, and asks for the same bits."""
    for probe in (None, inputs):
        report = resadapt.save_adapters(model, path, probe=probe, rebuild=rebuild)
        for line in (
            PROVEN if probe is not None else ("file", "reconstruction", "backbone", "tensors")
        ):
            assert report[line].outcome == "passed", report
    reloaded = resadapt.load_adapters(rebuild(), path)
    assert_same_outputs(reloaded, model, inputs)
    return reloaded


def train_save_reload(
    rebuild: Callable[[], Any],
    layers: object,
    path: Path,
    inputs: Tensor,
    *,
    head: object = (),
    **options: Any,
) -> tuple[Any, Any]:
    """The whole use, without a warning; returns the trained and the reloaded model."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", resadapt.AdapterWarning)
        model = resadapt.inject_adapters(rebuild(), layers, 8, head=head, **options)  # type: ignore[arg-type]
        plain = rebuild().eval()(inputs)
        three_steps(model, inputs)
        assert not torch.equal(total(model.eval()(inputs)), total(plain))
        return model, save_and_reload(model, rebuild, path, inputs)


@torch.no_grad()
def assert_same_outputs(one: nn.Module, other: nn.Module, inputs: Tensor) -> None:
    """Asks for the same bits in evaluation mode, in whatever the models return."""
    pairs = zip(_flat(one.eval()(inputs)), _flat(other.eval()(inputs)), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


def small_images(size: int = 32) -> Tensor:
    """As many images as there are `LABELS`."""
    return images(len(LABELS), size)


def with_strong_adapters(model: Any) -> Any:
    """Gives the adapters weights that matter in every output, in evaluation mode."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in resadapt.named_trainable_parameters(model):
            if "resadapt" in name.split("."):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def _flat(output: Any) -> list[Tensor]:
    return (
        [output]
        if isinstance(output, Tensor)
        else [tensor for item in output for tensor in _flat(item)]
    )
