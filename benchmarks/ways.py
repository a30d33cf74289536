"""The ways to train that are compared, each as a function from a backbone to a model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torchvision.models import resnet18, resnet50
from torchvision.models.resnet import BasicBlock, Bottleneck

from resadapt import inject_adapters, optimize_backbone

CLASSES = 10
STAGES = ("layer1", "layer2", "layer3", "layer4")


def gray() -> nn.Module:
    """The codec study's backbone: ResNet-18 on one channel."""
    model: nn.Module = resnet18(num_classes=CLASSES)
    model.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    return model.to(memory_format=torch.channels_last)


def color(build: Callable[..., nn.Module]) -> nn.Module:
    """A ResNet of torchvision, in channels_last, in which convolutions are fastest."""
    return build(num_classes=CLASSES).to(memory_format=torch.channels_last)


BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18": partial(color, resnet18),
    "ResNet-50": partial(color, resnet50),
    "ResNet-18, one channel": gray,
}


def full(backbone: nn.Module) -> nn.Module:
    """Full fine-tuning."""
    return backbone


def by_hand(backbone: nn.Module) -> nn.Module:
    """As the study wrote it.

    Gradients switched off, pooled adapters called after the stages, norms left in training.
    """
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(name.startswith("fc."))
    adapters = nn.ModuleDict()
    for name in STAGES:
        stage = backbone.get_submodule(name)
        channels = [
            module.num_features for module in stage.modules() if isinstance(module, nn.BatchNorm2d)
        ][-1]
        adapter = nn.Sequential(
            nn.Linear(channels, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, channels)
        )
        adapters[name] = adapter

        def add(
            _module: nn.Module, _args: object, output: Tensor, adapter: nn.Module = adapter
        ) -> Tensor:
            change: Tensor = adapter(output.mean((2, 3)))
            return output + change[:, :, None, None]

        stage.register_forward_hook(add)
    backbone.adapters = adapters
    return backbone


def hooks(backbone: nn.Module) -> nn.Module:
    """Pooled adapters after the four stages and a head, nothing optimized."""
    return inject_adapters(backbone, bottleneck=64, head="fc")


def checkpointed(backbone: nn.Module) -> nn.Module:
    """The same, with the activations of every block computed anew in the backward pass."""
    model = hooks(backbone)
    apply_activation_checkpointing(
        model, check_fn=lambda module: isinstance(module, BasicBlock | Bottleneck)
    )
    return model


def exact(backbone: nn.Module) -> nn.Module:
    """Optimized without folding."""
    return optimize_backbone(hooks(backbone), fold_norms=False)


def optimized(backbone: nn.Module) -> nn.Module:
    """Optimized."""
    return optimize_backbone(hooks(backbone))


def peft_lora(backbone: nn.Module) -> nn.Module:
    """PEFT: LoRA r=8 on the 3x3 convolutions and a head."""
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415 - an optional extra

    names = [
        n
        for n, m in backbone.named_modules()
        if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)
    ]
    config = LoraConfig(r=8, lora_alpha=8, target_modules=names, modules_to_save=["fc"])
    model: nn.Module = get_peft_model(backbone, config)
    return model


def memsave(backbone: nn.Module) -> nn.Module:
    """Pooled adapters by hand on memsave_torch's layers, with norms in evaluation.

    Its own setting for frozen backbones.
    """
    model: nn.Module = import_module("memsave_torch.nn").convert_to_memory_saving(by_hand(backbone))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(_in_evaluation)
    return model


def _in_evaluation(module: nn.Module, args: object) -> None:
    module.training = False


def compiled(way: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    """A way, under torch.compile."""

    def build(backbone: nn.Module) -> nn.Module:
        model = way(backbone)
        model.compile()
        return model

    return build


FULL, PLAIN, OPTIMIZED, PEFT, MEMSAVE = (
    "full fine-tuning",
    "resadapt",
    "optimized",
    "PEFT LoRA r=8",
    "memsave_torch, by hand",
)
WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    FULL: full,
    PEFT: peft_lora,
    "by hand": by_hand,
    MEMSAVE: memsave,
    PLAIN: hooks,
    "resadapt, checkpointed": checkpointed,
    "optimized, exact": exact,
    OPTIMIZED: optimized,
}
COMPILED = {f"{name}, compiled": compiled(WAYS[name]) for name in (FULL, PLAIN, OPTIMIZED)}
if find_spec("memsave_torch") is None:
    del WAYS[MEMSAVE]


def built(backbone: str, way: str) -> nn.Module:
    """A model, in training, with the same weights each time."""
    torch.manual_seed(0)
    return (WAYS | COMPILED)[way](BACKBONES[backbone]()).train()


def pictures(batch: int, size: int, channels: int = 3) -> tuple[Tensor, Tensor]:
    """Pictures in channels_last, and labels."""
    images = torch.randn(batch, channels, size, size)
    labels = torch.randint(CLASSES, (batch,))
    return images.contiguous(memory_format=torch.channels_last), labels
