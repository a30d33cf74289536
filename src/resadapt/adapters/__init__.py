"""The adapter families and their registry. A family contains only mathematics."""

from resadapt.adapters.bottleneck import BottleneckAdapter
from resadapt.adapters.conv import ConvAdapter
from resadapt.adapters.family import FAMILIES, Adapter, Site, register_family
from resadapt.adapters.lora import LoraAdapter
from resadapt.adapters.mona import MonaAdapter
from resadapt.adapters.parallel import ParallelAdapter
from resadapt.adapters.pooled import PooledAdapter
from resadapt.adapters.registry import FamilyInfo, list_families
from resadapt.adapters.series import SeriesAdapter
from resadapt.adapters.ssf import SsfAdapter

__all__ = [
    "FAMILIES",
    "Adapter",
    "BottleneckAdapter",
    "ConvAdapter",
    "FamilyInfo",
    "LoraAdapter",
    "MonaAdapter",
    "ParallelAdapter",
    "PooledAdapter",
    "SeriesAdapter",
    "Site",
    "SsfAdapter",
    "list_families",
    "register_family",
]
