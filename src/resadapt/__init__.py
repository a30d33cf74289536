"""Trainable adapters for frozen ConvNets, in adapter files that are verified when saved."""

import resadapt.types  # noqa: F401 - makes resadapt.types importable as an attribute
from resadapt.adapters import Adapter, Site, list_families, register_family
from resadapt.base.errors import (
    AdapterError,
    AdapterFileError,
    AdapterKeyError,
    AdapterWarning,
    BackboneDriftError,
    BackboneMismatchError,
    InjectionError,
    VerificationError,
)
from resadapt.base.version import __version__
from resadapt.deploy.fold import fold_adapters
from resadapt.deploy.inference_copy import inference_copy
from resadapt.files.adapter_file import read_adapter_info
from resadapt.injection.set_info import list_adapters
from resadapt.injection.sets import (
    adapters_disabled,
    adapters_for,
    inject_adapters,
    remove_adapters,
    set_active_adapters,
)
from resadapt.injection.sharing import forward_all
from resadapt.lean.cache import cache_prefix
from resadapt.lean.estimate import estimate_training
from resadapt.lean.optimize import optimize_backbone, restore_backbone
from resadapt.parameters.suggest import suggest_layers
from resadapt.parameters.summary import summary
from resadapt.parameters.trainable import (
    count_parameters,
    named_trainable_parameters,
    parameter_groups,
    trainable_parameters,
)
from resadapt.proof.combine import combine_adapters
from resadapt.proof.drift import accept_backbone, check_backbone
from resadapt.proof.loading import load_adapters
from resadapt.proof.state import adapter_state_dict, load_adapter_state_dict
from resadapt.proof.training_state import load_training_state_dict, training_state_dict
from resadapt.proof.verify import save_adapters, verify_adapters

__all__ = [
    "Adapter",
    "AdapterError",
    "AdapterFileError",
    "AdapterKeyError",
    "AdapterWarning",
    "BackboneDriftError",
    "BackboneMismatchError",
    "InjectionError",
    "Site",
    "VerificationError",
    "__version__",
    "accept_backbone",
    "adapter_state_dict",
    "adapters_disabled",
    "adapters_for",
    "cache_prefix",
    "check_backbone",
    "combine_adapters",
    "count_parameters",
    "estimate_training",
    "fold_adapters",
    "forward_all",
    "inference_copy",
    "inject_adapters",
    "list_adapters",
    "list_families",
    "load_adapter_state_dict",
    "load_adapters",
    "load_training_state_dict",
    "named_trainable_parameters",
    "optimize_backbone",
    "parameter_groups",
    "read_adapter_info",
    "register_family",
    "remove_adapters",
    "restore_backbone",
    "save_adapters",
    "set_active_adapters",
    "suggest_layers",
    "summary",
    "trainable_parameters",
    "training_state_dict",
    "verify_adapters",
]
