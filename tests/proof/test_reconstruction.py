"""What a proof stands on: a backbone built afresh, or a copy and what it may share."""

from __future__ import annotations

import copy
import functools
import itertools
import random
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import images, picture, small_net, small_resnet, train
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torchvision.models import resnet18

import resadapt

X = images(2, 8)


def trained(model: Any = None) -> Any:
    model = resadapt.inject_adapters(model or small_net(), "c2", 2, head="head")
    train(model, torch.optim.SGD(resadapt.trainable_parameters(model), lr=0.5), inputs=X)
    return model


def outcomes(report: resadapt.types.VerificationReport) -> dict[str, str]:
    return {check.name: check.outcome for check in report.checks}


def test_without_rebuild_the_report_says_that_a_copy_served(path: Path) -> None:
    report = resadapt.save_adapters(trained(), path)
    assert report["reconstruction"] == resadapt.types.Check(
        "reconstruction",
        "not checked",
        "a copy of the live model; pass rebuild= to verify on a backbone built without it",
    )
    assert report.ok
    assert outcomes(report)["outputs"] == "passed"


def test_with_rebuild_everything_is_proven_on_what_it_builds(path: Path) -> None:
    model = trained()
    built: list[nn.Module] = []

    def rebuild() -> nn.Module:
        built.append(small_net())
        torch.rand(1000)  # which must not disturb the training
        return built[-1]

    measured: list[nn.Module] = []

    def metric(m: nn.Module) -> Tensor:
        measured.append(m)
        return m(X).sum()

    torch.manual_seed(3)
    for call in (resadapt.save_adapters, resadapt.verify_adapters):
        report = call(model, path, rebuild=rebuild, metric=metric)
        assert set(outcomes(report).values()) == {"passed"}
        assert measured[-1] is built[-1], "the file was restored on it"
    after = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(3), after)


def test_a_model_that_rebuild_keeps_stays_plain(path: Path) -> None:
    model, kept = trained(), small_net()
    before = picture(kept)
    for _ in range(2):
        assert resadapt.save_adapters(model, path, rebuild=lambda: kept).ok
        assert picture(kept) == before


def test_a_rebuild_that_seeds_everything_disturbs_no_generator(path: Path) -> None:
    def rebuild() -> nn.Module:
        random.seed(0)
        np.random.seed(0)
        return small_net()

    model = trained()
    random.seed(5)
    np.random.seed(5)
    expected = random.random(), np.random.rand()
    random.seed(5)
    np.random.seed(5)
    resadapt.save_adapters(
        model, path, rebuild=rebuild, metric=lambda m: random.random() + np.random.rand()
    )
    assert (random.random(), np.random.rand()) == expected


def test_channels_last_is_proven_on_a_backbone_in_channels_last(path: Path) -> None:
    def rebuild() -> nn.Module:
        torch.manual_seed(0)
        return resnet18(num_classes=3)

    model = resadapt.inject_adapters(rebuild(), head="fc").to(memory_format=torch.channels_last)
    assert model.conv1.weight.stride() != rebuild().conv1.weight.stride()
    report = resadapt.save_adapters(model, path, rebuild=rebuild)
    assert outcomes(report)["outputs"] == "passed"


def _by_closure(model: Any) -> None:
    forward = model.forward
    model.forward = lambda x: forward(x)


def _by_partial(model: Any) -> None:
    model.forward = functools.partial(model.forward)


def _by_autocast(model: Any) -> None:
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)


def _by_compile(model: Any) -> None:
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="eager")


def _in_a_child(model: Any) -> None:
    forward = model.c2.forward
    model.c2.forward = lambda x: forward(x)


def _by_method(model: Any) -> None:
    forward = type(model).forward
    model.forward = types.MethodType(lambda self, x: forward(self, x), model)


def _fails(x: Any) -> Any:
    raise RuntimeError("no such input")


def test_a_rebuilt_backbone_that_does_not_take_the_probe(path: Path) -> None:
    def rebuild() -> Any:
        model = small_net()
        model.forward = _fails  # type: ignore[method-assign]
        return model

    model = resadapt.inject_adapters(small_net(), "c2", 2, head="head")
    with pytest.raises(resadapt.VerificationError, match="RuntimeError: no such input") as failed:
        resadapt.save_adapters(model, path, probe=X, rebuild=rebuild)
    assert outcomes(failed.value.report)["outputs"] == "failed"
    assert not path.exists()


@pytest.mark.parametrize(
    "replace", [_by_closure, _by_partial, _by_autocast, _by_compile, _in_a_child, _by_method]
)
@pytest.mark.parametrize("early", [False, True])
def test_a_forward_replaced_on_the_instance_proves_nothing(
    replace: Callable[[Any], None], early: bool, path: Path
) -> None:
    model = small_net()
    if early:
        replace(model)
    resadapt.inject_adapters(model, "c2", 2, head="head")
    if not early:
        replace(model)
    report = resadapt.save_adapters(model, path, probe=X, metric=lambda m: m(X).sum())
    for name in ("sites", "outputs", "recorded outputs", "metric"):
        assert outcomes(report)[name] == "not checked"
        assert "was replaced on the instance" in report[name].detail
    if replace is _by_autocast:
        with pytest.raises(
            resadapt.VerificationError,
            match=r"outputs +failed +.* differ on the probe: .* forward of 'the model' changed",
        ):
            resadapt.save_adapters(model, path, probe=X, rebuild=small_net)
    assert "'c2'" in report["outputs"].detail or "'the model'" in report["outputs"].detail
    assert outcomes(report)["tensors"] == "passed"


def test_a_replaced_forward_that_answers_differently_fails_on_a_rebuilt_backbone(
    path: Path,
) -> None:
    model = trained()
    forward = model.forward
    model.forward = lambda x: 2 * forward(x)
    with pytest.raises(resadapt.VerificationError, match=r"outputs +failed") as caught:
        resadapt.save_adapters(model, path, rebuild=small_net, metric=lambda m: m(X).sum())
    report = caught.value.report
    assert (report["reconstruction"].outcome, report["tensors"].outcome) == ("passed", "passed")
    assert (report["outputs"].outcome, report["metric"].outcome) == ("failed", "failed")
    assert not path.exists()
    model.forward = lambda x: forward(x)
    assert set(outcomes(resadapt.save_adapters(model, path, rebuild=small_net)).values()) == {
        "passed",
        "not checked",
    }
    assert outcomes(resadapt.verify_adapters(model, path, rebuild=small_net))["outputs"] == "passed"


class Scaled(nn.Module):
    """With state outside parameters and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.scale


def scaled() -> Any:
    torch.manual_seed(0)
    return Scaled()


def _attribute(model: Any) -> None:
    model.scale = 3.0


def _hook(model: Any) -> None:
    model.conv.register_forward_hook(lambda _module, _args, output: output + 1)


@pytest.mark.parametrize("change", [_attribute, _hook])
def test_state_that_only_the_live_model_has_is_found_on_a_rebuilt_backbone(
    change: Callable[[Any], None], path: Path
) -> None:
    model = resadapt.inject_adapters(scaled(), "conv", 2)
    change(model)
    copied = resadapt.save_adapters(model, path)
    assert outcomes(copied)["reconstruction"] == "not checked", (
        "a copy has that state too, and the report says that it is one"
    )
    with pytest.raises(
        resadapt.VerificationError, match=r"outputs +failed +live and reloaded model differ"
    ):
        resadapt.save_adapters(model, path, rebuild=scaled)
    assert not resadapt.verify_adapters(model, path, rebuild=scaled).ok


def test_a_hook_that_runs_a_part_of_the_live_model(path: Path) -> None:
    model = resadapt.inject_adapters(small_net(), "c2", 2)
    live = model.conv
    model.bn.register_forward_hook(
        lambda _module, args, output: output + live(torch.ones(1, 3, 3, 3)).mean()
    )
    report = resadapt.save_adapters(model, path, metric=lambda m: m(X).sum())
    for name in ("outputs", "recorded outputs", "metric"):
        assert outcomes(report)[name] == "not checked"
        assert (
            "modules of the live model ran while the reloaded model ran ('conv')"
            in report[name].detail
        )
    assert outcomes(resadapt.verify_adapters(small_net(), path))["recorded outputs"] == "failed", (
        "the plain one answers differently"
    )


def test_a_metric_that_knows_the_live_model_proves_nothing(path: Path) -> None:
    model = resadapt.inject_adapters(small_net(), "c2", 2)
    before = picture(model)
    for metric in (
        lambda _: model(X).sum(),
        lambda _: model.conv(X).sum(),
        lambda m: m(X).sum() + model.c2(X[:, :1].expand(-1, 4, 8, 8)).sum(),
    ):
        report = resadapt.save_adapters(model, path, metric=metric)
        assert outcomes(report)["metric"] == "not checked"
        assert "ran while the metric ran on the reloaded model" in report["metric"].detail
        assert outcomes(report)["outputs"] == "passed"
    assert picture(model) == before
    assert (
        outcomes(resadapt.save_adapters(model, path, metric=lambda m: m(X).sum()))["metric"]
        == "passed"
    )


class Shared(nn.Sequential):
    def __deepcopy__(self, memo: object) -> Any:
        return self


def sharing() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("backbone", Shared(nn.Conv2d(3, 4, 3)))
    model.add_module("after", nn.Conv2d(4, 2, 1))
    return model


def test_a_backbone_that_deepcopy_shares_is_not_changed_by_saving(path: Path) -> None:
    model = sharing()
    before = picture(model)
    resadapt.inject_adapters(model, "backbone", 2)
    model(X)
    injected = picture(model)
    with pytest.raises(
        resadapt.VerificationError,
        match=r"copy.deepcopy of the live model shares 'backbone'.*: pass rebuild=",
    ):
        resadapt.save_adapters(model, path)
    assert not list(path.parent.iterdir())
    assert resadapt.save_adapters(model, path, rebuild=sharing).ok
    report = resadapt.verify_adapters(model, path)
    assert outcomes(report)["reconstruction"] == "failed"
    assert not report.ok
    assert picture(model) == injected
    resadapt.remove_adapters(model)
    assert outcomes(resadapt.verify_adapters(model, path))["reconstruction"] == "failed"
    assert picture(model) == before


class Swish(nn.Module):
    def __init__(self, beta: float = 1.0, function: Any = torch.sigmoid) -> None:
        super().__init__()
        self.beta, self.function = beta, function

    def forward(self, x: Tensor) -> Tensor:
        return x * self.function(self.beta * x)


COMMON = nn.Sequential(nn.SiLU(), nn.Dropout(0.5))


class CommonParts(nn.Module):
    """Activations that every model has, as Ultralytics and DPN have them."""

    attribute: nn.Module = nn.ReLU()

    def __init__(self, default: nn.Module = Swish()) -> None:  # noqa: B008
        super().__init__()
        self.conv, self.c2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.act1 = self.act2 = self.attribute
        self.act3, self.act4 = default, COMMON
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act2(self.c2(self.act1(self.conv(x))))
        return self.head(self.act4(self.act3(x)).mean((2, 3)))


def common_parts() -> Any:
    torch.manual_seed(0)
    return CommonParts().eval()


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_modules_without_state_that_every_model_has(
    training: bool, optimized: bool, path: Path
) -> None:
    try:
        model = resadapt.inject_adapters(common_parts(), "c2", 2, head="head").train(training)
        if optimized:
            resadapt.optimize_backbone(model)
        before, built = picture(model), []

        def rebuild() -> nn.Module:
            built.append(common_parts())  # in evaluation mode
            return built[-1]

        for call in (resadapt.save_adapters, resadapt.verify_adapters):
            report = call(model, path, rebuild=rebuild, metric=lambda m: m(X).sum())
            assert set(outcomes(report).values()) == {"passed"}
            assert report["reconstruction"].detail == (
                "rebuild() built the backbone afresh, with the live model's settings of 'act1', "
                "'act3', 'act4', which both share"
            )
        assert picture(model) == before
        assert built[0].act1 is built[0].act2 is not CommonParts.attribute
        assert type(built[0].act1) is nn.ReLU
        assert model.act1 is model.act2 is CommonParts.attribute
        assert model.act4[1].training == COMMON[1].training == training
    finally:
        resadapt.remove_adapters(model)
    assert type(CommonParts.attribute) is nn.ReLU


def _with_hook(model: Any) -> None:
    model.act1.register_forward_hook(lambda _module, _args, output: output + 1)


def _with_tensor(model: Any) -> None:
    model.act1.table = torch.ones(1)


def _with_buffer(model: Any) -> None:
    model.act1.register_buffer("table", torch.ones(1))


def _with_forward(model: Any) -> None:
    model.act1.forward = lambda x: x.relu()


def _with_closure(model: Any) -> None:
    model.act1.function = lambda x: model.conv(x)


def _with_default(model: Any) -> None:
    model.act1.function = lambda x, module=model.conv: module(x)


def _with_list(model: Any) -> None:
    model.act1.seen = []


def _with_adapters(model: Any) -> None:
    resadapt.inject_adapters(model, "act1", family="ssf", name="other", example_input=X)


def _with_head(model: Any) -> None:
    resadapt.inject_adapters(model, (), name="other", head={"act1": nn.PReLU()})


@pytest.mark.parametrize(
    ("before", "after"),
    [
        *((change, None) for change in (_with_buffer, _with_tensor, _with_list, _with_forward)),
        *((change, None) for change in (_with_hook, _with_closure, _with_default)),
        *((None, change) for change in (_with_hook, _with_adapters, _with_head)),
    ],
)
def test_a_module_that_every_model_has_and_that_keeps_something(
    before: Callable[[Any], None] | None,
    after: Callable[[Any], None] | None,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(CommonParts, "attribute", nn.ReLU())
    model = common_parts()
    model.act2 = nn.ReLU()
    if before:
        before(model)
    resadapt.inject_adapters(model, "c2", 2, head="head")
    if after:
        after(model)

    def rebuild() -> nn.Module:
        built = common_parts()
        built.act2 = nn.ReLU()
        return built

    message = r"shares 'act1' with the live model: .* \(a class attribute, .* a copy.deepcopy of"
    with pytest.raises(resadapt.VerificationError, match=message):
        resadapt.save_adapters(model, path, name="default", rebuild=rebuild)


def _with_parts(model: Any) -> nn.Module:
    fresh = small_net()
    fresh.c2 = model.c2
    return fresh


def _with_memory(model: Any) -> nn.Module:
    fresh = small_net()
    plain = {key: value for key, value in model.state_dict().items() if "resadapt" not in key}
    fresh.load_state_dict(plain, assign=True)
    return fresh


@pytest.mark.parametrize("share", [lambda model: model, _with_parts, _with_memory])
def test_a_rebuild_that_returns_parts_of_the_live_model(
    share: Callable[[Any], nn.Module], path: Path
) -> None:
    model = trained()
    before = picture(model)
    with pytest.raises(
        resadapt.AdapterError,
        match=r"rebuild\(\) returned a model that shares|rebuild returned a model with adapters",
    ):
        resadapt.save_adapters(model, path, rebuild=lambda: share(model))
    assert not list(path.parent.iterdir())
    assert picture(model) == before


@pytest.mark.parametrize(
    ("rebuild", "error", "message"),
    [
        (lambda: None, resadapt.AdapterError, "rebuild returned NoneType: return the backbone"),
        (lambda: trained(), resadapt.AdapterError, "rebuild returned a model with adapters"),
        (3, resadapt.AdapterError, "rebuild is int: give a function"),
        (nn.Identity(), resadapt.AdapterError, "rebuild is Identity: give a function"),
        (lambda: 1 / 0, ZeroDivisionError, "division"),
        (lambda: small_resnet(), resadapt.VerificationError, r"backbone +failed"),
    ],
)
def test_a_rebuild_that_builds_no_such_backbone(
    rebuild: Any, error: type[Exception], message: str, path: Path
) -> None:
    model = trained()
    before = picture(model)
    for call in (resadapt.save_adapters, resadapt.verify_adapters):
        if call is resadapt.verify_adapters:
            resadapt.save_adapters(model, path)
            if error is resadapt.VerificationError:
                assert outcomes(call(model, path, rebuild=rebuild))["backbone"] == "failed"
                continue
        with pytest.raises(error, match=message) as caught:
            call(model, path, rebuild=rebuild)
        assert type(caught.value) is error
        assert path.exists() == (call is resadapt.verify_adapters)
    assert picture(model) == before


def _compiled_in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def _compiled_block(model: Any) -> Any:
    model.c2.compile(backend="eager")
    return model


def _wrapped_block(model: Any) -> Any:
    model.c2 = torch.compile(model.c2, backend="eager")
    return model


def _wrapped(model: Any) -> Any:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("compile", [_compiled_in_place, _compiled_block, _wrapped_block, _wrapped])
@pytest.mark.parametrize("early", [False, True])
def test_compiled_models_are_proven_by_their_eager_forward(
    compile: Callable[[Any], Any], early: bool, path: Path
) -> None:
    torch._dynamo.reset()
    model = small_net()
    if early and compile is not _wrapped:
        compile(model)
    resadapt.inject_adapters(model, "c2", 2, head="head")
    if not early:
        model = compile(model)
    train(model, torch.optim.SGD(resadapt.trainable_parameters(model), lr=0.5), inputs=X)
    seen: list[int] = []
    model.eval()
    expected = model(X)
    report = resadapt.save_adapters(
        model, path, metric=lambda m: seen.append(1) or m(X).sum(), rebuild=small_net
    )
    assert set(outcomes(report).values()) == {"passed"}
    assert len(seen) == 2
    assert resadapt.save_adapters(model, path)["outputs"].outcome == "passed", "on a copy too"
    assert torch.allclose(resadapt.load_adapters(small_net(), path).eval()(X), expected, atol=1e-6)
    assert resadapt.check_backbone(model).ok


def test_the_copy_of_a_model_is_gone_after_saving(path: Path) -> None:
    """No hook that watched the comparison stays behind, in the model or anywhere else."""
    from torch.nn.modules import module

    model = trained()
    before, everywhere = picture(model), dict(module._global_forward_pre_hooks)
    resadapt.save_adapters(model, path, metric=lambda m: m(X).sum())
    with pytest.raises(ZeroDivisionError):
        resadapt.save_adapters(model, path, metric=lambda m: 1 / 0)
    assert picture(model) == before
    assert dict(module._global_forward_pre_hooks) == everywhere
    assert copy.deepcopy(model)(X).shape == (2, 2)


def test_saving_in_two_threads_leaves_compilation_as_it_was(tmp_path: Path) -> None:
    torch.compile(nn.ReLU(), backend="eager")(torch.ones(1))  # compilation is in use
    first_is_in, second_is_in, first_is_out = (threading.Event() for _ in range(3))

    def first(model: nn.Module) -> float:
        first_is_in.set()
        assert second_is_in.wait(60)
        return 0.0

    def second(model: nn.Module) -> float:
        second_is_in.set()
        assert first_is_out.wait(60)
        return 0.0

    models = [trained(), trained()]  # not in the threads, which share torch's random state
    saves = [
        threading.Thread(
            target=resadapt.save_adapters,
            args=(model, tmp_path / f"{metric.__name__}.pt"),
            kwargs={"metric": metric},
        )
        for model, metric in zip(models, (first, second), strict=True)
    ]
    saves[0].start()
    assert first_is_in.wait(60)
    saves[1].start()
    saves[0].join()
    first_is_out.set()
    saves[1].join()
    assert len(list(tmp_path.iterdir())) == 2
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(lambda x: x.sin() + 1, backend=backend)(torch.ones(3))
    assert compiled


def test_the_copy_has_no_adapters_of_other_sets(path: Path) -> None:
    model = trained()
    for name in ("other", "third"):
        resadapt.inject_adapters(model, "c2", 2, name=name)
    resadapt.set_active_adapters(model, "default")
    model.c2.resadapt.third.lock = threading.Lock()  # which cannot be copied
    before, seen = picture(model), []

    def metric(m: Any) -> float:
        seen.append([name for name, _ in m.c2.resadapt.named_children()])
        return 0.0

    assert resadapt.save_adapters(model, path, metric=metric).ok
    assert seen == [["default", "other", "third"], ["default"]]
    assert picture(model) == before


def test_a_forward_that_moves_weights_is_found_out(path: Path) -> None:
    model = trained()
    model.c2.register_forward_pre_hook(lambda m, _: m.weight.data.clamp_(max=0.05))
    with pytest.raises(resadapt.BackboneDriftError, match=r"c2\.weight"):
        resadapt.save_adapters(model, path)
    assert not list(path.parent.iterdir())


def test_what_is_done_to_the_copy_stays_with_it(path: Path) -> None:
    """By a metric, and by a forward that moves weights, every other time or when a plain model is
    only looked at.
    """
    model = trained()
    before = picture(model)

    def metric(m: Any) -> float:
        if m is not model:
            m.c2.weight.data.mul_(2)
        return 0.0

    assert resadapt.save_adapters(model, path, metric=metric).ok
    assert resadapt.verify_adapters(model, path, metric=metric).ok
    assert picture(model) == before
    calls = itertools.count(1)

    def halve(module: Any, *_: object) -> None:
        if next(calls) % 2 == 0:
            module.weight.data.mul_(0.5)

    model.conv.register_forward_hook(halve)
    resadapt.save_adapters(model, path)
    assert resadapt.check_backbone(model).ok
    plain = small_net()
    plain.c2.register_forward_hook(halve)
    weight = plain.c2.weight.clone()
    resadapt.verify_adapters(plain, path)
    assert next(calls) > 3
    assert torch.equal(plain.c2.weight, weight)


class Fragile(nn.Conv2d):
    """Copies itself with other weights."""

    def __deepcopy__(self, memo: object) -> Any:
        fresh = Fragile(4, 4, 1)
        fresh.load_state_dict(self.state_dict())
        with torch.no_grad():
            fresh.weight[0] += 1e-3
        return fresh


def test_a_copy_with_other_weights_is_compared(path: Path) -> None:
    """Digests of the live model's weights are taken for those of the copy's only where both are the
    same memory.
    """
    model = small_net()
    model.c2 = Fragile(4, 4, 1)
    resadapt.inject_adapters(model, "conv", 2)
    with pytest.raises(resadapt.VerificationError, match=r"backbone +failed .*c2\.weight"):
        resadapt.save_adapters(model, path)


def test_a_failing_proof_stays_one_when_the_metric_leaves_something_on_the_reloaded_model(
    path: Path,
) -> None:
    model = resadapt.inject_adapters(small_net(), "c2", 2)
    model.c2.register_forward_hook(lambda *args: args[2] + 1)  # the file does not carry it

    def metric(m: Any) -> float:
        if m is not model:
            m.conv.register_forward_hook(lambda *args: args[2] * 2)
        return 0.0

    with pytest.raises(resadapt.VerificationError, match=r"outputs +failed"):
        resadapt.save_adapters(model, path, rebuild=small_net, metric=metric)


def test_a_metric_that_changes_the_live_model_when_it_is_called_again(path: Path) -> None:
    for attribute, error in (
        ("c2.weight", resadapt.BackboneDriftError),
        ("head.resadapt.default@head.weight", resadapt.VerificationError),
    ):
        model = trained()

        def metric(m: Any, model: Any = model, attribute: str = attribute) -> float:
            if m is not model:
                model.get_parameter(attribute).data.mul_(2)
            return 0.0

        state = resadapt.adapter_state_dict(model)
        with pytest.raises(error):
            resadapt.save_adapters(model, path, rebuild=small_net, metric=metric)
        assert not list(path.parent.iterdir())
        assert all(
            torch.equal(tensor, state[key])
            for key, tensor in resadapt.adapter_state_dict(model).items()
        )


def test_a_parametrized_norm_stays_frozen_when_a_copy_is_made_plain(path: Path) -> None:
    """Copies share the class that parametrize makes."""
    for early in (True, False):
        model = small_net()
        if early:
            parametrize.register_parametrization(model.bn, "weight", nn.Identity())
        resadapt.inject_adapters(model, "c2", 2)
        if not early:
            parametrize.register_parametrization(model.bn, "weight", nn.Identity())
            resadapt.accept_backbone(model)
        kind = type(model.bn)
        resadapt.inject_adapters(model, "c2", 2, name="other")
        assert resadapt.save_adapters(model, path).ok
        assert type(model.bn) is kind
        resadapt.remove_adapters(copy.deepcopy(model))
        model.train()(X)
        assert resadapt.check_backbone(model).ok
        resadapt.optimize_backbone(model)
        resadapt.remove_adapters(model)
        assert not isinstance(model.bn, resadapt.base.overlay.Overlay)
        parametrize.remove_parametrizations(model.bn, "weight")
        assert type(model.bn) is nn.BatchNorm2d
