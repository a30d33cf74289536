"""Weight and bias of the layers that linear families can be merged into."""

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torchvision.models.convnext import LayerNorm2d
from torchvision.ops import FrozenBatchNorm2d

from resadapt.adapters.family import Site
from resadapt.adapters.own_forward import uses_parameters

__all__ = ["affine_tensors", "swap_if_transposed", "weight_and_bias"]

_CHANNELS_FIRST = (_ConvNd, _NormBase, nn.GroupNorm, FrozenBatchNorm2d, LayerNorm2d)
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm)
# Modules whose forwards are affine in weight and bias. Forwards of other libraries may do more:
# timm's norms include an activation.
_KNOWN = ("torch.nn.modules.", "torchvision.ops.misc", "torchvision.models.convnext", "resadapt.")


def affine_tensors(module: nn.Module, site: Site) -> tuple[Tensor, Tensor | None]:
    """Returns the weight and bias of a layer that is affine in them, channel by channel.

    Args:
        module: The layer: a convolution, transposed or not, a Linear, or a norm.
        site: The site that an adapter was built for.

    Returns:
        The weight, and the bias or None.

    Raises:
        ValueError: The module is not such a layer, has no weight, or has other channels than the
            site.

    Example:
        >>> weight, bias = affine_tensors(nn.Conv2d(3, 8, 5), Site(8))
        >>> weight.shape
        torch.Size([8, 3, 5, 5])
    """
    kind = type(module).__name__
    if isinstance(module, _ConvNd):
        _check_uses_parameters(module)
    elif not isinstance(module, _CHANNELS_FIRST + _CHANNELS_LAST) or not type(
        module
    ).forward.__module__.startswith(_KNOWN):
        raise ValueError(
            f"{kind} is not a convolution, Linear or norm of torch, so the adapter cannot be "
            "merged into it"
        )
    tensors = {**module._parameters, **module._buffers}
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if weight is None:
        raise ValueError(f"{kind} has no weight that the adapter could be merged into")
    if bias is None and getattr(module, "bias", None) is not None:
        raise ValueError(
            f"this {kind} computes its bias from other tensors, so the adapter cannot be merged "
            "into it"
        )
    channels = getattr(module, "out_channels", weight.shape[0])
    last = isinstance(module, _CHANNELS_LAST) and not isinstance(module, LayerNorm2d)
    if channels != site.channels or (site.spatial_dims > 0 and last != (site.channel_dim == -1)):
        raise ValueError(f"the channels of {kind} are not the channels that the adapter reads")
    if weight.ndim > 1 and isinstance(module, nn.LayerNorm | nn.RMSNorm):
        raise ValueError(f"{kind} has a weight for every position, and the adapter adapts channels")
    return weight, bias


def swap_if_transposed(module: nn.Module, weight: Tensor) -> Tensor:
    """Swaps input and output channels in the weight of a transposed convolution.

    Weights of other layers are returned unchanged. Applying the function twice restores the weight.

    Args:
        module: The layer.
        weight: ``[C_in, C_out / groups, ...]``, or the result of this function, which is
            ``[C_out, C_in / groups, ...]``.

    Example:
        >>> convolution = nn.ConvTranspose2d(4, 6, 3, groups=2)
        >>> rows = swap_if_transposed(convolution, convolution.weight)
        >>> rows.shape, bool((swap_if_transposed(convolution, rows) == convolution.weight).all())
        (torch.Size([6, 2, 3, 3]), True)
    """
    if not isinstance(module, _ConvTransposeNd):
        return weight
    grouped = weight.reshape(module.groups, -1, *weight.shape[1:])
    return grouped.transpose(1, 2).flatten(0, 1)


def weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Returns the parameters of a layer that an adapter can be merged into.

    Raises:
        ValueError: The weight or bias is computed from other tensors in every forward.
    """
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    if weight is None or (bias is None and module.bias is not None):
        raise ValueError(
            f"this {type(module).__name__} computes its weight or bias from other tensors, so the "
            "adapter cannot be merged into it"
        )
    if isinstance(module, _ConvNd):
        _check_uses_parameters(module)
    return weight, bias


def _check_uses_parameters(module: _ConvNd) -> None:
    """Checks that a convolution's forward convolves with the parameters, and does nothing else.

    Raises:
        ValueError: The forward computes another weight, or changes the result.
    """
    if not uses_parameters(module):
        raise ValueError(
            f"the forward of {type(module).__name__} is not a convolution of the padded input with "
            "the parameters weight and bias, so the adapter cannot be merged into them"
        )
