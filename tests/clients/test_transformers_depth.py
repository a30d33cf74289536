"""transformers: backbones whose stochastic depth has a class of its own in every model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from roundtrip import seeded, small_images

import resadapt

transformers = pytest.importorskip("transformers")

X = small_images()
CONVNEXT = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]}
MODELS: list[tuple[str, dict[str, Any], str]] = [
    ("ConvNext", CONVNEXT, "encoder.stages.*"),
    ("ConvNextV2", CONVNEXT, "encoder.stages.*"),
    ("Swin", SWIN | {"window_size": 4}, "embeddings.patch_embeddings.projection"),
]


@pytest.mark.parametrize(("name", "settings", "layers"), MODELS)
def test_the_rate_of_stochastic_depth_is_no_part_of_the_backbone(
    name: str, settings: dict[str, Any], layers: str, path: Path
) -> None:
    config, kind = (getattr(transformers, name + end) for end in ("Config", "Model"))

    def build(rate: float) -> Any:
        return seeded(lambda: kind(config(drop_path_rate=rate, **settings)))()

    model = resadapt.inject_adapters(build(0.3), layers, 4).eval()
    report = resadapt.save_adapters(model, path, probe=X, rebuild=lambda: build(0.0))
    assert report["outputs"].outcome == "passed", report
    with torch.no_grad():
        for rate in (0.0, 0.1, 0.3):
            reloaded = resadapt.load_adapters(build(rate), path).eval()
            assert torch.equal(reloaded(X)[0], model(X)[0])
