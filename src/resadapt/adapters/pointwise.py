"""Pointwise layers: a Linear, or a convolution of kernel size 1."""

from torch import nn

from resadapt.adapters.family import Site

__all__ = ["pointwise"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def pointwise(
    site: Site, in_channels: int, out_channels: int, bias: bool = True
) -> nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d:
    """Returns a layer that maps the channels at every position of a site's feature maps.

    Args:
        site: The site, with feature maps ``[N, C, ...]`` or ``[N, ..., C]``.
        in_channels: C of the layer's input.
        out_channels: C of the layer's output.
        bias: Whether the layer has a bias.

    Raises:
        ValueError: The site is ``[N, C, ...]`` with more than 3 spatial dimensions; torch has no
            such convolution.

    Example:
        >>> pointwise(Site(8), 8, 2)
        Conv2d(8, 2, kernel_size=(1, 1), stride=(1, 1))
        >>> pointwise(Site(8, spatial_dims=2, channel_dim=-1), 8, 2)
        Linear(in_features=8, out_features=2, bias=True)
    """
    if site.spatial_dims == 0 or site.channel_dim == -1:
        return nn.Linear(in_channels, out_channels, bias)
    if site.spatial_dims > len(_CONVOLUTIONS):
        raise ValueError(
            "it needs at most 3 spatial dimensions, or the channels in the last one, not "
            f"{site.spatial_dims}"
        )
    return _CONVOLUTIONS[site.spatial_dims - 1](in_channels, out_channels, 1, bias=bias)
