"""The families of adapters, by name. A family contains only its mathematics."""

from resadapt.adapters.conv import ConvAdapter
from resadapt.adapters.family import FAMILIES, Adapter, Site, register_family
from resadapt.adapters.lora import LoraAdapter
from resadapt.adapters.parallel import ParallelAdapter
from resadapt.adapters.pooled import PooledAdapter

__all__ = ["FAMILIES", "Adapter", "ConvAdapter", "LoraAdapter", "ParallelAdapter", "PooledAdapter", "Site", "register_family"]
