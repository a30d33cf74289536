"""Every torchvision ResNet goes the whole way: inject, train, save, load, remove."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support import LAYERS, backbone_bytes, images, picture, total, train
from torch import nn
from torchvision import models
from torchvision.models import detection, quantization, segmentation, video

import resadapt
from resadapt.base.undisturbed import outputs_of
from resadapt.proof.probe import same


@dataclass
class Case:
    build: Callable[..., nn.Module]
    options: dict[str, Any]
    prefix: str
    head: str
    inputs: Any
    targets: Any = None
    probe: bool = True  # whether the library makes a probe of its own

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build(weights=None, **self.options)

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(self.prefix + layer for layer in LAYERS)

    def arguments(self) -> tuple[Any, ...]:
        return (self.inputs,) if self.targets is None else (self.inputs, self.targets)


PLAIN = [
    *(models.resnet18, models.resnet34, models.resnet50, models.resnet101, models.resnet152),
    *(models.resnext50_32x4d, models.resnext101_32x8d, models.resnext101_64x4d),
    *(models.wide_resnet50_2, models.wide_resnet101_2),
]
QUANTIZABLE = [
    quantization.resnet18,
    quantization.resnet50,
    quantization.resnext101_32x8d,
    quantization.resnext101_64x4d,
]
SEGMENTATION = [
    *(segmentation.fcn_resnet50, segmentation.fcn_resnet101),
    *(segmentation.deeplabv3_resnet50, segmentation.deeplabv3_resnet101),
]
VIDEO = [video.r3d_18, video.mc3_18, video.r2plus1d_18]
DETECTION = [
    (detection.fasterrcnn_resnet50_fpn, "roi_heads.box_predictor", "box_score_thresh"),
    (detection.fasterrcnn_resnet50_fpn_v2, "roi_heads.box_predictor", "box_score_thresh"),
    (detection.maskrcnn_resnet50_fpn, "roi_heads.mask_predictor", "box_score_thresh"),
    (detection.maskrcnn_resnet50_fpn_v2, "roi_heads.mask_predictor", "box_score_thresh"),
    (detection.keypointrcnn_resnet50_fpn, "roi_heads.keypoint_predictor", "box_score_thresh"),
    (detection.retinanet_resnet50_fpn, "head.classification_head", "score_thresh"),
    (detection.retinanet_resnet50_fpn_v2, "head.regression_head", "score_thresh"),
    (detection.fcos_resnet50_fpn, "head", "score_thresh"),
]
TARGETS = [
    {
        "boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, 64, 64, dtype=torch.uint8),
        "keypoints": torch.tensor([[[20.0, 20.0, 1.0]] * 17]),
    }
]

CASES = (
    [Case(build, {"num_classes": 5}, "", "fc", images()) for build in PLAIN]
    + [
        Case(build, {"num_classes": 5, "quantize": False}, "", "fc", images())
        for build in QUANTIZABLE
    ]
    + [
        Case(
            build,
            {"weights_backbone": None, "num_classes": 5},
            "backbone.",
            "classifier",
            images(2, 64),
        )
        for build in SEGMENTATION
    ]
    + [Case(build, {"num_classes": 5}, "", "fc", torch.randn(2, 3, 4, 16, 16)) for build in VIDEO]
    + [
        Case(
            build,
            {
                "weights_backbone": None,
                "min_size": 64,
                "max_size": 64,
                threshold: 0.0,
            },  # untrained, but to detect something
            "backbone.body.",
            head,
            [images(1, 64)[0]],
            TARGETS,
            probe=build.__name__.startswith(("retinanet", "fcos")),
        )
        for build, head, threshold in DETECTION
    ]
)


def _big(case: Case) -> bool:
    return "101" in case.build.__name__ or "152" in case.build.__name__


def _named(case: Case) -> Any:
    marks = pytest.mark.slow if _big(case) else ()
    return pytest.param(
        case, marks=marks, id=f"{case.build.__module__.rsplit('.', 1)[-1]}-{case.build.__name__}"
    )


@pytest.mark.parametrize("case", [_named(case) for case in CASES])
def test_the_whole_way(case: Case, tmp_path: Path) -> None:
    model = case.model()
    before, names = picture(model), list(model.state_dict())

    resadapt.inject_adapters(model, case.layers, 8, head=case.head)
    state = model.state_dict()
    assert [name for name in state if ".resadapt." not in name] == names, "nothing renamed"
    assert [site.name for site in resadapt.list_adapters(model)[0].sites] == list(case.layers)
    count = resadapt.count_parameters(model)
    assert count.trainable == count.adapters + count.head
    assert count.adapters == sum(
        2 * c * 8 + 8 + c
        for c in (site.channels for site in resadapt.list_adapters(model)[0].sites)
    )

    frozen = backbone_bytes(model, outside=(case.head,))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    total(model(*case.arguments())).backward()
    idle = [name for name, p in model.named_parameters() if ".resadapt." in name and p.grad is None]
    assert not idle, "every adapter is in the path of the data"
    optimizer.step()
    assert backbone_bytes(model, outside=(case.head,)) == frozen

    report = resadapt.save_adapters(
        model, tmp_path / "set.pt", probe=None if case.probe else (case.inputs,)
    )
    assert report.ok
    assert report["outputs"].outcome == "passed", report
    assert (tmp_path / "set.pt").stat().st_size < 4 * (count.adapters + count.head) + 250_000

    fresh = resadapt.load_adapters(case.model(), tmp_path / "set.pt")
    assert same(outputs_of(model, (case.inputs,)), outputs_of(fresh, (case.inputs,)))

    resadapt.remove_adapters(model)
    assert picture(model) == before


# The deeper ones have no other layers, and masks and keypoints are looked for behind the same
# backbone, for a long time.
@pytest.mark.parametrize(
    "case",
    [
        _named(case)
        for case in CASES
        if not _big(case) and not case.build.__name__.startswith(("mask", "keypoint"))
    ],
)
def test_every_family_in_the_last_stage(case: Case) -> None:
    """At all convolutions, strided, grouped, dilated and 3-D ones among them, norms and blocks; a
    set each.
    """
    model = case.model().eval()
    blocks = dict(model.get_submodule(case.layers[-1]).named_children())
    inside = {
        f"{case.layers[-1]}.{name}": part
        for name, part in model.get_submodule(case.layers[-1]).named_modules()
        if name
    }
    convolutions = [
        name for name, part in inside.items() if isinstance(part, nn.modules.conv._ConvNd)
    ]
    norms = [name for name, part in inside.items() if "Norm" in type(part).__name__]
    behind = [f"{case.layers[-1]}.{name}" for name in blocks]
    places = {
        "lora": convolutions,
        "parallel": convolutions,
        "conv": convolutions,
        "series": behind,
        "bottleneck": behind,
    }
    places |= {"mona": behind, "ssf": norms}
    torch.manual_seed(0)
    plain = outputs_of(model, (case.inputs,))
    for family, sites in places.items():
        width = {"bottleneck": 1} if family not in ("parallel", "series", "ssf") else {}
        resadapt.inject_adapters(model, sites, family=family, name=family, init="identity", **width)
        assert same(outputs_of(model, (case.inputs,)), plain), family
        with torch.no_grad():
            for parameter in resadapt.trainable_parameters(model):
                parameter.add_(0.01 * torch.randn_like(parameter))
        adapted = outputs_of(model, (case.inputs,))
        assert not same(adapted, plain), f"{family} is in the path of the data"
        with resadapt.adapters_disabled(model):
            assert same(outputs_of(model, (case.inputs,)), plain)


def test_other_feature_maps() -> None:
    """SE blocks, ConvNeXt stages, DenseNet transitions: anything that returns [N, C, ...]."""
    x = images(2, 64)
    cases: list[tuple[nn.Module, Any, bool]] = [
        (models.convnext_tiny(weights=None), ["features.1", "features.3.1"], True),
        (
            models.efficientnet_b0(weights=None),
            ["features.1.0.block.1", "features.8"],
            False,
        ),  # SE; conv-norm-activation
        (models.mobilenet_v3_small(weights=None), "features.1.block.1", False),
        (models.densenet121(weights=None), ["features.transition1", "features.norm5"], True),
        (models.vgg11_bn(weights=None), ["features.1"], False),
        (models.regnet_y_400mf(weights=None), "trunk_output.block1", True),
    ]
    for model, layers, example in cases:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                # the statistics of one batch, so that untrained activations do not die out
                module.momentum = None
        model.train()(x)
        model.eval()
        plain = outputs_of(model, x)
        resadapt.inject_adapters(
            model, layers, 4, example_input=x if example else None, init="identity"
        )
        assert same(outputs_of(model, x), plain)
        train(model, torch.optim.AdamW(model.parameters(), lr=0.1), inputs=x)
        assert not same(outputs_of(model, x), plain), "the adapters are in the path of the data"
        with resadapt.adapters_disabled(model):
            assert same(outputs_of(model, x), plain)


def test_a_root_that_is_a_sequential() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 4, 3), nn.ReLU()),
    )
    before, x = picture(model), images()
    resadapt.inject_adapters(model, ["1", "3"], 2)
    assert [site.owner for site in resadapt.list_adapters(model)[0].sites] == ["1", "3.1"]
    assert len(model) == 4
    assert len(list(model.children())) == 4
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), inputs=x)
    resadapt.remove_adapters(model)
    assert picture(model) == before


def test_features_without_positions() -> None:
    """[N, C] has no position to pool over."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    resadapt.inject_adapters(model, "0", 3)
    adapter, x = model[0].resadapt.default, torch.randn(4, 6)
    plain = nn.functional.linear(x, model[0].weight, model[0].bias)
    expected = plain + adapter.up(torch.relu(adapter.down(plain)))
    assert torch.equal(model.eval()[0](x), expected)
