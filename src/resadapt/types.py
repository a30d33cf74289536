"""The return types of `resadapt`: reports, descriptions, counts and estimates."""

from resadapt.adapters import FamilyInfo
from resadapt.base.fingerprint import Fingerprint, TensorRecord
from resadapt.base.module_record import ModuleRecord
from resadapt.base.spec import SetSpec, SiteSpec
from resadapt.files.adapter_file import AdapterInfo, ProbeRecord
from resadapt.injection.set_info import AdapterSetInfo
from resadapt.lean.cache import PrefixCache
from resadapt.lean.estimate import StepCost, TrainingEstimate
from resadapt.parameters.suggest import SuggestedLayers
from resadapt.parameters.summary import ModelSummary
from resadapt.parameters.trainable import ParameterCount
from resadapt.proof.drift import BackboneReport
from resadapt.proof.report import Check, VerificationReport

__all__ = [
    "AdapterInfo",
    "AdapterSetInfo",
    "BackboneReport",
    "Check",
    "FamilyInfo",
    "Fingerprint",
    "ModelSummary",
    "ModuleRecord",
    "ParameterCount",
    "PrefixCache",
    "ProbeRecord",
    "SetSpec",
    "SiteSpec",
    "StepCost",
    "SuggestedLayers",
    "TensorRecord",
    "TrainingEstimate",
    "VerificationReport",
]
