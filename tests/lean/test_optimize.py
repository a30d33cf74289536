"""An optimized backbone: the same outputs and gradients in less memory, for any set."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from optimized import FOLD, PLACES, compare, measured, near
from support import images, picture, small_resnet
from torch import nn
from torchvision import models

import resadapt

BUILDS: dict[str, tuple[Callable[[], nn.Module], str, Any, float]] = {
    "resnet18": (lambda: models.resnet18(num_classes=3), "layer*", images(2, 64), 50),
    "resnext50": (
        lambda: models.resnext50_32x4d(num_classes=3),
        "layer*.*.conv2",
        images(2, 64),
        3,
    ),
    "deeplabv3": (
        lambda: models.segmentation.deeplabv3_resnet50(
            weights=None, weights_backbone=None, num_classes=3
        ),
        "backbone.layer[34]",
        images(2, 64),
        5,
    ),
    "r3d_18": (
        lambda: models.video.r3d_18(num_classes=3),
        "layer*",
        torch.randn(1, 3, 4, 32, 32),
        20,
    ),
    "mc3_18": (
        lambda: models.video.mc3_18(num_classes=3),
        "layer2",
        torch.randn(1, 3, 4, 32, 32),
        5,
    ),
    "vgg11_bn": (lambda: models.vgg11_bn(num_classes=3), "features.1", images(2, 32), 4),
    "densenet121": (lambda: models.densenet121(num_classes=3), "features.norm0", images(2, 32), 10),
}


@FOLD
@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_equal_to_the_plain_backbone_with_less_memory(
    name: str, training: bool, fold: bool
) -> None:
    build, layers, x, times = BUILDS[name]
    torch.manual_seed(0)
    family = "pooled" if layers.startswith("layer*") and "conv" not in layers else "bottleneck"
    model = resadapt.inject_adapters(build(), layers, 4, family=family, init="normal").train(
        training
    )
    if fold:  # in float64, so that rounding, which differs by the machine, hides nothing
        model, x = model.double(), x.double()
        resadapt.accept_backbone(model)
    plain = measured(model, x)
    before = picture(model)
    lean = measured(resadapt.optimize_backbone(model, fold_norms=fold), x)
    compare(lean[1], plain[1], fold)
    for ours, theirs in zip(lean[2], plain[2], strict=True):
        near(ours, theirs)
    assert lean[0] * times < plain[0], (lean[0], plain[0])
    resadapt.restore_backbone(model)
    assert picture(model) == before
    assert resadapt.check_backbone(model).ok


def test_float64_is_the_judge() -> None:
    """Gradients of the optimized backbone in float32 are as near to those in float64 as the plain
    one's.
    """
    torch.manual_seed(0)
    model = resadapt.inject_adapters(small_resnet(), init="normal").train()
    x = images(4, 64)
    plain = measured(model, x)[2]
    lean = measured(resadapt.optimize_backbone(model), x)[2]
    exact = measured(resadapt.restore_backbone(model).double(), x.double())[2]
    errors = [
        max(
            float((ours.double() - right).norm() / right.norm())
            for ours, right in zip(found, exact, strict=True)
        )
        for found in (plain, lean)
    ]
    assert errors[1] < 2 * errors[0] + 1e-6


@FOLD
@pytest.mark.parametrize("family", PLACES)
def test_every_family(family: str, fold: bool) -> None:
    torch.manual_seed(0)
    model = resadapt.inject_adapters(
        small_resnet(), PLACES[family], family=family, head="fc"
    ).train()
    with torch.no_grad():
        for parameter in resadapt.trainable_parameters(model):
            parameter.add_(0.05 * torch.randn_like(parameter))
    x = images(4, 32)
    plain, lean = (
        measured(model, x),
        measured(resadapt.optimize_backbone(model, fold_norms=fold), x),
    )
    compare(lean[1], plain[1], fold)
    for ours, theirs in zip(lean[2], plain[2], strict=True):
        near(ours, theirs)
    assert lean[0] < plain[0]


@FOLD
def test_what_is_trained_runs_as_the_stock_layer(fold: bool) -> None:
    """A set with norms and a head of its own, beside one without: switched while the backbone is
    optimized.
    """
    torch.manual_seed(0)
    model = resadapt.inject_adapters(small_resnet(), name="plain", init="normal")
    resadapt.inject_adapters(
        model, name="own", norm="affine+stats", head=["fc", "layer4.1.conv2"], init="normal"
    )
    x, found = images(4, 32), {}
    for optimized in (False, True):
        if optimized:
            resadapt.optimize_backbone(model, fold_norms=fold)
        for name in ("plain", "own", "plain", "own"):
            resadapt.set_active_adapters(model, name)
            state = copy.deepcopy(model.state_dict())
            result = measured(model.train(), x)
            model.load_state_dict(state)  # the statistics that the set's own norms moved
            before = found.setdefault(name, result)
            compare(result[1], before[1], fold)
            for ours, theirs in zip(result[2], before[2], strict=True):
                near(ours, theirs)
    names = ["plain", None, "own", "plain"]
    with resadapt.adapters_for(model.eval(), names):
        mixed = model(x)
    resadapt.restore_backbone(model)
    with resadapt.adapters_for(model, names):
        compare(mixed, model(x), fold)


@FOLD
def test_files_do_not_know_of_it(fold: bool, tmp_path: Path) -> None:
    model = resadapt.inject_adapters(small_resnet(), head="fc", init="normal")
    resadapt.optimize_backbone(model, fold_norms=fold)
    optimizer = torch.optim.SGD(resadapt.trainable_parameters(model), 0.1)
    model.train()(images(4, 32)).square().mean().backward()
    optimizer.step()
    assert resadapt.check_backbone(model).ok
    report = resadapt.save_adapters(model, tmp_path / "set.pt", rebuild=small_resnet)
    assert report.ok
    assert report["outputs"].outcome == "passed"
    for optimized in (False, True):
        fresh = small_resnet()
        resadapt.load_adapters(fresh, tmp_path / "set.pt")
        if optimized:
            resadapt.optimize_backbone(fresh, fold_norms=fold)
        compare(fresh.eval()(images()), model.eval()(images()), fold)
        assert resadapt.verify_adapters(fresh, tmp_path / "set.pt", rebuild=small_resnet).ok
    with torch.no_grad():
        model.layer1[0].conv1.weight.add_(1e-3)
    assert not resadapt.check_backbone(model).ok


def test_copies_and_removal() -> None:
    model = small_resnet()
    before, x = picture(model), images()
    resadapt.optimize_backbone(resadapt.inject_adapters(model, init="normal")).eval()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other.conv1).__name__ == "LeanConv2d"
        assert torch.equal(other(x), model(x))
    plain = resadapt.inference_copy(model)
    assert type(plain.conv1) is nn.Conv2d
    assert not any(
        type(module).__module__.startswith("resadapt.lean") for module in plain.modules()
    )
    resadapt.optimize_backbone(model)  # once more is no more
    resadapt.remove_adapters(model)
    assert picture(model) == before
    with pytest.raises(resadapt.InjectionError, match="was not injected into"):
        resadapt.optimize_backbone(model)


def test_a_set_that_comes_later() -> None:
    model = resadapt.optimize_backbone(resadapt.inject_adapters(small_resnet(), name="first"))
    resadapt.inject_adapters(model, "layer*.*.conv1", 2, family="lora", name="second")
    measured(model.train(), images(4, 32))
    resadapt.remove_adapters(model, "first")
    assert type(model.bn1).__name__ == "LeanBatchNorm2d"
    measured(model, images(4, 32))


@FOLD
@pytest.mark.parametrize("family", PLACES)
def test_an_optimized_backbone_is_what_it_was_to_sets(
    family: str, fold: bool, tmp_path: Path
) -> None:
    """Injected into it, saved from it and loaded into it: heads of its layers too, and stages,
    which are Sequentials.
    """
    plain = resadapt.inject_adapters(small_resnet(), name="before")
    model = resadapt.optimize_backbone(
        resadapt.inject_adapters(small_resnet(), name="before"), fold_norms=fold
    )
    classes = [type(module) for module in model.modules()]
    for each in (plain, model):
        torch.manual_seed(0)
        resadapt.inject_adapters(
            each, PLACES[family], family=family, name="later", head=["fc", "layer4.0.downsample.0"]
        )
    assert resadapt.read_adapter_info(saved(model, tmp_path / "model.pt")).set == (
        resadapt.read_adapter_info(saved(plain, tmp_path / "plain.pt")).set
    )
    assert (tmp_path / "model.pt").read_bytes() == (tmp_path / "plain.pt").read_bytes()
    fresh = resadapt.optimize_backbone(
        resadapt.inject_adapters(small_resnet(), name="before"), fold_norms=fold
    )
    resadapt.load_adapters(fresh, tmp_path / "plain.pt")
    compare(fresh.eval()(images()), plain.eval()(images()), fold)
    for each in (model, fresh, plain):
        resadapt.remove_adapters(each, "later")
    assert (
        [type(module) for module in model.modules()]
        == [type(module) for module in fresh.modules()]
        == classes
    )
    suggested = [
        str(resadapt.suggest_layers(each, 700_000, family=family, layers=PLACES[family]))
        for each in (model, plain)
    ]
    assert suggested[0] == suggested[1]


def saved(model: nn.Module, path: Path) -> Path:
    assert resadapt.save_adapters(model, path, rebuild=small_resnet).ok
    return path


@pytest.mark.parametrize("case", ["order", "segmentation", "maps"])
def test_random_numbers_are_drawn_as_by_the_plain_backbone(case: str) -> None:
    """In the same order, and for the same places."""
    torch.manual_seed(0)
    x, model = images(2, 64).double(), models.resnet18(num_classes=3)
    if case == "order":
        resadapt.inject_adapters(
            model, ["layer2.0.downsample.0", "layer2.0.conv1"], 64, init="normal", dropout=0.5
        )
    elif case == "maps":
        resadapt.inject_adapters(model, "layer*.*", 8, family="bottleneck", init="normal")
        for place in ("layer1.0", "layer2.1"):
            model.get_submodule(place).register_forward_hook(
                lambda _m, _a, output: nn.functional.dropout(output, 0.5)
            )
    else:
        model = models.segmentation.fcn_resnet50(
            weights=None, weights_backbone=None, num_classes=3, aux_loss=True
        )
        resadapt.inject_adapters(model, "backbone.layer4", 8, init="normal")
    model.double().train()
    resadapt.accept_backbone(model)
    outputs = []
    for _ in range(2):
        torch.manual_seed(1)
        output = model(x)
        outputs.append(output["out"] if isinstance(output, dict) else output)
        resadapt.optimize_backbone(model)
    torch.testing.assert_close(
        outputs[1], outputs[0], rtol=1e-9, atol=1e-9 * float(outputs[0].abs().max())
    )


def test_hooks_run_in_the_order_of_the_plain_backbone() -> None:
    model = resadapt.inject_adapters(small_resnet(), "layer4", 4).eval()
    order: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _m, _a, _o, name=name: order.append(name))
    model(images())
    plain = order.copy()
    order.clear()
    resadapt.optimize_backbone(model)(images())
    assert order == plain
