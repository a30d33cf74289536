"""Where the channels of a module's output are: what its type, its width and its sizes tell."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn
from torch.nn.modules import pooling
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.video import resnet as video
from torchvision.ops import FrozenBatchNorm2d, SqueezeExcitation

from resadapt.base.errors import InjectionError
from resadapt.injection.walk import backbone_modules, is_leaf

__all__ = ["Outputs", "Shape", "declared"]


@dataclass(frozen=True)
class Shape:
    """The shape of a site's output.

    Args:
        channels: Number of channels C.
        spatial_dims: Number of dimensions besides batch and channels.
        channel_dim: Dimension of the channels, 1 or -1.
        sure: Whether every input gives this shape; False if only a forward can tell.
    """

    channels: int
    spatial_dims: int
    channel_dim: int = 1
    sure: bool = True


_KEEPS_SHAPE = (
    nn.ReLU,
    nn.ReLU6,
    nn.SiLU,
    nn.GELU,
    nn.LeakyReLU,
    nn.Hardswish,
    nn.Identity,
    nn.Dropout,
    nn.Dropout2d,
    nn.Dropout3d,
)


def declared(module: nn.Module) -> Shape | None:
    """Returns the output shape that a module's type declares, or None.

    The first forward checks the declared shape.
    """
    match module:
        case nn.Conv1d() | nn.ConvTranspose1d():
            return Shape(module.out_channels, 1, sure=_is_stock(module))
        case nn.Conv2d() | nn.ConvTranspose2d():
            return Shape(module.out_channels, 2, sure=_is_stock(module))
        case nn.Conv3d() | nn.ConvTranspose3d():
            return Shape(module.out_channels, 3, sure=_is_stock(module))
        case nn.BatchNorm2d() | nn.InstanceNorm2d():
            return Shape(module.num_features, 2, sure=_is_stock(module))
        case nn.BatchNorm3d() | nn.InstanceNorm3d():
            return Shape(module.num_features, 3, sure=_is_stock(module))
        case FrozenBatchNorm2d():
            return Shape(module.weight.numel(), 2, sure=_is_stock(module))
        case nn.Linear():
            return Shape(module.out_features, 0, sure=False)  # the input may be tokens, [N, L, C]
        case SqueezeExcitation():
            return declared(module.fc2)
        case Bottleneck() | video.Bottleneck():
            return declared(module.conv3)
        case BasicBlock() | video.BasicBlock():
            return declared(module.conv2)
        case nn.Sequential() if type(module).forward is nn.Sequential.forward:
            deciding = [child for child in module if not isinstance(child, _KEEPS_SHAPE)]
            return declared(deciding[-1]) if deciding else None
    return None


_FIRST = (
    *(_ConvNd, _NormBase, nn.GroupNorm, nn.Upsample),
    *(pooling._AvgPoolNd, pooling._MaxPoolNd),
    *(pooling._AdaptiveAvgPoolNd, pooling._AdaptiveMaxPoolNd),
)
_LAST = (nn.LayerNorm, nn.RMSNorm, nn.Linear)
_LAST_FORWARDS = tuple(kind.forward for kind in _LAST)


def _is_stock(module: nn.Module) -> bool:
    """Tells whether a layer computes as torch or torchvision wrote it."""
    kind = type(module)
    forwards = [getattr(kind, key) for key in ("forward", "_conv_forward") if hasattr(kind, key)]
    return "forward" not in module.__dict__ and all(
        forward.__module__.partition(".")[0] in ("torch", "torchvision") for forward in forwards
    )


def _dim_by_type(module: nn.Module, ndim: int) -> int | None:
    """Returns the dimension of the channels that a module's type fixes, or None.

    Args:
        module: The module.
        ndim: Number of dimensions of the output.
    """
    shape = declared(module)
    if shape is not None and shape.sure and shape.spatial_dims + 2 == ndim:
        return 1
    if isinstance(module, _ConvNd) or "forward" in module.__dict__:
        return None  # a convolution of another number of dimensions: the input has no batch
    if isinstance(module, _FIRST) and _is_stock(module):
        return 1
    if type(module).forward in _LAST_FORWARDS and _width(module) is not None:
        return -1
    return None


def _width(module: nn.Module) -> int | None:
    """Returns the number of channels that a single layer has as an attribute, or None."""
    if not isinstance(module, (*_FIRST, *_LAST)) and not is_leaf(module):
        return None
    for key in ("out_channels", "num_features", "num_channels", "out_features"):
        if type(width := getattr(module, key, None)) is int:
            return width
    shape = getattr(module, "normalized_shape", None)  # several: every position has its own weight
    return shape[0] if isinstance(shape, tuple | list) and len(shape) == 1 else None


@dataclass
class Outputs:
    """The shapes of a site's output in forwards of the model.

    Args:
        name: The site.
        module: The site's module.
        shapes: The shapes, first that for the input of the right size, then those for inputs of
            other sizes.
    """

    name: str
    module: nn.Module
    shapes: list[tuple[int, ...]]

    @property
    def starts_with_channels(self) -> bool:
        """Whether the type of the module fixes dimension 1 as the channels'."""
        return self._fixed() == 1

    @property
    def settled(self) -> bool:
        """Whether inputs of further sizes would tell no more about the channels."""
        return self._fixed() is not None or (len(self.shapes) > 1 and len(self._likely()) < 2)

    def channel_dim(self, given: int | None) -> int | None:
        """Returns the dimension of the channels, 1 or -1; None if it may be both.

        Args:
            given: The dimension that the user gives, or None.

        Raises:
            InjectionError: No dimension can be the channels', or the given one is another.
        """
        possible = self._possible()
        if not possible:
            raise InjectionError(
                f"Site {self.name!r} returned {self._seen()} for inputs of different sizes. "
                "Neither dimension 1 nor the last one stays the same, so there are no channels to "
                "adapt. Choose another module."
            )
        if given is not None and len(self.shapes[0]) > 2:
            if given not in possible:
                raise InjectionError(self._contradiction(given))
            return given
        likely = self._likely()
        return (given or likely[0]) if len(likely) == 1 else None

    def _fixed(self) -> int | None:
        """Returns the dimension that is the channels' whatever the size of the input, if any."""
        ndim = len(self.shapes[0])
        return 1 if ndim == 2 else _dim_by_type(self.module, ndim)

    def _possible(self) -> list[int]:
        """Returns the dimensions that can be the channels', by all that is known for certain."""
        if fixed := self._fixed():
            return [fixed]
        first, *others = self.shapes
        stay = [dim for dim in (1, -1) if all(other[dim] == first[dim] for other in others)]
        return _narrowed(stay, lambda dim: first[dim] == _width(self.module))

    def _likely(self) -> list[int]:
        """Returns the possible dimensions, less those that the layers inside speak against."""
        first = self.shapes[0]
        inside = [each for _, each in backbone_modules(self.module) if _width(each) is not None]
        # Linears are asked last: some mix positions, and some compute a factor for each channel.
        surer = [each for each in inside if not isinstance(each, nn.Linear)]
        likely = _narrowed(self._possible(), lambda dim: _some_fits(surer, first, dim))
        likely = _narrowed(likely, lambda dim: _some_fits(inside, first, dim))
        # What is left of pooled positions has size 1.
        return _narrowed(likely, lambda dim: first[dim] == math.prod(first[1:]))

    def _seen(self) -> str:
        return " and ".join(str(list(shape)) for shape in dict.fromkeys(self.shapes))

    def _contradiction(self, given: int) -> str:
        width = _width(self.module)
        has = f" and has {width} channels" if width else ""
        where = "the last dimension" if given == 1 else "dimension 1"
        return (
            f"channel_dim={given} is wrong for site {self.name!r} "
            f"({type(self.module).__name__}): it returned {self._seen()}{has}. Its channels are in "
            f"{where}."
        )


def _narrowed(dims: list[int], keep: Callable[[int], bool]) -> list[int]:
    """Returns the dimensions to keep; all if that would leave none."""
    return [dim for dim in dims if keep(dim)] or dims


def _some_fits(layers: Iterable[nn.Module], shape: tuple[int, ...], dim: int) -> bool:
    """Tells whether the channels of some layer may be in a dimension of a site's output."""
    return any(
        _width(layer) == shape[dim] and _dim_inside(layer, len(shape)) in (None, dim)
        for layer in layers
    )


def _dim_inside(layer: nn.Module, ndim: int) -> int | None:
    """Returns the dimension that a layer inside a site fixes for the site's output, or None.

    Behind a convolution of fewer dimensions, positions were flattened. A Linear may compute a
    factor for each channel of a map.
    """
    if isinstance(layer, _ConvNd):
        return 1 if len(layer.kernel_size) + 2 == ndim else None
    if isinstance(layer, _NormBase):
        return 1
    return None if isinstance(layer, nn.Linear) else _dim_by_type(layer, ndim)
