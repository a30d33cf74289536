"""Running a model from what its first modules returned, those that come before anything of a set's own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from resadapt.base.errors import AdapterError, InjectionError, quote_names
from resadapt.base.inputs import map_tensors, named_in
from resadapt.base.spec import SetSpec
from resadapt.base.tensors import same_bits
from resadapt.base.undisturbed import EAGERLY, call, restored
from resadapt.injection.intercept import CallInterceptor, intercepted
from resadapt.injection.walk import backbone_modules
from resadapt.lean.stand_in import Form, MetaStandIn, NeededError

__all__ = ["Plan", "check_cached_values", "continued", "plan_for", "values_for"]


class _DoneError(Exception):
    """All that was wanted has been computed."""


@dataclass(frozen=True)
class Plan:
    """How a model is run from what its first modules returned.

    Args:
        spec: The set that it was made for.
        inputs: The model's inputs, without elements.
        calls: The modules that are called before anything of the set's own, with what they return,
            without elements.
        forms: Of the tensors in inputs and calls, numbered in this order.
        needed: Numbers of the tensors that are used after that.
    """

    spec: SetSpec
    inputs: Any
    calls: tuple[tuple[str, Any], ...]
    forms: tuple[Form, ...]
    needed: tuple[int, ...]


class _Recorder(CallInterceptor):
    """Keeps what the first modules return.

    Args:
        stop: How many calls; None for all.
        wanted: Numbers of the tensors that are kept; None for all.
        first: Number of the first tensor.
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
        """Runs the module."""
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
    """Has the first modules return what they once did, without running them."""

    def __init__(self, plan: Plan, values: Mapping[int, Tensor], rows: int) -> None:
        super().__init__()
        self._plan, self._values, self._rows, self._number = plan, values, rows, count()
        self._at = next((tensor.device for tensor in values.values()), torch.device("cpu"))

    def fill(self, value: Any) -> Any:
        """Returns a value with tensors in it, with elements where they are there."""
        return map_tensors(value, self._tensor)

    @override
    def call(self, place: str, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Returns what is known."""
        calls = self._plan.calls
        if self.position >= len(calls):  # of a set that parts later
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


def plan_for(model: nn.Module, spec: SetSpec, inputs: object) -> Plan:
    """Finds out what a model needs of its first modules to be run without them, and tries it.

    Args:
        model: The unwrapped model, whose active set this is.
        spec: The set.
        inputs: A few samples.

    Raises:
        InjectionError: Nothing comes before the set, the first modules are random, or the model
            cannot be run without them.
        AdapterError: The model does not take the samples.
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
        except Exception as error:  # a model of anyone's may raise anything
            raise AdapterError(
                f"The model does not take what the data give: {type(error).__name__}: {error}."
            ) from error
        if not recorder.calls or not recorder.parted:
            what = "Nothing comes before" if recorder.parted else "The model did not run"
            raise InjectionError(
                f"{what} the adapters, norms and head of the set {spec.name!r}: there are no "
                "features to keep."
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
                    "kept."
                )
            plan = replace(plan, needed=tuple(sorted({*plan.needed, *found.numbers})))
    if ragged := [forms[number].name for number in plan.needed if not forms[number].has_rows]:
        raise InjectionError(
            f"The model needs the {quote_names(ragged)}, which has no row for each sample. Its "
            "features cannot be kept."
        )
    one, other = ([tensor for _, tensor in named_in(value)] for value in (expected, found))
    if len(one) != len(other) or not all(map(same_bits, one, other)):
        raise InjectionError(
            "From its features the model gives another output: it changes what its first modules "
            "return in place, or is random in evaluation too. Its features cannot be kept."
        )
    return plan


def values_for(model: nn.Module, plan: Plan, inputs: object) -> dict[int, Tensor]:
    """Returns the tensors that a model needs of its first modules for a batch.

    Nothing behind them is run.
    """
    given = dict(enumerate(tensor for _, tensor in named_in(inputs)))
    owner = [number for number, (_, output) in enumerate(plan.calls) for _ in named_in(output)]
    behind = [owner[number - len(given)] for number in plan.needed if number >= len(given)]
    recorder = _Recorder(len(given), max(behind, default=-1) + 1, plan.needed)
    recorder.start(plan.spec.name)
    if behind:
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
    """Looks whether the first modules still return what they once did, in training too.

    Raises:
        InjectionError: They do not.
    """
    with restored(model):
        for training in (False, True, True):
            _set_training(model, training)
            today = values_for(model, plan, inputs)
            found = {
                number: today[number] for number in values if today[number] is not None
            }  # others are missed when it goes on
            if other := [
                number for number, value in found.items() if not _are_near(values[number], value)
            ]:
                raise InjectionError(
                    f"The {plan.forms[other[0]].name} is another one than was kept for the same "
                    "sample: a module, a forward or a hook before the adapters was changed since. "
                    "Make the features anew."
                )


def continued(
    model: nn.Module, plan: Plan, sets: Iterable[SetSpec], values: Mapping[int, Tensor], rows: int
) -> Any:
    """Returns a model's output for what its first modules returned; an exception if it needs more
    of that.

    Args:
        model: The unwrapped model.
        plan: How.
        sets: The set of the plan, and the active one, which comes last.
        values: The tensors that are needed, by number.
        rows: Number of samples.
    """
    sets = list(sets)
    given = _Replay(plan, values, rows)
    given.start(sets[-1].name)
    try:
        with intercepted(model, sets, given):
            return call(model, given.fill(plan.inputs))
    except NeededError as needed:
        return needed


def _check_only_tensors(value: object, what: str) -> None:
    """Refuses a value that may have tensors in it where nobody sees them.

    Raises:
        InjectionError: It has something in it besides tensors, dicts, lists, tuples, numbers and
            texts.
    """
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            _check_only_tensors(item, what)
    elif not isinstance(value, Tensor | int | float | str | None):
        raise InjectionError(
            f"The {what} has {type(value).__name__} in it, where only tensors in dicts and lists "
            "can be kept."
        )


def _check_repeats(model: nn.Module, spec: SetSpec, inputs: object, once: _Recorder) -> None:
    """Refuses first modules that do not return the same in training, where they must, or in another batch."""
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
                    f"Module {place!r} is not the same in training as in evaluation, or not twice "
                    "the same (dropout?), so its output cannot be kept. Set its probability to "
                    "zero, or put an adapter before it."
                )
            if not _is_near(once.values[number], alone.get(number)):
                raise InjectionError(
                    f"Module {place!r} returns something else for a sample in another batch (a "
                    "norm without running statistics?), so its output cannot be kept. Put an "
                    "adapter before it."
                )


def _run_again(
    model: nn.Module, spec: SetSpec, inputs: object, once: _Recorder
) -> dict[int, Tensor]:
    """Returns what the first modules return another time."""
    again = _Recorder(min(once.values), len(once.calls))
    again.start(spec.name)
    with intercepted(model, [spec], again), suppress(_DoneError):
        call(model, inputs)
    return again.values


def _is_near(batch: Tensor, other: Tensor | None) -> bool:
    """Tells whether the first rows of two batches are the same, up to rounding."""
    return (
        other is not None
        and batch.ndim > 0
        and batch.shape == other.shape
        and _are_near(batch[:1], other[:1])
    )


def _are_near(one: Tensor, other: Tensor) -> bool:
    """Tells whether two tensors are the same, up to rounding."""
    if one.shape != other.shape or not one.is_floating_point():
        return torch.equal(one, other)
    allowed = torch.finfo(one.dtype).eps ** 0.5 * float(one.abs().max()) if one.numel() else 0.0
    return torch.allclose(one.double(), other.double(), rtol=0.0, atol=allowed, equal_nan=True)


def _set_training(model: nn.Module, training: bool) -> None:
    for _, module in backbone_modules(model):
        module.training = training
