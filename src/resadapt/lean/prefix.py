"""Running a model from the outputs of the modules before the first adapter or private module."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from resadapt.base.autocast import current_autocast
from resadapt.base.errors import AdapterError, InjectionError, quote_names
from resadapt.base.inputs import map_tensors, named_in
from resadapt.base.spec import SetSpec
from resadapt.base.tensors import dtype_name, same_bits
from resadapt.base.undisturbed import EAGERLY, call, restored
from resadapt.injection.intercept import CallInterceptor, intercepted
from resadapt.injection.walk import backbone_modules
from resadapt.lean.stand_in import Form, MetaStandIn, NeededError

__all__ = ["Plan", "autocast_of", "check_cached_values", "continued", "plan_for", "values_for"]


class _DoneError(Exception):
    """Stops a forward once all needed tensors are computed."""


@dataclass(frozen=True)
class Plan:
    """How to run a model from the outputs of its first modules.

    Args:
        spec: The set that the plan was made for.
        autocast: The autocast that the plan was made under, as `autocast_of` returns it.
        inputs: The model's inputs, as meta tensors.
        calls: The modules called before the set's first adapter or private module, with their
            outputs as meta tensors.
        forms: Forms of the tensors in `inputs` and `calls`, numbered in this order.
        needed: Numbers of the tensors that the rest of the forward uses.
    """

    spec: SetSpec
    autocast: str | None
    inputs: Any
    calls: tuple[tuple[str, Any], ...]
    forms: tuple[Form, ...]
    needed: tuple[int, ...]


class _Recorder(CallInterceptor):
    """Keeps the outputs of the first modules.

    Args:
        first: Number of the first tensor.
        stop: Number of calls after which to stop; None for all.
        wanted: Numbers of the tensors to keep; None for all.
    """

    def __init__(
        self, first: int = 0, stop: int | None = None, wanted: Collection[int] | None = None
    ) -> None:
        super().__init__()
        self.calls: list[tuple[str, Any]] = []
        self.values: dict[int, Tensor] = {}
        self._stop, self._wanted, self._number = stop, wanted, count(first)

    @override
    def call(self, place: str, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Runs the module and keeps its output."""
        output = run(*args, **kwargs)
        _check_only_tensors(output, f"output of {place!r}")
        self.calls.append((place, map_tensors(output, self._keep)))
        if len(self.calls) == self._stop:
            raise _DoneError
        return output

    def _keep(self, tensor: Tensor) -> Tensor:
        number = next(self._number)
        if self._wanted is None or number in self._wanted:
            self.values[number] = tensor.clone()  # the model may change it in place later
        return tensor.to("meta")


class _Replay(CallInterceptor):
    """Replays the outputs of the first modules, without running the modules."""

    def __init__(self, plan: Plan, values: Mapping[int, Tensor], rows: int) -> None:
        super().__init__()
        self._plan, self._values, self._rows, self._number = plan, values, rows, count()
        self._at = next((tensor.device for tensor in values.values()), torch.device("cpu"))

    def fill(self, value: Any) -> Any:
        """Replaces the meta tensors in a value by cached tensors, or by stand-ins if not cached."""
        return map_tensors(value, self._tensor)

    @override
    def call(self, place: str, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Returns the recorded output."""
        calls = self._plan.calls
        if self.position >= len(calls):  # the active set's first adapter comes later
            return run(*args, **kwargs)
        known, value = calls[self.position]
        if known != place:
            raise NeededError({next(self._number)})
        return self.fill(value)

    def _tensor(self, form: Tensor) -> Tensor:
        number = next(self._number)
        if number in self._values:
            return self._values[number]
        return MetaStandIn.of(self._plan.forms[number], number, self._rows, self._at)


def autocast_of(model: nn.Module) -> str | None:
    """Returns the dtype of the current autocast on a model's device; None without autocast."""
    kind = next((parameter.device.type for parameter in nn.Module.parameters(model)), "cpu")
    dtype = current_autocast(kind)
    return None if dtype is None else dtype_name(dtype)


def plan_for(model: nn.Module, spec: SetSpec, inputs: object) -> Plan:
    """Finds the tensors needed to run a model without its first modules, and checks the result.

    Args:
        model: The unwrapped model, with `spec` active.
        spec: The set.
        inputs: A few samples.

    Raises:
        InjectionError: No module runs before the set's first adapter, these modules are random, or
            the model cannot be run without them.
        AdapterError: The model cannot be called with the samples.
    """
    _check_only_tensors(inputs, "input")
    with restored(model):
        recorder = _Recorder(sum(1 for _ in named_in(inputs)))
        recorder.start(spec.name)
        try:
            with intercepted(model, [spec], recorder):
                expected = call(model, inputs)
        except AdapterError:
            raise
        except Exception as error:  # a user's model may raise anything
            raise AdapterError(
                f"The model cannot be called with the samples: {type(error).__name__}: {error}."
            ) from error
        if not recorder.calls or not recorder.diverged:
            what = "No module runs before" if recorder.diverged else "The model did not run"
            raise InjectionError(
                f"{what} the adapters, norms and head of the set {spec.name!r}: there are no "
                "features to cache."
            )
        values = dict(enumerate(tensor for _, tensor in named_in(inputs))) | recorder.values
        batch = len(values[0])
        names = [name for name, _ in named_in(inputs, "input")]
        names += [
            name
            for place, output in recorder.calls
            for name, _ in named_in(output, f"output of {place!r}")
        ]
        forms = [Form.of(name, values[number], batch) for number, name in enumerate(names)]
        _check_repeats(model, spec, inputs, recorder)
        plan = Plan(
            spec,
            autocast_of(model),
            map_tensors(inputs, lambda tensor: tensor.to("meta")),
            tuple(recorder.calls),
            tuple(forms),
            (),
        )
        while True:
            found = continued(
                model, plan, [spec], {number: values[number] for number in plan.needed}, batch
            )
            if not isinstance(found, NeededError):
                break
            if found.numbers <= {*plan.needed}:
                raise InjectionError(
                    "The model does not call the same modules each time. Its features cannot be "
                    "cached."
                )
            plan = replace(plan, needed=tuple(sorted({*plan.needed, *found.numbers})))
    if ragged := [forms[number].name for number in plan.needed if not forms[number].has_rows]:
        raise InjectionError(
            f"The model needs the {quote_names(ragged)}, which has no row for each sample. Its "
            "features cannot be cached."
        )
    one, other = ([tensor for _, tensor in named_in(value)] for value in (expected, found))
    if len(one) != len(other) or not all(map(same_bits, one, other)):
        raise InjectionError(
            "The model's output from features differs: the model changes outputs of its first "
            "modules in place, or is random in eval mode. Its features cannot be cached."
        )
    return plan


def values_for(model: nn.Module, plan: Plan, inputs: object) -> dict[int, Tensor]:
    """Returns the tensors needed for a batch, and runs only the modules that compute them."""
    given = dict(enumerate(tensor for _, tensor in named_in(inputs)))
    owner = [number for number, (_, output) in enumerate(plan.calls) for _ in named_in(output)]
    calls = [owner[number - len(given)] for number in plan.needed if number >= len(given)]
    recorder = _Recorder(len(given), max(calls, default=-1) + 1, plan.needed)
    recorder.start(plan.spec.name)
    if calls:
        with (
            torch.no_grad(),
            EAGERLY,
            intercepted(model, [plan.spec], recorder),
            suppress(_DoneError),
        ):
            call(model, inputs)
    return {number: recorder.values.get(number, given.get(number)) for number in plan.needed}  # type: ignore[misc]


def check_cached_values(
    model: nn.Module, plan: Plan, inputs: object, values: Mapping[int, Tensor]
) -> None:
    """Checks that the first modules still return the cached values, in train mode too.

    Raises:
        InjectionError: A value differs.
    """
    with restored(model):
        for training in (False, True, True):
            _set_training(model, training)
            today = values_for(model, plan, inputs)
            # Missing tensors are reported when the model runs.
            found = {number: today[number] for number in values if today[number] is not None}
            if other := [
                number for number, value in found.items() if not _are_near(values[number], value)
            ]:
                raise InjectionError(
                    f"The {plan.forms[other[0]].name} differs from the cached value of the same "
                    "sample: a module, a forward or a hook before the adapters was changed since. "
                    "Compute the features again."
                )


def continued(
    model: nn.Module, plan: Plan, sets: Iterable[SetSpec], values: Mapping[int, Tensor], rows: int
) -> Any:
    """Returns a model's output from cached values, or the `NeededError` of missing values.

    Args:
        model: The unwrapped model.
        plan: The plan.
        sets: The set of the plan, and last the active set.
        values: The cached values, by number.
        rows: Number of samples.
    """
    sets = list(sets)
    replay = _Replay(plan, values, rows)
    replay.start(sets[-1].name)
    try:
        with intercepted(model, sets, replay):
            return call(model, replay.fill(plan.inputs))
    except NeededError as needed:
        return needed


def _check_only_tensors(value: object, what: str) -> None:
    """Refuses a value that may hide tensors in unknown types.

    Raises:
        InjectionError: The value contains anything but tensors, dicts, lists, tuples, numbers and
            strings.
    """
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            _check_only_tensors(item, what)
    elif not isinstance(value, Tensor | int | float | str | None):
        raise InjectionError(
            f"The {what} contains {type(value).__name__}, but only tensors in dicts and lists can "
            "be cached."
        )


def _check_repeats(model: nn.Module, spec: SetSpec, inputs: object, once: _Recorder) -> None:
    """Refuses first modules whose output differs in train mode, on repetition or by batch."""
    _set_training(model, True)
    runs = [_run_again(model, spec, inputs, once) for _ in range(2)]
    _set_training(model, False)
    alone = _run_again(
        model, spec, map_tensors(inputs, lambda tensor: tensor[:1].expand_as(tensor).clone()), once
    )
    numbers = count(min(once.values))
    for place, output in once.calls:
        for _, _tensor in named_in(output):
            number = next(numbers)
            if not all(
                number in run and same_bits(once.values[number], run[number]) for run in runs
            ):
                raise InjectionError(
                    f"Module {place!r} returns something else in train mode than in eval mode, or "
                    "is random (dropout?), so its output cannot be cached. Set its probability to "
                    "zero, or put an adapter before it."
                )
            if not _is_near(once.values[number], alone.get(number)):
                raise InjectionError(
                    f"Module {place!r} returns something else for a sample in another batch (a "
                    "norm without running statistics?), so its output cannot be cached. Put an "
                    "adapter before it."
                )


def _run_again(
    model: nn.Module, spec: SetSpec, inputs: object, once: _Recorder
) -> dict[int, Tensor]:
    """Returns the outputs of the first modules in another run."""
    again = _Recorder(min(once.values), len(once.calls))
    again.start(spec.name)
    with intercepted(model, [spec], again), suppress(_DoneError):
        call(model, inputs)
    return again.values


def _is_near(batch: Tensor, other: Tensor | None) -> bool:
    """Tells whether the first rows of two batches are equal up to rounding."""
    return (
        other is not None
        and batch.ndim > 0
        and batch.shape == other.shape
        and _are_near(batch[:1], other[:1])
    )


def _are_near(one: Tensor, other: Tensor) -> bool:
    """Tells whether two tensors are equal up to rounding."""
    if one.shape != other.shape or not one.is_floating_point():
        return torch.equal(one, other)
    allowed = torch.finfo(one.dtype).eps ** 0.5 * float(one.abs().max()) if one.numel() else 0.0
    return torch.allclose(one.double(), other.double(), rtol=0.0, atol=allowed, equal_nan=True)


def _set_training(model: nn.Module, training: bool) -> None:
    for _, module in backbone_modules(model):
        module.training = training
