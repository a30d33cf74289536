"""The families of adapters, by name. A family contains only its mathematics."""

from __future__ import annotations

from resadapt.adapters.pooled import PooledAdapter

__all__ = ["FAMILIES", "PooledAdapter"]

FAMILIES = {"pooled": PooledAdapter}
"""A family is a module, built as ``family(channels, bottleneck, spatial_dims, channel_dim=, dropout=, **options)``."""
