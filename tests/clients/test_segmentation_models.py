"""segmentation_models_pytorch: adapters in the encoder, the segmentation head trained with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from roundtrip import save_and_reload, seeded, small_images, three_steps, train_save_reload

import resadapt

smp = pytest.importorskip("segmentation_models_pytorch")

X = small_images(64)


def segmenter(kind: str, encoder: str) -> Callable[[], Any]:
    return seeded(lambda: getattr(smp, kind)(encoder, encoder_weights=None, classes=2))


@pytest.mark.parametrize(
    ("kind", "encoder", "layers", "head"),
    [
        ("Unet", "resnet18", "encoder.layer*", "segmentation_head"),
        ("Unet", "tu-resnet18", "encoder.model.layer*", "segmentation_head.*"),
        ("FPN", "resnet34", "encoder.layer*", "segmentation_head.*"),
        ("DeepLabV3Plus", "resnet18", "encoder.layer*", "segmentation_head.*"),
        ("PSPNet", "resnet18", "encoder.layer[12]", "segmentation_head"),
        # Every DPN has the same activation object.
        ("Unet", "dpn68", "decoder.blocks.*", "segmentation_head"),
    ],
)
def test_a_segmenter_comes_back_bit_for_bit(
    kind: str, encoder: str, layers: str, head: str, path: Path
) -> None:
    model, _ = train_save_reload(segmenter(kind, encoder), layers, path, X, head=head)
    assert model(X).shape == (len(X), 2, 64, 64)


def test_stages_that_a_psp_net_never_runs_are_named_and_not_proven(path: Path) -> None:
    """With its default depth PSPNet stops after the encoder's second stage, and has all of them."""
    rebuild = segmenter("PSPNet", "resnet18")
    model = resadapt.inject_adapters(rebuild(), "encoder.layer*", 8, head="segmentation_head")
    with pytest.warns(
        resadapt.AdapterWarning, match=r"at 'encoder.layer3', 'encoder.layer4' did not run"
    ):
        model.train()(X)
    with pytest.raises(resadapt.VerificationError) as caught:
        resadapt.save_adapters(model, path, rebuild=rebuild)
    assert not caught.value.report.ok
    assert {check.name for check in caught.value.report.checks if check.outcome == "failed"} == {
        "sites"
    }
    assert not path.exists()
    # The mend that the warning gives: sites that run.
    resadapt.inject_adapters(
        resadapt.remove_adapters(model), "encoder.layer[12]", 8, head="segmentation_head"
    )
    three_steps(model, X)
    save_and_reload(model, rebuild, path, X)
