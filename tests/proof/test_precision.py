"""The proof of a file under autocast, in half precision, and inside an autocast region."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support import images, train
from torch import Tensor, nn
from verifying import X, net, outcomes

import resadapt
from resadapt.base.autocast import check_autocast
from resadapt.files.adapter_file import read_adapter_file
from resadapt.files.container import decode
from resadapt.proof.probe import Probe, ProbeRun, compare_with_record, record_probe

HALVES = [torch.bfloat16, torch.float16]
BF16 = torch.bfloat16


def region(dtype: torch.dtype = BF16) -> torch.autocast:
    return torch.autocast("cpu", dtype)


def dtypes_of(seen: list[Any]) -> Any:
    """A metric that notes the precision that it runs in."""

    def metric(model: nn.Module) -> float:
        output = model(X)
        seen.append(output.dtype)
        return output.double().square().mean().item()

    return metric


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rebuild", [None, net])
def test_probe_and_metric_run_under_autocast(
    model: nn.Module, dtype: torch.dtype, rebuild: Any, path: Path
) -> None:
    seen: list[Any] = []
    arguments: Any = {"probe": X, "metric": dtypes_of(seen), "rebuild": rebuild}
    report = resadapt.save_adapters(model, path, autocast=dtype, **arguments)
    checked = ("outputs", "recorded outputs", "metric")
    name = str(dtype).removeprefix("torch.")
    for line in checked:
        assert report[line].outcome == "passed"
        assert report[line].detail.endswith(f", under autocast to {name}")
    assert seen == [dtype] * 2

    info, stored = read_adapter_file(path)
    assert (info.format_version, info.probe.autocast) == (4, name)
    with torch.no_grad(), region(dtype):
        assert torch.equal(stored["probe.output"], model.eval()(X).flatten())

    # Later, in the recorded precision.
    later = resadapt.verify_adapters(model, path, **arguments)
    assert [later[line] for line in checked] == [report[line] for line in checked]
    assert seen == [dtype] * 4
    plain = resadapt.verify_adapters(net(), path, probe=X)
    assert plain["recorded outputs"] == report["recorded outputs"]


def test_another_precision_than_the_recorded_one(model: nn.Module, path: Path) -> None:
    """Recorded outputs are compared in the recorded precision, and the report says so."""
    seen: list[Any] = []
    resadapt.save_adapters(model, path, autocast=BF16)
    assert "autocast" in decode(path.read_bytes(), path)[0]["probe"]
    report = resadapt.verify_adapters(model, path, autocast=torch.float16, metric=dtypes_of(seen))
    assert seen == [torch.float16] * 2
    for line, name in (("outputs", "float16"), ("metric", "float16")):
        assert report[line].detail.endswith(f", under autocast to {name}")
    assert report["recorded outputs"].detail == (
        "largest relative difference 0.0e+00, under autocast to bfloat16"
    )

    resadapt.save_adapters(model, path)
    manifest = decode(path.read_bytes(), path)[0]
    assert manifest["format_version"] == 3, "resadapt 0.2 reads it"
    assert "autocast" not in manifest["probe"]
    report = resadapt.verify_adapters(model, path, autocast=BF16)
    assert report["outputs"].detail.endswith(", under autocast to bfloat16")
    assert report["recorded outputs"].detail == (
        "largest relative difference 0.0e+00, without autocast"
    )
    assert "autocast" not in str(resadapt.verify_adapters(model, path))


def test_a_region_does_not_decide_the_precision_of_the_proof(model: nn.Module, path: Path) -> None:
    seen: list[Any] = []
    metric = dtypes_of(seen)
    with region():
        reports = [
            resadapt.save_adapters(model, path, metric=metric),
            resadapt.verify_adapters(model, path, metric=metric),
        ]
        assert model(X).dtype == BF16, "the region goes on"
    assert seen == [torch.float32] * 4
    for report in reports:
        for line in ("outputs", "recorded outputs", "metric"):
            assert report[line].outcome == "passed"
            assert report[line].detail.endswith(", without autocast")
    assert resadapt.verify_adapters(model, path)["recorded outputs"].outcome == "passed"


def test_the_proof_does_not_use_casts_of_a_region(model: nn.Module, path: Path) -> None:
    """They may be of values that an optimizer has changed since."""
    with region():
        model.eval()(X)
        with torch.no_grad():
            for parameter in resadapt.trainable_parameters(model):
                parameter.add_(1)
        seen: list[Any] = []
        report = resadapt.save_adapters(model, path, autocast=BF16, metric=dtypes_of(seen))
        assert report["outputs"].outcome == report["metric"].outcome == "passed"
        # A metric with a region of its own, too.
        assert resadapt.save_adapters(
            model, path, metric=lambda m: region()(m)(X).float().mean().item()
        ).ok


@pytest.mark.parametrize(
    "autocast",
    ["bfloat16", 16, True, torch.float32, torch.float64, torch.int8, torch.float8_e5m2, {}],
)
def test_an_unsuitable_precision_is_an_error_before_anything_happens(
    model: nn.Module, autocast: Any, path: Path
) -> None:
    def unused(_model: nn.Module) -> float:
        raise AssertionError("the metric ran")

    path.write_bytes(b"before")
    for call in (resadapt.save_adapters, resadapt.verify_adapters):
        with pytest.raises(resadapt.AdapterError, match=r"autocast=.*: give torch\.bfloat16 or"):
            call(model, path, metric=unused, autocast=autocast)
    assert path.read_bytes() == b"before"


def test_a_device_without_autocast_is_named() -> None:
    with pytest.raises(resadapt.AdapterError, match="not supported on the device 'meta'"):
        check_autocast(BF16, {"meta"})
    if not torch.cuda.is_available():
        with (
            pytest.warns(UserWarning, match="CUDA is not available"),
            pytest.raises(resadapt.AdapterError, match="on the device 'cuda': torch turns"),
        ):
            check_autocast(BF16, {"cuda"})
    assert not torch.is_autocast_enabled("cuda")


def test_recorded_outputs_allow_for_the_rounding_of_autocast() -> None:
    """Outputs may be float32 though they were computed in half precision."""
    outputs = {"output": X}
    rounded = {"output": X * 1.01}
    for autocast, ok in ((None, False), (torch.float16, True), (BF16, True)):
        kept, stored = record_probe(ProbeRun(Probe(X, autocast=autocast), outputs))
        assert kept is not None
        assert compare_with_record(kept, stored, rounded)[1] is ok
        assert not compare_with_record(kept, stored, {"output": X * 1.2})[1]


def test_a_converted_model_is_saved_and_loaded_on_purpose(model: nn.Module, tmp_path: Path) -> None:
    full, half = tmp_path / "full.pt", tmp_path / "half.pt"
    resadapt.save_adapters(model, full)
    backbone = net().bfloat16()
    with pytest.raises(resadapt.BackboneMismatchError) as mismatch:
        resadapt.load_adapters(backbone, full)
    for part in (
        "is bfloat16 where float32 was recorded",
        "Load the file into the backbone in float32, with its original weights.",
        "To use it in bfloat16, then convert the whole model, for example by model.bfloat16(), "
        "and call accept_backbone(model).",
    ):
        assert part in str(mismatch.value)

    # What the message says.
    converted = resadapt.load_adapters(net(), full).bfloat16()
    assert not resadapt.check_backbone(converted).ok
    with pytest.raises(resadapt.BackboneDriftError, match="converted from float32 to bfloat16"):
        resadapt.save_adapters(converted, half)
    resadapt.accept_backbone(converted)
    report = resadapt.save_adapters(converted, half, rebuild=lambda: net().bfloat16())
    assert report.ok
    assert report["outputs"].outcome == "passed"
    loaded = resadapt.load_adapters(backbone, half)
    assert torch.equal(loaded.eval()(X.to(BF16)), converted.eval()(X.to(BF16)))
    with pytest.raises(resadapt.BackboneMismatchError, match="into the backbone in bfloat16"):
        resadapt.load_adapters(net(), half)


def test_a_conversion_hides_no_other_difference(model: nn.Module, path: Path) -> None:
    resadapt.save_adapters(model, path)
    other = net().bfloat16()
    other.conv.weight = nn.Parameter(net().conv.weight.detach() + 1)
    with pytest.raises(resadapt.BackboneMismatchError, match="Build the same backbone"):
        resadapt.load_adapters(other, path)
    model.bfloat16()
    model.bn.eps = 1.0
    with pytest.raises(resadapt.BackboneDriftError, match="Keep the backbone frozen"):
        resadapt.save_adapters(model, path)


def _loaded(model: nn.Module, _path: Path) -> None:
    state = {key: t + 1 for key, t in resadapt.adapter_state_dict(model).items()}
    resadapt.load_adapter_state_dict(model, state)


def _loaded_from_a_file(model: nn.Module, path: Path) -> None:
    other = copy.deepcopy(model)
    _loaded(other, path)
    resadapt.save_adapters(other, path)
    resadapt.load_adapters(model, path)


def _combined(model: nn.Module, _path: Path) -> None:
    resadapt.combine_adapters(model, {"default": 3.0}, "sum")
    resadapt.set_active_adapters(model, "sum")


def _restored(model: nn.Module, path: Path) -> None:
    """A metric trains the set, inside a region of its own, and is undone."""

    def trains(live: nn.Module) -> float:
        with torch.enable_grad():
            train(live, torch.optim.SGD(live.parameters(), lr=1.0))
        with region():
            return live(X).float().mean().item()

    with pytest.raises(resadapt.VerificationError, match="was changed, and is restored"):
        resadapt.save_adapters(model, path, metric=trains)


def _removed(model: nn.Module, path: Path) -> None:
    _loaded(model, path)
    resadapt.remove_adapters(model, keep_head=True)


def _accepted(model: nn.Module, path: Path) -> None:
    _loaded(model, path)
    resadapt.accept_backbone(model)


def _injected_again(model: nn.Module, path: Path) -> None:
    resadapt.save_adapters(model, path)
    resadapt.remove_adapters(model)
    with torch.no_grad():
        model.conv.weight.mul_(1)  # trainable again, and not changed
    resadapt.load_adapters(model, path)


@pytest.mark.parametrize(
    "change",
    [_loaded, _loaded_from_a_file, _combined, _restored, _removed, _accepted, _injected_again],
)
def test_a_region_runs_with_the_values_of_now(model: nn.Module, change: Any, path: Path) -> None:
    model.eval()
    with region():
        model(X).sum().backward()  # autocast keeps casts of the trained weights
        change(model, path)
        now = model.eval()(X)
    with region():
        assert torch.equal(now, model(X))


def test_a_folded_model_runs_in_the_same_region(model: nn.Module) -> None:
    folding = resadapt.inject_adapters(net(), "conv", 2, family="lora", head="fc").eval()
    with region():
        folding(X)
        _loaded(folding, Path())
        folded = resadapt.fold_adapters(folding)
        now = folded(X)
    with region():
        assert torch.equal(now, folded(X))


def test_loss_scaling_and_accumulated_gradients(path: Path) -> None:
    """float16 under autocast, as in a training loop, and a verified save after it."""
    model = resadapt.inject_adapters(net(), "conv", 2, init="normal", head="fc", dropout=0.0)
    model.train().drop.p = 0.0
    parameters = list(resadapt.trainable_parameters(model))
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    halves = images(4).chunk(2)

    def loss(half: Tensor) -> Tensor:
        with region(torch.float16):
            return model(half).float().square().mean() / 2

    # The same by hand: each half's gradients, scaled and unscaled, are summed.
    expected = [torch.zeros_like(parameter) for parameter in parameters]
    for half in halves:
        gradients = torch.autograd.grad(loss(half) * 2.0**10, parameters)
        torch._foreach_add_(expected, gradients)
    before = [parameter.detach().clone() for parameter in parameters]
    for half in halves:
        scaler.scale(loss(half)).backward()
    scaler.step(optimizer)
    scaler.update()
    for parameter, start, total in zip(parameters, before, expected, strict=True):
        assert total.count_nonzero()
        assert torch.equal(parameter, start - 0.1 * (total / 2.0**10))

    # A step that overflows is skipped.
    kept = resadapt.adapter_state_dict(model)
    optimizer.zero_grad()
    scaler.scale(loss(halves[0]) * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    now = resadapt.adapter_state_dict(model)
    assert all(torch.equal(now[key], kept[key]) for key in kept)

    assert resadapt.check_backbone(model).ok
    report = resadapt.save_adapters(
        model, path, autocast=torch.float16, rebuild=net, metric=lambda m: m(X).mean().item()
    )
    assert "failed" not in outcomes(report).values()
    assert report["metric"].outcome == "passed"
