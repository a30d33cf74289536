"""Files of format 3 as resadapt 0.2 wrote them are read and give the outputs that they gave then.

What wrote them is in this file, too; with the sources of version 0.2:

    PYTHONPATH=<its src> python tests/files/test_format_3.py tests/files/data

Weights are given by a formula, so that they are the same on every machine.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import resadapt

DATA = Path(__file__).parent / "data"
X = (torch.arange(2 * 3 * 8 * 8) % 5 / 4).reshape(2, 3, 8, 8)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.c2, self.head = nn.Conv2d(4, 4, 1), nn.Linear(4, 2)

    def features(self, x: Tensor) -> Tensor:
        return self.c2(torch.relu(self.bn(self.conv(x)))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Listed(Small):
    """Calls a module inside its ModuleList, and never the list."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Identity()
        self.heads = nn.ModuleList([nn.Linear(4, 2)])

    def forward(self, x: Tensor) -> Tensor:
        return self.heads[0](self.features(x))


class RowDrop(nn.Module):
    """Stochastic depth under a name of its own, which version 0.2 recorded."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        return x * torch.bernoulli(torch.full((len(x), 1, 1, 1), 1 - self.rate))

    def extra_repr(self) -> str:
        return f"p={self.rate}"


class Dropped(Small):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.c2 = nn.Sequential(RowDrop(rate), self.c2, RowDrop(rate))


def small() -> Any:
    return by_formula(Small())


def listed() -> Any:
    return by_formula(Listed())


def dropped(rate: float = 0.25) -> Any:
    return by_formula(Dropped(rate))


def by_formula(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for number, tensor in enumerate(model.state_dict().values()):
            if tensor.is_floating_point():
                steps = (torch.arange(tensor.numel()) * 5 + 3 * number) % 7 + 1
                tensor.copy_(steps.reshape(tensor.shape) / 8)
    return model.eval()


class Case(NamedTuple):
    build: Callable[[], Any]
    arguments: dict[str, Any]
    outputs: list[list[float]]
    """What version 0.2 returned for X."""


CASES = {
    "small": Case(
        small,
        {
            "layers": "c2",
            "bottleneck": 2,
            "family": "lora",
            "norm": "affine+stats",
            "head": {"head": nn.Linear(4, 5)},
        },
        [
            [20.436523, 24.616505, 28.796486, 21.537979, 25.717960],
            [20.474154, 24.661589, 28.849026, 21.577618, 25.765053],
        ],
    ),
    "listed": Case(
        listed,
        {"layers": "conv", "bottleneck": 2, "head": "heads"},
        [[43.862603, 30.619904], [43.950256, 30.680307]],
    ),
    "dropped": Case(
        dropped,
        {"layers": "conv", "bottleneck": 2},
        [[45.963749, 53.357395], [46.055223, 53.464737]],
    ),
}


FILES = pytest.mark.parametrize("suffix", ["pt", "safetensors"])


@FILES
@pytest.mark.parametrize("name", CASES)
def test_files_of_version_0_2_give_what_they_gave(name: str, suffix: str, tmp_path: Path) -> None:
    case, path = CASES[name], DATA / f"format_3_{name}.{suffix}"
    info = resadapt.read_adapter_info(path)
    assert (info.format_version, info.metadata) == (3, {"made by": "resadapt 0.2.0"})
    plain = case.build()(X)
    model = resadapt.load_adapters(case.build(), path).eval()
    torch.testing.assert_close(model(X), torch.tensor(case.outputs), rtol=1e-5, atol=1e-5)
    report = resadapt.verify_adapters(model, path, probe=X, rebuild=case.build)
    not_passed = {check.name for check in report.checks if check.outcome != "passed"}
    assert not_passed == {"metric"}, report
    with resadapt.adapters_disabled(model):
        assert torch.equal(model(X), plain)
    other = case.build()
    other.bn.running_var[0] += 1
    with pytest.raises(resadapt.BackboneMismatchError, match=r"'bn\.running_var'"):
        resadapt.load_adapters(other, path)
    again = tmp_path / path.name
    resadapt.save_adapters(model, again, probe=X)
    assert resadapt.read_adapter_info(again).tensors == info.tensors


@FILES
def test_a_set_of_version_0_2_is_what_was_injected(suffix: str) -> None:
    found = resadapt.read_adapter_info(DATA / f"format_3_small.{suffix}").set
    assert (found.family, found.norm, found.head) == ("lora", "affine+stats", ("head",))
    assert (found.norms, list(found.blueprints)) == (("bn",), ["head"])
    assert [(site.name, site.bottleneck) for site in found.sites] == [("c2", 2)]
    listed = resadapt.read_adapter_info(DATA / f"format_3_listed.{suffix}").set
    assert (listed.head, listed.blueprints) == (("heads",), {})


@FILES
def test_records_of_what_has_no_effect_in_evaluation_do_not_count(suffix: str) -> None:
    """Version 0.2 recorded such modules, and whether norms track statistics."""
    path = DATA / f"format_3_dropped.{suffix}"
    recorded = resadapt.read_adapter_info(path).backbone.modules
    assert recorded["c2"].config == {"order": ["0", "1", "2"]}
    assert recorded["c2.0"].config == {"extra_repr": "p=0.25"}
    assert recorded["bn"].config["track_running_stats"] is True
    other = dropped()
    other.bn.track_running_stats = False
    model = resadapt.load_adapters(other, path).eval()
    assert model(X).tolist() == resadapt.load_adapters(dropped(), path).eval()(X).tolist()
    with pytest.raises(
        resadapt.BackboneMismatchError,
        match=r"2 tensors .*'c2\.0' has extra_repr p=0\.5 where p=0\.25 was recorded",
    ):
        resadapt.load_adapters(dropped(rate=0.5), path)
    swapped = dropped()
    swapped.c2[2] = nn.Tanh()
    with pytest.raises(resadapt.BackboneMismatchError, match=r"'c2\.2' is Tanh where RowDrop was"):
        resadapt.load_adapters(swapped, path)


def write(folder: Path) -> None:
    for name, case in CASES.items():
        model = resadapt.inject_adapters(case.build(), **case.arguments)
        state = resadapt.adapter_state_dict(model)
        for number, (key, tensor) in enumerate(state.items()):
            if tensor.is_floating_point():
                steps = (torch.arange(tensor.numel()) * 3 + number) % 11 + 1
                state[key] = steps.reshape(tensor.shape).to(tensor.dtype) / 16
        resadapt.load_adapter_state_dict(model, state)
        for suffix in ("pt", "safetensors"):
            report = resadapt.save_adapters(
                model.eval(),
                folder / f"format_3_{name}.{suffix}",
                probe=X,
                metadata={"made by": f"resadapt {resadapt.__version__}"},
                rebuild=case.build,
            )
            assert report["recorded outputs"].outcome == "passed", report
        print(name, model(X).tolist())
        with resadapt.adapters_disabled(model):
            print("plain", model(X).tolist())


if __name__ == "__main__":
    write(Path(sys.argv[1]))
