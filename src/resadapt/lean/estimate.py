"""Estimating memory and operations of a training step, with tensors without values."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from typing_extensions import override

from resadapt.base.autocast import check_autocast, device_kinds
from resadapt.base.errors import AdapterError, InjectionError
from resadapt.base.html_table import html_table
from resadapt.base.inputs import named_in
from resadapt.base.undisturbed import EAGERLY
from resadapt.injection.ledger import ledger_of
from resadapt.injection.sets import remove_adapters
from resadapt.injection.walk import unwrap
from resadapt.lean.constants import constants_in

__all__ = ["StepCost", "TrainingEstimate", "cost_of_step", "estimate_training"]


_HEADING = ("a training step", "this model", "full fine-tuning")


@dataclass(frozen=True)
class StepCost:
    """Cost of one training step, without the optimizer.

    Args:
        trained: Number of parameters that get gradients.
        saved_bytes: Bytes of the tensors saved for the backward pass, without the input and the
            model's parameters and buffers.
        peak_bytes: Largest sum of all tensors at one time, in bytes: the model, the input, saved
            tensors, gradients and temporaries. Memory inside kernels is not counted.
        forward_flops: Operations of convolutions and matrix products in the forward pass; a
            multiply-add counts as two.
        backward_flops: Operations in the backward pass, counted alike.
    """

    trained: int
    saved_bytes: int
    peak_bytes: int
    forward_flops: int
    backward_flops: int


@dataclass(frozen=True)
class TrainingEstimate:
    """Cost of a training step with adapters and with full fine-tuning, as a table.

    ``str`` gives the table as text; notebooks show it.

    Args:
        adapters: Cost with the injected model.
        full: Cost with every parameter of the backbone trained.
    """

    adapters: StepCost
    full: StepCost

    def _rows(self) -> Iterator[tuple[str, str, str, str]]:
        """Walks the rows: what, with adapters, with full fine-tuning, and the ratio."""
        for what, name, unit, form in (
            ("trained parameters", "trained", 1, "{:,.0f}"),
            ("saved for backward", "saved_bytes", 2**20, "{:,.1f} MiB"),
            ("peak of all tensors", "peak_bytes", 2**20, "{:,.1f} MiB"),
            ("forward", "forward_flops", 1e9, "{:,.2f} GFLOP"),
            ("backward", "backward_flops", 1e9, "{:,.2f} GFLOP"),
        ):
            adapters, full = getattr(self.adapters, name), getattr(self.full, name)
            shown = [form.format(each / unit) for each in (adapters, full)]
            yield what, shown[0], shown[1], f"{adapters / max(1, full):.1%}"

    def __str__(self) -> str:
        """Returns a table."""
        lines = [f"{_HEADING[0]:<20}{_HEADING[1]:>16}{_HEADING[2]:>20}"]
        for what, adapters, full, ratio in self._rows():
            lines.append(f"{what:<20}{adapters:>16}{full:>20}  ({ratio})")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Returns a table."""
        return html_table((*_HEADING, "ratio"), self._rows())


def estimate_training(
    model: nn.Module,
    input_shape: list[int] | tuple[int, ...],
    *,
    autocast: torch.dtype | None = None,
) -> TrainingEstimate:
    """Estimates the cost of a training step, compared with full fine-tuning, without running one.

    The step runs on a copy of the model without values (meta or fake tensors), which takes almost
    no memory, and only the time of the Python code.

    Args:
        model: An injected model, optimized or not.
        input_shape: Shape of the input, the batch first: ``(8, 3, 224, 224)``.
        autocast: The dtype of the autocast that the forward runs under on the device of the model;
            None for a step without autocast. The casts of weights and features count.

    Returns:
        The estimate.

    Raises:
        InjectionError: Nothing was injected or is active, or the model's forward reads tensor
            values.
        AdapterError: `input_shape` is not a shape, or `autocast` is not a dtype of autocast.

    Example:
        >>> from torchvision.models import resnet18
        >>> from resadapt import inject_adapters
        >>> model = inject_adapters(resnet18(num_classes=3), head="fc")
        >>> estimate = estimate_training(model, (8, 3, 224, 224))
        >>> round(estimate.adapters.saved_bytes / 2**20), round(estimate.full.saved_bytes / 2**20)
        (59, 165)
        >>> half = estimate_training(model, (8, 3, 224, 224), autocast=torch.bfloat16)
        >>> round(half.full.saved_bytes / 2**20)
        112
    """
    shape = tuple(input_shape) if isinstance(input_shape, list | tuple) else ()
    if not shape or any(type(size) is not int or size < 1 for size in shape):
        raise AdapterError(
            f"input_shape={input_shape!r}: give the sizes of an input, the batch first, such as "
            "(8, 3, 224, 224)."
        )
    _ = ledger_of(model).needed_set
    check_autocast(autocast, device_kinds(model))
    try:
        with EAGERLY:
            # autocast casts no meta tensors, but fake ones, which have the model's device.
            fake = None if autocast is None else FakeTensorMode(allow_non_fake_inputs=True)
            empty = partial(torch.empty_like, device="meta") if fake is None else fake.from_tensor
            adapted, full = (_copy_without_values(unwrap(model), empty) for _ in range(2))
            remove_adapters(full).requires_grad_(True)
            some = (p for p in full.parameters() if p.is_floating_point())
            like = next(some, empty(torch.empty(0)))
            with fake or nullcontext():
                x = torch.empty(shape, dtype=like.dtype, device=like.device)
                costs = [cost_of_step(each.train(), x, autocast) for each in (adapted, full)]
    except Exception as error:  # a user's model may raise anything
        raise InjectionError(
            "The model cannot be run on the meta device with an input of shape "
            f"{list(shape)}: {type(error).__name__}: {error}"
        ) from error
    return TrainingEstimate(*costs)


def _copy_without_values(model: nn.Module, empty: Callable[[Tensor], Tensor]) -> nn.Module:
    """Returns a copy of a model with tensors that a function returns for the model's."""
    with torch.no_grad():
        memo: dict[int, Any] = {}
        for tensor in (*nn.Module.parameters(model), *nn.Module.buffers(model)):
            memo[id(tensor)] = (
                nn.Parameter(empty(tensor.detach()), tensor.requires_grad)
                if isinstance(tensor, nn.Parameter)
                else empty(tensor)
            )
    return copy.deepcopy(model, memo)


def cost_of_step(model: nn.Module, x: Tensor, autocast: torch.dtype | None = None) -> StepCost:
    """Runs a training step, with values or without, and counts its cost."""

    def forward() -> Any:
        with torch.autocast(x.device.type, autocast) if autocast else nullcontext():
            return model(x)

    parameters = list(nn.Module.parameters(model))
    model_tensors = [x, *parameters, *nn.Module.buffers(model)]
    forward()  # fills the caches of folded and converted weights
    model_tensors += constants_in(model)
    counted, saved = _Counted(model_tensors), _Saved(model_tensors)
    with counted:
        with torch.autograd.graph.saved_tensors_hooks(saved.keep, lambda tensor: tensor):
            output = forward()
        flops, saved_bytes = counted.flops, saved.bytes
        saved.kept.clear()
        tensors = [tensor for _, tensor in named_in(output) if tensor.requires_grad]
        torch.autograd.backward(tensors, [torch.empty_like(tensor) for tensor in tensors])
    return StepCost(
        sum(p.numel() for p in parameters if p.requires_grad),
        saved_bytes,
        counted.peak,
        flops,
        counted.flops - flops,
    )


def _backward_flops(grad: Tensor, x: Tensor, weight: Tensor, *more: Any) -> int:
    """Returns the operations of a convolution's backward, whose groups torch's formula ignores.

    The gradients of input and weight each take as many as the forward.
    """
    transposed, mask = more[4], more[7]
    positions = math.prod((x if transposed else grad).shape[2:])
    return int(2 * (mask[0] + mask[1]) * len(grad) * positions * weight.numel())


class _Saved:
    """Counts the bytes saved for the backward pass, each storage once."""

    def __init__(self, excluded: list[Tensor]) -> None:
        self._excluded = {tensor.untyped_storage()._cdata for tensor in excluded}
        self.kept: dict[int, torch.UntypedStorage] = {}

    def keep(self, tensor: Tensor) -> Tensor:
        """Counts a tensor."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._excluded:
            self.kept[storage._cdata] = storage
        return tensor

    @property
    def bytes(self) -> int:
        """Sum of all counted storages."""
        return sum(storage.nbytes() for storage in self.kept.values())


class _Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations, and tracks the memory of all live tensors.

    torch's FlopCounterMode has hooks on all modules, with which no norm is folded.
    """

    def __init__(self, present: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._live: dict[int, weakref.ref[Any]] = {}
        self._now = self.peak = self.flops = 0
        for tensor in present:
            self._add(tensor)

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        operator = func._overloadpacket
        if operator is torch.ops.aten.convolution_backward:
            self.flops += _backward_flops(*args)
        elif operator in flop_registry:
            self.flops += flop_registry[operator](*args, **(kwargs or {}), out_val=output)
        for _, tensor in named_in(output):
            self._add(tensor)
        return output

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._live:
            return

        def gone(_: object) -> None:
            self._now -= size
            del self._live[key]

        self._live[key] = weakref.ref(storage, gone)
        self._now += size
        self.peak = max(self.peak, self._now)
