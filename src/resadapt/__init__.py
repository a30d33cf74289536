"""Small trainable residual adapters for any torchvision ResNet, with adapter files that prove themselves."""

from resadapt.base.errors import (
    AdapterError,
    AdapterFileError,
    AdapterKeyError,
    BackboneDriftError,
    BackboneMismatchError,
    InjectionError,
    VerificationError,
)
from resadapt.base.fingerprint import TensorRecord
from resadapt.base.spec import SetSpec, SiteSpec
from resadapt.base.version import __version__
from resadapt.files.adapter_file import AdapterInfo, ProbeRecord, read_adapter_info
from resadapt.injection.sets import (
    AdapterSetInfo,
    adapters_disabled,
    inject_adapters,
    list_adapters,
    remove_adapters,
    set_active_adapters,
)
from resadapt.parameters import (
    ModelSummary,
    ParameterCount,
    count_parameters,
    named_trainable_parameters,
    parameter_groups,
    summary,
    trainable_parameters,
)
from resadapt.proof.checkpoint import (
    adapter_state_dict,
    load_adapter_state_dict,
    load_adapters,
)
from resadapt.proof.compare import Check, VerificationReport
from resadapt.proof.drift import BackboneReport, check_backbone
from resadapt.proof.verify import save_adapters, verify_adapters

__all__ = [
    "AdapterError",
    "AdapterFileError",
    "AdapterInfo",
    "AdapterKeyError",
    "AdapterSetInfo",
    "BackboneDriftError",
    "BackboneMismatchError",
    "BackboneReport",
    "Check",
    "InjectionError",
    "ModelSummary",
    "ParameterCount",
    "ProbeRecord",
    "SetSpec",
    "SiteSpec",
    "TensorRecord",
    "VerificationError",
    "VerificationReport",
    "__version__",
    "adapter_state_dict",
    "adapters_disabled",
    "check_backbone",
    "count_parameters",
    "inject_adapters",
    "list_adapters",
    "load_adapter_state_dict",
    "load_adapters",
    "named_trainable_parameters",
    "parameter_groups",
    "read_adapter_info",
    "remove_adapters",
    "save_adapters",
    "set_active_adapters",
    "summary",
    "trainable_parameters",
    "verify_adapters",
]
