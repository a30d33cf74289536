"""Records a backbone tensor by tensor and module by module, and compares a backbone with it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from typing_extensions import Self

from resadapt.base.module_record import ModuleRecord, record_modules
from resadapt.base.spec import within
from resadapt.base.tensors import dtype_name, dtype_named, raw_bytes, sha256, sha256_of_each

__all__ = ["Fingerprint", "TensorRecord", "record_tensors", "tensor_differences"]


@dataclass(frozen=True)
class TensorRecord:
    """Dtype, shape and digest of a tensor.

    Args:
        dtype: Name of the dtype, such as ``"float32"``.
        shape: Sizes.
        sha256: Digest of the elements in logical (row-major) order, independent of the memory
            format.
    """

    dtype: str
    shape: tuple[int, ...]
    sha256: str

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @classmethod
    def of(cls, tensor: Tensor) -> TensorRecord:
        """Returns the record of a tensor.

        For a sharded tensor, all processes of the group must call this function together.
        """
        return cls(dtype_name(tensor), tuple(tensor.shape), sha256(tensor))

    def to_json(self) -> list[Any]:
        """Returns the record as JSON values."""
        return [self.dtype, list(self.shape), self.sha256]

    def difference_of_form(self, tensor: Tensor) -> str | None:
        """Returns why a tensor cannot hold the recorded elements, None if it can."""
        if is_lazy(tensor):
            return "has no size yet"
        if tuple(tensor.shape) != self.shape:
            return f"has shape {list(tensor.shape)} where {list(self.shape)} was recorded"
        if tensor.is_meta:
            return "is a meta tensor, without values (not loaded, or offloaded)"
        return None

    def difference(self, tensor: Tensor) -> str | None:
        """Returns how a tensor differs from this record, None if it does not.

        A lossless conversion to a wider dtype is no difference.
        """
        if difference := self.difference_of_form(tensor):
            return difference
        if TensorRecord.of(_narrowed(tensor, self.dtype)) == self:
            return None
        if dtype_name(tensor) != self.dtype:
            return f"is {dtype_name(tensor)} where {self.dtype} was recorded"
        return "has other values"


@dataclass(frozen=True)
class Fingerprint:
    """Records of a backbone's parameters, buffers and modules.

    Args:
        tensors: The record of each parameter and buffer, by name.
        modules: The record of each module, by name.
        caches: Names of the non-persistent buffers. A module may create or resize such a buffer as
            a cache while it runs, so a buffer with another shape is not compared.
    """

    tensors: dict[str, TensorRecord]
    modules: dict[str, ModuleRecord]
    caches: tuple[str, ...] = ()

    @classmethod
    def of(cls, modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> Self:
        """Takes the fingerprint of a backbone.

        Args:
            modules: The backbone's modules by name.
            tensors: The backbone's parameters and buffers by name.
        """
        names = _non_persistent(modules)
        return cls(
            record_tensors(tensors),
            record_modules(modules.items()),
            tuple(n for n in tensors if n in names),
        )

    @property
    def sha256(self) -> str:
        """Digest of all records: equal for equal backbones."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def __contains__(self, tensor: object) -> bool:
        """Returns whether a parameter or buffer of this name was recorded."""
        return tensor in self.tensors

    def without(self, head: Collection[str]) -> Self:
        """Returns the fingerprint without the modules of a head and everything inside them."""
        return type(self)(
            {name: record for name, record in self.tensors.items() if not within(name, head)},
            {name: record for name, record in self.modules.items() if not within(name, head)},
            tuple(name for name in self.caches if not within(name, head)),
        )

    def differences(
        self,
        modules: Mapping[str, nn.Module],
        tensors: Mapping[str, Tensor],
        outside: Collection[str] = (),
    ) -> dict[str, str]:
        """Compares a backbone with this fingerprint.

        Args:
            modules: The current modules, by name.
            tensors: The current parameters and buffers, by name.
            outside: Names of modules that are not compared.

        Returns:
            The difference of each tensor and module that differs, by name; empty if none does.
        """
        caches = {*self.caches, *_non_persistent(modules)}
        compared = {name: tensor for name, tensor in tensors.items() if not within(name, outside)}
        found = tensor_differences(compared, self.tensors)
        for name in caches & found.keys():
            if (
                name not in compared
                or name not in self.tensors
                or tuple(compared[name].shape) != self.tensors[name].shape
            ):
                del found[name]
        inside = {name: module for name, module in modules.items() if not within(name, outside)}
        today = record_modules(inside.items())
        # Version 0.2 recorded modules without effect, such as stochastic depth of other packages.
        idle = {
            name: record
            for name in self.modules.keys() & inside.keys() - today.keys()
            if (record := ModuleRecord.of(inside[name])).type == self.modules[name].type
        }
        today |= idle
        for name in [*self.modules, *(name for name in today if name not in self.modules)]:
            if name not in self.modules:
                reason: str | None = f"({today[name].type}) is new"
            elif name not in today:
                reason = f"({self.modules[name].type}) is missing"
            else:
                before = self.modules[name].without_children(name, idle)
                reason = before.difference(today[name])
            if reason:
                found[name or "(the model)"] = reason
        return found

    def to_json(self) -> dict[str, Any]:
        """Returns the fingerprint as JSON values."""
        return {
            "tensors": {name: record.to_json() for name, record in self.tensors.items()},
            "modules": {
                name: [each.type, each.config, each.state] for name, each in self.modules.items()
            },
            "caches": list(self.caches),
        }

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Reads a fingerprint from the untrusted JSON values of a file.

        Raises:
            ValueError, TypeError, KeyError: The data does not have the form that `to_json` returns.
        """
        modules = dict(data["modules"])
        return cls(
            tensor_records(data["tensors"]),
            {str(name): _module_record(*fields) for name, fields in modules.items()},
            tuple(map(str, data["caches"])),
        )


def record_tensors(tensors: Mapping[str, Tensor]) -> dict[str, TensorRecord]:
    """Returns the record of every named tensor."""
    digests = sha256_of_each(tensors.values())
    return {
        name: TensorRecord(dtype_name(tensor), tuple(tensor.shape), digest)
        for (name, tensor), digest in zip(tensors.items(), digests, strict=True)
    }


def tensor_records(data: Any) -> dict[str, TensorRecord]:
    """Reads the tensor records of a file from untrusted JSON: name -> [dtype, shape, sha256].

    Raises:
        ValueError, TypeError: The data does not have this form.
    """
    records = {}
    for name, (dtype, shape, digest) in dict(data).items():
        if (
            dtype_named(dtype) is None
            or not all(type(size) is int for size in shape)
            or not isinstance(digest, str)
        ):
            raise ValueError(f"not a tensor record: {name!r}")
        records[name] = TensorRecord(dtype, tuple(shape), digest)
    return records


def tensor_differences(
    tensors: Mapping[str, Tensor], records: Mapping[str, TensorRecord]
) -> dict[str, str]:
    """Compares tensors with the records of their names; returns the differences by name."""
    found = {}
    # Only tensors with the recorded form are hashed here; `difference` hashes converted tensors.
    alike = {
        name: tensor
        for name, tensor in tensors.items()
        if name in records
        and dtype_name(tensor) == records[name].dtype
        and records[name].difference_of_form(tensor) is None
    }
    today = record_tensors(alike)
    for name in [*records, *(name for name in tensors if name not in records)]:
        if name not in records:
            found[name] = "is new"
        elif name not in tensors:
            found[name] = "is missing"
        elif today.get(name) != records[name] and (
            difference := records[name].difference(tensors[name])
        ):
            found[name] = difference
    return found


def _non_persistent(modules: Mapping[str, nn.Module]) -> set[str]:
    return {
        f"{name}.{key}" if name else key
        for name, module in modules.items()
        for key in module._non_persistent_buffers_set
    }


def _module_record(kind: Any, config: Any, state: Any) -> ModuleRecord:
    if not isinstance(kind, str) or not isinstance(config, dict) or not isinstance(state, dict):
        raise ValueError("not a module record")
    return ModuleRecord(kind, config, state)


def _narrowed(tensor: Tensor, dtype: str) -> Tensor:
    """Converts a tensor back to the recorded dtype if that is lossless."""
    target = dtype_named(dtype)
    if target is not None and tensor.dtype != target:
        try:
            back = tensor.to(target)
            if raw_bytes(back.to(tensor.dtype)) == raw_bytes(tensor):
                return back
        except RuntimeError:  # a dtype without conversions
            return tensor
    return tensor
