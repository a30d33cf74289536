"""The families of adapters, by name. A family contains only its mathematics."""

from resadapt.adapters.family import FAMILIES, Adapter, Site, register_family
from resadapt.adapters.pooled import PooledAdapter

__all__ = ["FAMILIES", "Adapter", "PooledAdapter", "Site", "register_family"]
