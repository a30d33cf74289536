"""Residual blocks and Sequentials that fold each frozen norm into the convolution before it.

As in `resadapt.lean.layers`, only the class of a module changes, and a block that cannot fold runs
like the stock class.

On the CPU, feature maps are in channels_last between the folded convolutions of residual blocks,
which is faster. This is invisible elsewhere: feature maps have the stock memory format again before
a hook, a module that may depend on the memory format, or a caller outside these classes gets them.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops.misc import Conv2dNormActivation, Conv3dNormActivation
from typing_extensions import override

from resadapt.adapters import PooledAdapter
from resadapt.base.overlay import Overlay, class_of
from resadapt.base.tensors import is_channels_last
from resadapt.injection.freeze import FrozenStatistics
from resadapt.injection.hooks import apply_adapter
from resadapt.injection.intercept import replaced_forward
from resadapt.injection.private import running_at
from resadapt.injection.walk import find_slot
from resadapt.lean.functions import is_ordinary
from resadapt.lean.layers import LEAN
from resadapt.lean.pairs import InputLayout, has_hooks, in_one_step, with_gradient_as_given
from resadapt.lean.stand_in import MetaStandIn

__all__ = ["FOLDING", "in_residual_blocks"]

_ANY_LAYOUT = frozenset(LEAN.values()) | {
    nn.Identity,
    nn.AdaptiveAvgPool2d,
    nn.AvgPool2d,
    nn.Conv2d,
    nn.Linear,
    nn.Flatten,
}
"""Modules whose results do not depend on the memory format, and whose output keeps it."""


class _Inner(Overlay):
    """A module that may return any memory format if one of these classes called it."""

    def inside(self, x: Any, given: InputLayout) -> Any:
        """Computes the output for an input in any memory format; subclasses override this."""
        raise NotImplementedError

    def forward(self, x: Any) -> Any:
        """Returns the output, in the stock memory format unless one of these classes called."""
        if not is_ordinary(x):
            return self.inside(x, _ANY)
        caller, any_format = _caller.get()
        if any_format and caller is not None:
            return self.inside(x, caller)
        given = _given(self, x, caller)  # type: ignore[arg-type]
        return _as_given(self.inside(x, given), given)


_ANY = InputLayout(0, channels_last=True)
"""For values that are not feature maps: the memory format is never changed."""
_caller: ContextVar[tuple[InputLayout | None, bool]] = ContextVar(
    "resadapt_caller", default=(None, False)
)
"""The input layout of the outermost of these classes, and whether the caller takes any format."""


def _given(module: nn.Module, x: Any, outer: InputLayout | None) -> InputLayout:
    """Returns the layout of the input of the outermost of these classes."""
    if not is_ordinary(x) or x.ndim != 4:
        return _ANY
    size = max(min(x.shape[2:]), 0 if outer is None else outer.size)
    # A convolution returns channels_last if the input or the weight is in channels_last.
    return InputLayout(size, is_channels_last(x) or any(map(is_channels_last, module.parameters())))


def _as_given(x: Any, given: InputLayout) -> Any:
    """Returns a feature map in the memory format that stock modules would return."""
    if not isinstance(x, Tensor) or type(x) is MetaStandIn or given.channels_last:
        return x
    return x.contiguous() if is_channels_last(x) else x


def _run(module: nn.Module, x: Any, given: InputLayout) -> Any:
    """Returns a module's output for a feature map in any memory format."""
    if not is_ordinary(x):  # nothing is folded then
        return module(x)
    any_format = (
        not module._compiled_call_impl
        and not has_hooks(module, apply_adapter)
        and _takes_any(module)
    )
    runs, stock_forward = running_at(module), "forward" not in module.__dict__
    if any_format and isinstance(module, _Inner) and runs is module and stock_forward:
        out = module.inside(x, given)
        return out if find_slot(module) is None else apply_adapter(module, (x,), out)
    if not isinstance(runs, _Inner):
        any_format = any_format and runs is not None and class_of(runs) in _ANY_LAYOUT
    token = _caller.set((given, any_format))
    try:
        return module(x if any_format else _as_given(x, given))
    finally:
        _caller.reset(token)


def _takes_any(module: nn.Module) -> bool:
    """Tells whether a module's forward and adapter compute the same in any memory format.

    Dropout does not: the elements that are dropped depend on the memory format.
    """
    slot = find_slot(module)
    if replaced_forward(module) is not None:
        return False
    if slot is None:
        return True
    choice = slot.choice()
    if choice.mixture is not None:
        return False
    adapter = slot._modules[choice.active] if choice.active in slot.sites else None
    if adapter is None or isinstance(adapter, PooledAdapter):
        return True
    drops = adapter.training and any(
        isinstance(each, nn.Dropout) and each.p for each in adapter.modules()
    )
    return type(adapter).__module__.startswith("resadapt.") and not drops


def _normalised(convolution: nn.Module, norm: nn.Module, x: Any, given: InputLayout) -> Any:
    """Returns a norm's output for a convolution's output, folded where possible."""
    out = in_one_step(convolution, norm, x, given)
    return _run(norm, _run(convolution, x, given), given) if out is None else out


def _shared(x: Any, given: InputLayout, first: nn.Module) -> Any:
    """Returns a block's input in the format for hooks of the first module, which may change it."""
    return _as_given(x, given) if has_hooks(first) else x


def _beside(downsample: nn.Module | None, x: Any, given: InputLayout) -> Any:
    """Returns the skip connection of a block."""
    if downsample is not None:
        return _run(downsample, x, given)
    return with_gradient_as_given(x, given) if is_ordinary(x) else x


class LeanSequential(_Inner, nn.Sequential):
    """`torch.nn.Sequential` that folds norms into the convolutions before them."""

    @override
    def inside(self, x: Any, given: InputLayout) -> Any:
        """Runs the modules in order."""
        modules = list(self)
        while modules:
            module, *modules = modules
            if modules and isinstance(modules[0], FrozenStatistics):
                x = _normalised(module, modules.pop(0), x, given)
            else:
                x = _run(module, x, given)
        return x


class LeanConv2dNormActivation(LeanSequential, Conv2dNormActivation):  # type: ignore[misc]
    """torchvision's `Conv2dNormActivation` that folds its norm."""


class LeanConv3dNormActivation(LeanSequential, Conv3dNormActivation):  # type: ignore[misc]
    """torchvision's `Conv3dNormActivation` that folds its norm."""


class LeanBasicBlock(_Inner, BasicBlock):  # type: ignore[misc]
    """torchvision's `BasicBlock` that folds its norms."""

    @override
    def inside(self, x: Tensor, given: InputLayout) -> Tensor:
        """Returns the block's output for a feature map."""
        x = _shared(x, given, self.conv1)
        out = _run(self.relu, _normalised(self.conv1, self.bn1, x, given), given)
        out = _normalised(self.conv2, self.bn2, out, given)
        out += _beside(self.downsample, x, given)
        activated: Tensor = _run(self.relu, out, given)
        return activated


class LeanBottleneck(_Inner, Bottleneck):  # type: ignore[misc]
    """torchvision's `Bottleneck` that folds its norms."""

    @override
    def inside(self, x: Tensor, given: InputLayout) -> Tensor:
        """Returns the block's output for a feature map."""
        x = _shared(x, given, self.conv1)
        out = _run(self.relu, _normalised(self.conv1, self.bn1, x, given), given)
        out = _run(self.relu, _normalised(self.conv2, self.bn2, out, given), given)
        out = _normalised(self.conv3, self.bn3, out, given)
        out += _beside(self.downsample, x, given)
        activated: Tensor = _run(self.relu, out, given)
        return activated


class LeanResNet(Overlay, ResNet):  # type: ignore[misc]
    """torchvision's `ResNet` that folds the norm of its stem."""

    @override
    def _forward_impl(self, x: Tensor) -> Tensor:
        given = _given(self, x, _caller.get()[0])
        h = _normalised(self.conv1, self.bn1, x, given)
        for module in (
            self.relu,
            self.maxpool,
            self.layer1,
            self.layer2,
            self.layer3,
            self.layer4,
            self.avgpool,
        ):
            h = _run(module, h, given)
        logits: Tensor = self.fc(torch.flatten(h, 1))
        return logits


FOLDING: dict[type[nn.Module], type[nn.Module]] = {
    nn.Sequential: LeanSequential,
    Conv2dNormActivation: LeanConv2dNormActivation,
    Conv3dNormActivation: LeanConv3dNormActivation,
    BasicBlock: LeanBasicBlock,
    Bottleneck: LeanBottleneck,
    ResNet: LeanResNet,
}
"""Stock classes that contain convolutions and norms, and the classes that replace them."""


def in_residual_blocks(modules: Iterable[nn.Module]) -> set[int]:
    """Returns the ids of the modules in residual blocks, where channels_last is faster."""
    blocks = [module for module in modules if type(module) in (BasicBlock, Bottleneck, ResNet)]
    return {
        id(module)
        for block in blocks
        for child in block.children()
        for module in (child, *child.children())
    }
