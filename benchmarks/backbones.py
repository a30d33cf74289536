"""The backbones of the sweep: the small ConvNets of timm and of torchvision's builders.

One of each family of timm at least, more where a family has several kinds of blocks. Families that
are mostly attention are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import nn

__all__ = ["CASES", "Case", "layers_of"]


@dataclass(frozen=True)
class Case:
    """A backbone, with random weights, and what it is run on.

    Args:
        library: ``timm`` or ``torchvision``.
        model: Name of the model there.
        size: Height and width of the pictures.
        layers: The sites; None for the ends of the stages, as timm knows them.
        inside: Where the convolutions are that are folded, if others run several times.
        options: Arguments of the builder.
        frames: Number of frames, for video; 0 for pictures.
        pairs: Whether the model takes two batches.
        detects: Whether it is a detector of torchvision: lists of pictures, and targets in
            training.
    """

    library: str
    model: str
    size: int = 64
    layers: tuple[str, ...] | None = None
    inside: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    frames: int = 0
    pairs: bool = False
    detects: bool = False

    def build(self) -> Any:
        """The model, in evaluation mode, with the same weights in every process."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if self.library == "timm":
                model = import_module("timm").create_model(self.model, **self.options)
            else:
                models = import_module("torchvision.models")
                model = models.get_model(self.model, weights=None, **self.options)
            self._fill_statistics(model)
        return model.eval()

    @torch.no_grad()
    def _fill_statistics(self, model: nn.Module) -> None:
        """Gives norms the statistics of the inputs.

        With those that a norm starts with, the signal vanishes in some models.
        """
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        before = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
        self.call(model.train(), self.inputs())
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum

    def inputs(self) -> Any:
        """Two samples."""
        shape = (self.frames, self.size, self.size) if self.frames else (self.size, self.size)
        images = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(0))
        if self.pairs:
            return images, images.flip(0)
        return (list(images),) if self.detects else images

    def call(self, model: nn.Module, inputs: Any) -> Any:
        """The outputs, or the losses of a detector in training."""
        arguments = inputs if isinstance(inputs, tuple) else (inputs,)
        if self.detects and model.training:
            box = torch.tensor([[4.0, 4.0, self.size / 2, self.size / 2]])
            target = {"boxes": box, "labels": torch.tensor([1])}
            arguments = (*arguments, [target for _ in arguments[0]])
        return model(*arguments)


def layers_of(model: Any, case: Case) -> tuple[str, ...]:
    """The sites of a case, as names or globs."""
    if case.layers is not None:
        return case.layers
    return tuple({stage["module"]: None for stage in model.feature_info if stage["module"]})


def _timm() -> Iterator[Case]:
    for name in _TIMM.split():
        model, _, size = name.partition("@")
        yield Case("timm", model, int(size or 64), _INSIDE.get(model))


def _torchvision() -> Iterator[Case]:
    bare: dict[str, Any] = {"weights_backbone": None}
    for name, layers in _TORCHVISION.items():
        yield Case("torchvision", name, 64, layers)
    quiet = {"init_weights": False, "aux_logits": False}
    yield Case("torchvision", "googlenet", 64, ("inception*",), options=quiet)
    yield Case("torchvision", "inception_v3", 96, ("Mixed_*",), options=quiet)
    for name in ("fcn_resnet50", "deeplabv3_resnet50"):
        yield Case("torchvision", name, 64, ("backbone.layer*",), options=bare)
    mobile: tuple[str, ...] = ("backbone.[369]", "backbone.1[25]")
    for name in ("deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"):
        yield Case("torchvision", name, 64, mobile, options=bare)
    for name in ("r3d_18", "mc3_18", "r2plus1d_18"):
        yield Case("torchvision", name, 32, ("layer*",), frames=4)
    yield Case("torchvision", "s3d", 224, ("features.[23569]", "features.1*"), frames=16)
    yield Case(
        "torchvision",
        "raft_small",
        128,
        ("context_encoder.layer*",),
        "context_encoder.",
        pairs=True,
    )
    residual, small = ("backbone.body.layer*",), {"min_size": 64, "max_size": 64}
    yield _detector("retinanet_resnet50_fpn", residual, **small, score_thresh=0.0)
    yield _detector("fcos_resnet50_fpn", residual, **small, score_thresh=0.0)
    yield _detector("fasterrcnn_resnet50_fpn", residual, **small, box_score_thresh=0.0)
    name, mobile = "fasterrcnn_mobilenet_v3_large_320_fpn", ("backbone.body.[369]",)
    yield _detector(name, mobile, **small, box_score_thresh=0.0)
    yield _detector("ssd300_vgg16", ("backbone.features.[05]", "backbone.features.1[07]"))
    yield _detector("ssdlite320_mobilenet_v3_large", ("backbone.features.0.*",))


def _detector(name: str, layers: tuple[str, ...], **options: Any) -> Case:
    options |= {"weights_backbone": None}
    return Case("torchvision", name, 64, layers, "backbone.", options, detects=True)


_REGNET = ("s[1-4].b1",)
_INSIDE = {
    "densenet121": ("features.transition*",),
    "hrnet_w18_small": ("layer1", "incre_modules.*"),
    "rdnet_tiny": ("dense_stages.*.*.dense_block0",),
    "regnetx_002": _REGNET,
    "regnety_002": _REGNET,
    "regnetz_005": _REGNET,
    "selecsls42": ("features.*.conv6",),
}
"""Sites where the ends of the stages are no module, return a list, or call all their children."""
_TIMM = """
eca_halonext26ts@256 lambda_resnet26t@256 repvgg_a0 mobileone_s0 gernet_s convmixer_768_32
convnext_atto convnextv2_atto cs3darknet_focus_s cspresnet50 cspnext_tiny densenet121 dla46_c
dpn48b dpn68 edgenext_xx_small efficientnet_b0 tf_efficientnet_lite0 mnasnet_small mixnet_s
fbnetc_100 mobilenetv2_035 tinynet_e fasternet_t0 fastvit_t8 focalnet_tiny_srf ghostnet_050
ghostnetv2_100 hardcorenas_a hgnetv2_b0 hrnet_w18_small inception_next_atto
inception_resnet_v2@96 inception_v3@96 inception_v4@96 mambaout_femto poolformer_s12
convformer_s18 mobilenetv3_small_050 lcnet_035 lcnetv2_small nasnetalarge@96 nf_regnet_b0
eca_nfnet_l0 pnasnet5large@96 rdnet_tiny regnetx_002 regnety_002 regnetz_005 repghostnet_050
repvit_m0_9 res2net50_14w_8s resnest14d resnet10t resnet18 seresnet18 resnetv2_18 rexnet_100
selecsls42 legacy_seresnet18 skresnet18 starnet_s050 tresnet_m vgg11 vgg11_bn
ese_vovnet19b_slim_dw legacy_xception@96 xception41@96
"""
"""Models, with the size of the pictures if 64 is too small."""
_TORCHVISION: dict[str, tuple[str, ...]] = {
    "alexnet": ("features.[0368]", "features.10"),
    "convnext_tiny": ("features.[1357]",),
    "densenet121": ("features.transition*", "features.norm5"),
    "efficientnet_b0": ("features.[1-7]",),
    "efficientnet_v2_s": ("features.[1-6]",),
    "mnasnet0_5": ("layers.[89]", "layers.1[0123]"),
    "mobilenet_v2": ("features.[369]", "features.1[25]"),
    "mobilenet_v3_small": ("features.[369]", "features.11"),
    "regnet_x_400mf": ("trunk_output.block*",),
    "regnet_y_400mf": ("trunk_output.block*",),
    "resnet18": ("layer*",),
    "resnet50": ("layer*",),
    "resnext50_32x4d": ("layer*",),
    "shufflenet_v2_x0_5": ("stage*",),
    "squeezenet1_1": ("features.[369]", "features.12"),
    "vgg11": ("features.[038]", "features.1[18]"),
    "vgg11_bn": ("features.[048]", "features.1[158]"),
    "wide_resnet50_2": ("layer*",),
}
CASES: dict[str, Case] = {
    f"{case.library}/{case.model}": case for case in (*_timm(), *_torchvision())
}
"""Every backbone by library and model."""
