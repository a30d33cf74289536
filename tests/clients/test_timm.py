"""timm: its architectures, feature extractors, classifiers and averaged models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from roundtrip import (
    assert_same_outputs,
    save_and_reload,
    seeded,
    small_images,
    three_steps,
    train_save_reload,
    with_strong_adapters,
)
from torch import nn

import resadapt

timm = pytest.importorskip("timm")

X = small_images()
# Transformers are made for one size of input, which cannot be guessed: give an example.
EXAMPLE = {"example_input": X}
SWIN = {
    "img_size": 32,
    "window_size": 2,
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 1, 1, 1),
    "embed_dim": 24,
}
VIT = {"img_size": 32, "depth": 2}

MODELS: list[tuple[str, dict[str, Any], str, dict[str, Any], int]] = [
    ("resnet18d", {}, "layer*", {}, 1),
    ("resnet26", {}, "layer*", {}, 1),
    ("regnety_002", {}, "s[1-4].b*", {}, 1),
    ("convnext_atto", {}, "stages.*", {}, 1),
    ("efficientnet_b0", {}, "blocks.*", {}, 1),
    ("mobilenetv3_small_050", {}, "blocks.*", {}, 1),
    ("swin_tiny_patch4_window7_224", SWIN, "layers.*", EXAMPLE, -1),
    ("swin_tiny_patch4_window7_224", SWIN, "layers.*.blocks.*", EXAMPLE | {"channel_dim": -1}, -1),
    ("vit_tiny_patch16_224", VIT, "blocks.*", EXAMPLE, -1),
    ("vit_tiny_patch16_224", VIT, "blocks.*", EXAMPLE | {"channel_dim": -1}, -1),
    ("densenet121", {}, "features.transition*", {}, 1),
    ("densenet121", {}, "features.denseblock*.denselayer[36]", {}, 1),
]
FEATURES: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("resnet18", {}, "layer*", {}),
    ("resnet18", {"out_indices": (1, 2)}, "layer*", {}),
    ("regnety_002", {}, "s[1-4].b*", {}),
    ("convnext_atto", {}, "stages_*", {}),
    ("efficientnet_b0", {}, "blocks.*", {}),
    ("vit_tiny_patch16_224", VIT | {"out_indices": (0, 1)}, "model.blocks.*", EXAMPLE),
]


def backbone(name: str, **options: Any) -> Callable[[], Any]:
    return seeded(lambda: timm.create_model(name, pretrained=False, **options))


def with_three_classes(name: str, **options: Any) -> Callable[[], Any]:
    """The pretrained model with a new classifier, as timm says to make one."""

    def build() -> Any:
        model = timm.create_model(name, pretrained=False, **options)
        model.reset_classifier(3)
        return model

    return seeded(build)


def classifier_of(model: Any) -> str:
    return next(name for name, module in model.named_modules() if module is model.get_classifier())


@pytest.mark.parametrize(
    ("name", "settings", "layers", "options", "channel_dim"),
    MODELS,
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_classifier_comes_back_bit_for_bit(
    name: str,
    settings: dict[str, Any],
    layers: str,
    options: dict[str, Any],
    channel_dim: int,
    path: Path,
) -> None:
    rebuild = with_three_classes(name, **settings)
    model, reloaded = train_save_reload(
        rebuild, layers, path, X, head=classifier_of(rebuild()), **options
    )
    assert {site.channel_dim for site in resadapt.list_adapters(model)[0].sites} == {channel_dim}
    assert reloaded(X).shape == (len(X), 3)


@pytest.mark.parametrize("size", [64, 128])
def test_kernels_mixed_by_a_router(size: int, path: Path) -> None:
    """The router is as wide as the maps of some blocks; the channels are found all the same."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, size, size)
    rebuild = with_three_classes("efficientnet_cc_b0_4e")
    model, _ = train_save_reload(rebuild, "blocks.*", path, x, example_input=x)
    sites = resadapt.list_adapters(model)[0].sites
    widths = [16, 24, 40, 80, 112, 192, 320]
    assert [(site.channels, site.channel_dim) for site in sites] == [(w, 1) for w in widths]
    with torch.no_grad():
        assert model(torch.randn(1, 3, 96, 160)).shape == (1, 3)


@pytest.mark.parametrize("name", ["caformer_s18", "edgenext_xx_small"])
def test_norms_of_both_layouts(name: str) -> None:
    model = backbone(name)()
    norms = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.LayerNorm)}
    x = torch.randn(1, 3, 64, 64)
    with pytest.raises(resadapt.InjectionError, match=r"channel_dim=1 is wrong for site 's"):
        resadapt.inject_adapters(model, [*norms], family="ssf", example_input=x, channel_dim=1)
    resadapt.inject_adapters(model, [*norms], family="ssf", example_input=x)
    sites = resadapt.list_adapters(model)[0].sites
    assert {site.name: site.channels for site in sites} == {
        site: norm.normalized_shape[0] for site, norm in norms.items()
    }
    assert {site.channel_dim for site in sites} == {1, -1}
    with torch.no_grad():
        model.eval()(torch.randn(2, 3, 96, 160))


@pytest.mark.parametrize(
    ("name", "settings", "layers", "options"),
    FEATURES,
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_feature_extractor_comes_back_bit_for_bit(
    name: str, settings: dict[str, Any], layers: str, options: dict[str, Any], path: Path
) -> None:
    train_save_reload(backbone(name, features_only=True, **settings), layers, path, X, **options)


@pytest.mark.parametrize(
    ("name", "layers"), [("regnety_002", "s[1-4]"), ("densenet121", "features.denseblock*")]
)
def test_modules_that_iterate_over_their_children_are_refused_with_advice(
    name: str, layers: str
) -> None:
    with pytest.raises(resadapt.InjectionError, match=r"Choose a module inside it"):
        resadapt.inject_adapters(backbone(name)(), layers, 8)


@pytest.mark.parametrize("classes", [5, 3, 0])
def test_a_classifier_that_is_reset_after_the_injection_is_told(classes: int, path: Path) -> None:
    model = resadapt.inject_adapters(backbone("resnet18", num_classes=3)(), head="fc")
    model.reset_classifier(classes)
    assert "fc" in resadapt.check_backbone(model).drifted
    with pytest.raises(resadapt.InjectionError, match="'fc' were replaced after the injection"):
        model.train()(X)
    with pytest.raises(resadapt.BackboneDriftError, match="'fc'"):
        resadapt.save_adapters(model, path)


def test_norms_that_timm_freezes_after_the_injection_are_told() -> None:
    model = resadapt.inject_adapters(backbone("resnet18", num_classes=3)(), head="fc")
    timm.layers.freeze_batch_norm_2d(model)
    with pytest.raises(resadapt.InjectionError, match=r"'bn1'.* were replaced after the injection"):
        model.train()(X)
    early = timm.layers.freeze_batch_norm_2d(backbone("resnet18", num_classes=3)())
    three_steps(resadapt.inject_adapters(early, "layer*", 8, head="fc"), X)


@pytest.mark.parametrize("average", ["ModelEmaV2", "ModelEmaV3"])
def test_an_averaged_model_ends_in_a_verified_file(average: str, path: Path) -> None:
    rebuild = backbone("resnet18", num_classes=3)
    model = resadapt.inject_adapters(rebuild(), head="fc")
    ema = getattr(timm.utils, average)(model, decay=0.5)
    three_steps(model, X)
    ema.update(model)
    trained, averaged = resadapt.adapter_state_dict(model), resadapt.adapter_state_dict(ema.module)
    assert not any(torch.equal(trained[key], averaged[key]) for key in trained)
    resadapt.load_adapter_state_dict(model, averaged)
    reloaded = save_and_reload(model, rebuild, path, X)
    assert all(
        torch.equal(value, averaged[key])
        for key, value in resadapt.adapter_state_dict(reloaded).items()
    )
    resadapt.load_adapter_state_dict(model, trained)
    three_steps(model, X)


def test_an_average_that_rounded_its_backbone_is_refused_with_the_way_out(path: Path) -> None:
    model = resadapt.inject_adapters(backbone("resnet18", num_classes=3)(), head="fc")
    ema = timm.utils.ModelEmaV2(model, decay=0.9)
    ema.update(model)
    with pytest.raises(
        resadapt.BackboneDriftError,
        match=r"average of models \(EMA\).*load_adapter_state_dict\(model, ",
    ):
        resadapt.save_adapters(ema.module, path)


def test_several_tasks_on_one_backbone(path: Path) -> None:
    rebuild = with_three_classes("convnext_atto")
    model = resadapt.inject_adapters(rebuild(), "stages.3", 8, name="day", head="head.fc")
    resadapt.inject_adapters(model, "stages.[23]", 8, name="night", head="head.fc")
    with resadapt.adapters_disabled(model):
        assert_same_outputs(model, rebuild(), X)
    for name in ("day", "night"):
        resadapt.set_active_adapters(model, name)
        three_steps(model, X)
    for name in ("day", "night"):
        resadapt.set_active_adapters(model, name)
        save_and_reload(model, rebuild, path.with_name(f"{name}.pt"), X)
    resadapt.remove_adapters(model)
    assert_same_outputs(model, rebuild(), X)


@pytest.mark.parametrize(
    ("name", "layers", "options"),
    [
        (
            "resnet18d",
            "layer*.*",
            {"family": "conv", "scheme": "residual-parallel"},
        ),  # its shortcuts pool first
        ("resnet26", "layer*.*.conv2", {"family": "lora", "dora": True}),
    ],
)
def test_families_that_read_the_input(
    name: str, layers: str, options: dict[str, Any], path: Path
) -> None:
    # Left to itself timm starts the last norm of each branch at zero, behind which nothing learns.
    train_save_reload(
        seeded(lambda: timm.create_model(name, num_classes=3, zero_init_last=False)),
        layers,
        path,
        X,
        **options,
    )


@pytest.mark.parametrize(
    ("name", "layers", "family"),
    [
        ("tf_efficientnet_lite0", "blocks.[12].0.conv_dw", "lora"),  # Conv2dSame
        ("tf_efficientnet_lite0", "blocks.[12].0.conv_dw", "parallel"),
        ("tf_efficientnet_lite0", "blocks.[12].0.conv_dw", "conv"),
        ("resnetv2_50x1_bit", "stages.[01].blocks.0.conv2", "lora"),  # StdConv2d
        ("nfnet_l0", "stages.[01].0.conv2", "parallel"),  # ScaledStdConv2d
    ],
)
def test_convolutions_with_a_forward_of_their_own(
    name: str, layers: str, family: str, path: Path
) -> None:
    def build() -> Any:
        model = timm.create_model(name, num_classes=3)
        for key, parameter in model.named_parameters():
            if key.endswith("conv3.gain"):  # at zero nothing learns behind it
                nn.init.ones_(parameter)
        return model

    rebuild = seeded(build)
    sizes = {} if family == "parallel" else {"bottleneck": 8}
    model = resadapt.inject_adapters(rebuild(), layers, family=family, **sizes)
    with torch.no_grad():
        assert_same_outputs(model, rebuild(), X)
    three_steps(model, X)
    save_and_reload(model, rebuild, path, X)
    assert_same_outputs(resadapt.inference_copy(model), model, X)
    if family == "conv":
        return
    if name.startswith("tf_"):
        folded = rebuild().eval()
        folded.load_state_dict(resadapt.fold_adapters(model).state_dict())
        with torch.no_grad():
            torch.testing.assert_close(folded(X), model.eval()(X), rtol=1e-4, atol=1e-4)
        return
    with pytest.raises(
        resadapt.AdapterError,
        match=r"\((Scaled)?StdConv2d\): the forward of \w+ is not a convolution",
    ):
        resadapt.fold_adapters(model)


def test_every_convolution_of_a_port_from_tensorflow() -> None:
    """Images of two sizes, for which Conv2dSame pads differently."""
    model = timm.create_model("tf_efficientnet_lite0").eval()
    resadapt.inject_adapters(model, ["conv_stem", "blocks.*.*.conv*"], 2, family="lora")
    with_strong_adapters(model)
    folded = resadapt.fold_adapters(model)
    for size in (64, 75):
        x = torch.randn(1, 3, size, size)
        with torch.no_grad():
            expected = model(x)
            torch.testing.assert_close(
                folded(x), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item()
            )


@pytest.mark.parametrize(
    ("name", "layers"),
    [("efficientnet_b0", "blocks.*"), ("convnext_atto", "stages.*"), ("regnety_002", "s[1-4].b1")],
)
def test_a_backbone_with_another_rate_of_stochastic_depth_or_untracked_norms(
    name: str, layers: str, path: Path
) -> None:
    def build(rate: float) -> Any:
        return seeded(lambda: timm.create_model(name, drop_path_rate=rate))()

    model = resadapt.inject_adapters(build(0.3), layers, 8).eval()
    assert resadapt.save_adapters(model, path, rebuild=lambda: build(0.0)).ok
    other = build(0.1)
    for module in other.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.track_running_stats = False
    assert_same_outputs(resadapt.load_adapters(other, path), model, X)
