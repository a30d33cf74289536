"""Wrong arguments of any kind get an error of the library's own, and change nothing."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from support import images, picture, small_net
from torch import nn
from torch.utils.data import TensorDataset

import resadapt

X = images(2, 8)


class Meta(nn.Module):
    """Looks like a module and has nothing."""


def scripted() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 1)))


def traced() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(nn.Sequential(nn.Conv2d(3, 4, 1)), X)


class Odd:
    """Compares with nothing, and has no length that can be told."""

    def __eq__(self, other: object) -> Any:
        raise RuntimeError("no comparing")

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return "Odd()"


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 100),
    st.integers(2**40, 2**70),  # sizes that no memory has, not ones that are only very large
    st.floats(),
    st.text(max_size=4),
    st.binary(max_size=4),
    st.sampled_from(["c2", "head", "default", "*", "", "conv.weight", "a.b", "\0", "resadapt"]),
    st.lists(st.one_of(st.none(), st.integers(), st.text(max_size=3), st.just("c2")), max_size=3),
    st.dictionaries(
        st.one_of(st.text(max_size=3), st.integers(), st.just("c2")),
        st.one_of(st.none(), st.integers()),
        max_size=2,
    ),
    st.tuples(st.integers(), st.none()),
    st.sampled_from([torch.int8, torch.float16, torch.float8_e4m3fn, torch.complex64]),
    st.sampled_from(
        [
            object(),
            Odd(),
            int,
            len,
            1j,
            ...,
            {1, 2},
            range(3),
            np.zeros(2),
            np.float32(0.5),
            Path("x"),
        ]
    ),
    st.builds(lambda: torch.zeros(1)),
    st.builds(lambda: torch.zeros(2, 3, 8, 8, dtype=torch.int64)),
    st.builds(lambda: torch.zeros(2, 3, 8, 8).to_sparse()),
    st.builds(lambda: torch.zeros(2, 3, 8, 8, device="meta")),
    st.builds(lambda: torch.zeros(2, 3, 8, 8, dtype=torch.complex128)),
    st.builds(lambda: nn.ReLU()),
    st.builds(lambda: {"x": torch.zeros(2, 3, 8, 8)}),
)
MODELS = st.one_of(
    ANYTHING,
    st.builds(scripted),
    st.builds(traced),
    st.builds(nn.Sequential),
    st.builds(Meta),
    st.builds(lambda: nn.LazyLinear(3)),
)


def mixed(model: Any, names: Any) -> None:
    with resadapt.adapters_for(model, names):
        pass


OPTIONS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "inject": (
        resadapt.inject_adapters,
        (
            "layers",
            "bottleneck",
            "family",
            "name",
            "head",
            "norm",
            "dropout",
            "example_input",
            "channel_dim",
            "dtype",
            "init",
            "gamma",
        ),
    ),
    "remove": (resadapt.remove_adapters, ("name", "keep_head")),
    "activate": (resadapt.set_active_adapters, ("name",)),
    "groups": (
        resadapt.parameter_groups,
        ("lr", "head_lr", "norm_lr", "weight_decay", "decay_bias", "by_ndim"),
    ),
    "state": (resadapt.adapter_state_dict, ("name",)),
    "load state": (resadapt.load_adapter_state_dict, ("state_dict", "name")),
    "load training": (resadapt.load_training_state_dict, ("state",)),
    "save": (
        resadapt.save_adapters,
        (
            "path",
            "name",
            "probe",
            "metric",
            "tolerance",
            "metadata",
            "verify",
            "rebuild",
            "autocast",
        ),
    ),
    "load": (resadapt.load_adapters, ("path", "name", "head")),
    "verify": (
        resadapt.verify_adapters,
        ("path", "probe", "metric", "tolerance", "rebuild", "autocast"),
    ),
    "inference copy": (
        resadapt.inference_copy,
        ("name", "dtype", "memory_format", "fold"),
    ),
    "fold": (resadapt.fold_adapters, ("name",)),
    "combine": (resadapt.combine_adapters, ("weights", "name", "sum_of")),
    "mix": (mixed, ("names",)),
    "forward all": (resadapt.forward_all, ("names",)),
    "cache": (resadapt.cache_prefix, ("data", "batch_size", "num_workers", "variants", "progress")),
    "estimate": (resadapt.estimate_training, ("input_shape", "autocast")),
    "suggest": (
        resadapt.suggest_layers,
        ("budget", "family", "layers", "flops", "example_input", "channel_dim", "init", "gamma"),
    ),
}
NEEDED = {
    "groups": {"lr": 0.1},
    "load state": {"state_dict": {}},
    "load training": {"state": {}},
    "activate": {"name": None},
    "inject": {"layers": "c2"},
    "combine": {"weights": {"default": 1}, "name": "sum"},
    "mix": {"names": [None]},
    "forward all": {"inputs": X},
    "cache": {"data": TensorDataset(X)},
    "estimate": {"input_shape": (2, 3, 8, 8)},
    "suggest": {"budget": 100, "layers": "c2"},
}
TAKE_A_MODEL_ONLY = (
    resadapt.optimize_backbone,
    resadapt.restore_backbone,
    resadapt.summary,
    resadapt.count_parameters,
    resadapt.list_adapters,
    resadapt.check_backbone,
    resadapt.accept_backbone,
    resadapt.training_state_dict,
    resadapt.named_trainable_parameters,
    resadapt.trainable_parameters,
    lambda model: resadapt.adapters_disabled(model).__enter__(),
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "set.pt"
    resadapt.save_adapters(resadapt.inject_adapters(small_net(), "c2", 2, head="head"), path)
    return path


@pytest.mark.parametrize(
    ("call", "argument"), [(call, each) for call, (_, names) in OPTIONS.items() for each in names]
)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(value=ANYTHING)
def test_any_value_for_any_argument(
    call: str,
    argument: str,
    value: Any,
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assume(
        not (argument in ("metric", "rebuild", "progress") and callable(value))
    )  # what those raise is theirs
    assume(
        not (argument == "path" and isinstance(value, str | bytes) and "/" in os.fsdecode(value))
    )
    assume(not (argument == "num_workers" and type(value) is int and 2 < value < 2**40))  # slow
    monkeypatch.chdir(tmp_path)  # where a path of any other text leads
    function, names = OPTIONS[call]
    arguments = dict(NEEDED.get(call, {}))
    if "path" in names:
        arguments["path"] = tmp_path / "new.pt" if call == "save" else saved
    arguments[argument] = value
    model = small_net()
    if call not in ("inject", "load"):
        resadapt.inject_adapters(model, "c2", 2, head="head")
    content = {path: path.read_bytes() for path in tmp_path.iterdir()}
    before = picture(model)
    try:
        function(model, **arguments)
    except resadapt.AdapterError as error:
        assert len(str(error)) > 20, "it says what, where and the mend"
        assert picture(model) == before
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == content


@pytest.mark.parametrize("call", [*OPTIONS, *TAKE_A_MODEL_ONLY])
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(model=MODELS)
@example(model=scripted())
@example(model=traced())
def test_anything_for_a_model(call: Any, model: Any, saved: Path, tmp_path: Path) -> None:
    function, names = OPTIONS.get(call, (call, ())) if isinstance(call, str) else (call, ())
    arguments = dict(NEEDED.get(call, {})) if isinstance(call, str) else {}
    if "path" in names:
        arguments["path"] = tmp_path / "new.pt" if call == "save" else saved
    try:
        function(model, **arguments)
    except resadapt.AdapterError as error:
        assert len(str(error)) > 20
    assert not list(tmp_path.iterdir())


@settings(max_examples=60, deadline=None)
@given(
    state=st.dictionaries(
        st.one_of(st.text(max_size=5), st.integers(), st.none(), st.just("head.head.bias")),
        ANYTHING,
        max_size=3,
    )
)
def test_any_state_dict(state: Any) -> None:
    model = resadapt.inject_adapters(small_net(), "c2", 2, head="head")
    before = picture(model)
    with pytest.raises(resadapt.AdapterKeyError):
        resadapt.load_adapter_state_dict(
            model, {**resadapt.adapter_state_dict(model), **state} if state else {}
        )
    assert picture(model) == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m, p: resadapt.inject_adapters(m, {3: 4}),
            r"layers takes names of modules, found 3 \(int\)",
        ),
        (
            lambda m, p: resadapt.inject_adapters(m, "c2", name=["a"]),
            r"name=\['a'\] is list, not a string",
        ),
        (
            lambda m, p: resadapt.inject_adapters(m, "c2", family=["pooled"]),
            r"family=\['pooled'\] is list, not a string",
        ),
        (
            lambda m, p: resadapt.inject_adapters(m, "c2", norm={}),
            r"norm=\{\} is dict, not a string",
        ),
        (lambda m, p: resadapt.inject_adapters(m, "c2", dropout=True), r"dropout=True is bool"),
        (
            lambda m, p: resadapt.save_adapters(injected(m), p, probe=3),
            r"cannot be called with probe=: ",
        ),
        (
            lambda m, p: resadapt.save_adapters(injected(m), p, probe=torch.zeros(2)),
            r"cannot be called with probe=: RuntimeError",
        ),
        (
            lambda m, p: resadapt.save_adapters(injected(m), p, probe={"y": X}),
            r"cannot be called with probe=: TypeError",
        ),
        (
            lambda m, p: resadapt.save_adapters(injected(m), p, metric=3),
            r"metric is int: give a function",
        ),
        (
            lambda m, p: resadapt.save_adapters(injected(m), p, metric=lambda m: 10**400),
            r"metric returned int, not a number",
        ),
        (
            lambda m, p: resadapt.save_adapters(injected(m), p, metadata=np.zeros(2)),
            r"metadata is ndarray",
        ),
        (
            lambda m, p: resadapt.save_adapters(injected(m), p, metadata={"a": np.zeros(2)}),
            r"metadata is not JSON",
        ),
        (lambda m, p: resadapt.save_adapters(injected(m), p, name=["a"]), r"name=\['a'\] is list"),
        (lambda m, p: resadapt.load_adapters(m, "a\0b"), r"cannot be read"),
        (lambda m, p: resadapt.load_adapter_state_dict(injected(m), {3: X}), r"'3' is unexpected"),
        (
            lambda m, p: resadapt.inject_adapters(scripted(), "0", 2),
            r"The model is compiled TorchScript",
        ),
        (lambda m, p: resadapt.summary("m"), r"model is str, not a torch.nn.Module"),
        (
            lambda m, p: resadapt.parameter_groups(injected(m), "0.1"),
            r"lr='0.1': pass a number >= 0",
        ),
    ],
)
def test_what_the_error_says(call: Any, message: str, path: Path) -> None:
    with pytest.raises(resadapt.AdapterError, match=message):
        call(small_net(), path)
    assert not path.exists()


def injected(model: Any) -> Any:
    return resadapt.inject_adapters(model, "c2", 2)
