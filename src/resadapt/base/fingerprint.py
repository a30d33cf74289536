"""What a backbone was, tensor by tensor and module by module, and where it is no longer that."""

from __future__ import annotations

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
    """What is known of a tensor without having it.

    Args:
        dtype: Name of the dtype, such as ``"float32"``.
        shape: Sizes.
        sha256: Digest of the elements in logical (row-major) order, so that the memory format does
            not matter.
    """

    dtype: str
    shape: tuple[int, ...]
    sha256: str

    @classmethod
    def of(cls, tensor: Tensor) -> TensorRecord:
        """Returns the record of a tensor.

        All processes that share a sharded one must call together.
        """
        return cls(dtype_name(tensor), tuple(tensor.shape), sha256(tensor))

    def to_json(self) -> list[Any]:
        """Returns the record as JSON values."""
        return [self.dtype, list(self.shape), self.sha256]

    def difference_of_form(self, tensor: Tensor) -> str | None:
        """Says why a tensor cannot have the recorded elements, None if it can."""
        if is_lazy(tensor):
            return "has no size yet"
        if tuple(tensor.shape) != self.shape:
            return f"has shape {list(tensor.shape)} where {list(self.shape)} was recorded"
        if tensor.is_meta:
            return "has no values here (it is on the meta device: not loaded, or offloaded)"
        return None

    def difference(self, tensor: Tensor) -> str | None:
        """Says how a tensor differs from this record, None if it does not.

        A tensor that was only converted to a wider dtype still holds the recorded numbers and does
        not differ.
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
    """What is known of a backbone without having it: every parameter and buffer, and what else its
    modules compute with.

    Args:
        tensors: The record of each parameter and buffer, by name.
        modules: The record of each module, by name; None where they were not recorded (files of
            format 1).
        caches: Names of the non-persistent buffers. A module may make and resize such a buffer as a
            cache while it runs, so it is compared only where it has the recorded shape.
    """

    tensors: dict[str, TensorRecord]
    modules: dict[str, ModuleRecord] | None
    caches: tuple[str, ...] = ()

    @classmethod
    def of(cls, modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> Self:
        """Takes the fingerprint of a backbone.

        Args:
            modules: Its modules by name.
            tensors: Its parameters and buffers by name.
        """
        names = _non_persistent(modules)
        return cls(
            record_tensors(tensors),
            record_modules(modules.items()),
            tuple(n for n in tensors if n in names),
        )

    def __contains__(self, tensor: object) -> bool:
        """Tells whether a parameter or buffer of this name was recorded."""
        return tensor in self.tensors

    def without(self, head: Collection[str]) -> Self:
        """Returns the fingerprint of the backbone without some of its modules."""
        outside = {
            name: record for name, record in (self.modules or {}).items() if not within(name, head)
        }
        return type(self)(
            {name: record for name, record in self.tensors.items() if not within(name, head)},
            None if self.modules is None else outside,
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
            modules: The modules of today, by name.
            tensors: The parameters and buffers of today, by name.
            outside: Names of modules that are not compared.

        Returns:
            What is different about each tensor and module that differs; empty when all are the
            same.
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
        if self.modules is not None:
            today = record_modules(
                (name, module) for name, module in modules.items() if not within(name, outside)
            )
            for name in [*self.modules, *(name for name in today if name not in self.modules)]:
                if name not in self.modules:
                    found[name or "(the model)"] = f"({today[name].type}) is new"
                elif name not in today:
                    found[name or "(the model)"] = f"({self.modules[name].type}) is missing"
                elif difference := self.modules[name].difference(today[name]):
                    found[name or "(the model)"] = difference
        return found

    def to_json(self) -> dict[str, Any]:
        """Returns the fingerprint as JSON values."""
        return {
            "tensors": {name: record.to_json() for name, record in self.tensors.items()},
            "modules": {
                name: [each.type, each.config, each.state]
                for name, each in (self.modules or {}).items()
            },
            "caches": list(self.caches),
        }

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Reads a fingerprint that came from a file, trusting nothing in it.

        Raises:
            ValueError, TypeError, KeyError: The data does not have the form that `to_json` gives.
        """
        modules = data["modules"]
        records = (
            None
            if modules is None
            else {str(name): _module_record(*fields) for name, fields in modules.items()}
        )
        return cls(tensor_records(data["tensors"]), records, tuple(map(str, data["caches"])))


def record_tensors(tensors: Mapping[str, Tensor]) -> dict[str, TensorRecord]:
    """Returns the record of every named tensor."""
    digests = sha256_of_each(tensors.values())
    return {
        name: TensorRecord(dtype_name(tensor), tuple(tensor.shape), digest)
        for (name, tensor), digest in zip(tensors.items(), digests, strict=True)
    }


def tensor_records(data: Any) -> dict[str, TensorRecord]:
    """Reads records of tensors that came from a file as name -> [dtype, shape, sha256].

    Raises:
        ValueError, TypeError: They are none.
    """
    records = {}
    for name, (dtype, shape, digest) in dict(data).items():
        if (
            dtype_named(dtype) is None
            or not all(type(size) is int for size in shape)
            or not isinstance(digest, str)
        ):
            raise ValueError(f"no record of a tensor: {name!r}")
        records[name] = TensorRecord(dtype, tuple(shape), digest)
    return records


def tensor_differences(
    tensors: Mapping[str, Tensor], records: Mapping[str, TensorRecord]
) -> dict[str, str]:
    """Compares tensors with records of the same names, and says for each that differs how."""
    found = {}
    # One that was converted is not hashed twice.
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
        raise ValueError("no record of a module")
    return ModuleRecord(kind, config, state)


def _narrowed(tensor: Tensor, dtype: str) -> Tensor:
    """Converts back to the recorded dtype if that loses nothing."""
    target = dtype_named(dtype)
    if target is not None and tensor.dtype != target:
        try:
            back = tensor.to(target)
            if raw_bytes(back.to(tensor.dtype)) == raw_bytes(tensor):
                return back
        except RuntimeError:  # a dtype that nothing is converted to
            return tensor
    return tensor
