"""transformers: models that register hooks of their own in a forward, built from small configs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import images, picture
from torch import nn

import resadapt

transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 37,
}


def segformer() -> Any:
    config = transformers.SegformerConfig(
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
    )
    return transformers.SegformerForSemanticSegmentation(config)


def dpt() -> Any:
    config = transformers.DPTConfig(
        **SMALL | {"num_hidden_layers": 4},
        image_size=32,
        patch_size=8,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[4, 8, 8, 16],
        fusion_hidden_size=8,
    )
    return transformers.DPTForDepthEstimation(config)


def wav2vec2() -> Any:
    config = transformers.Wav2Vec2Config(
        **SMALL,
        conv_dim=(16, 16, 16),
        conv_stride=(5, 2, 2),
        conv_kernel=(10, 3, 3),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        output_hidden_states=True,
    )
    return transformers.Wav2Vec2Model(config)


def bert() -> Any:
    config = transformers.BertConfig(
        **SMALL, vocab_size=99, max_position_embeddings=16, output_attentions=True
    )
    return transformers.BertModel(config)


IDS = torch.arange(32).reshape(2, 16) * 3
MODELS: list[tuple[Callable[[], Any], Any, str, int]] = [
    (segformer, images(2, 64), "segformer.stages.*.blocks.*.mlp", -1),
    (segformer, images(2, 64), "decode_head.linear_fuse", 1),
    (dpt, images(2, 32), "neck.fusion_stage.layers.*", 1),
    (wav2vec2, torch.randn(2, 4000), "encoder.layers.*.feed_forward", -1),
    (wav2vec2, torch.randn(2, 4000), "feature_extractor.conv_layers.*", 1),
    (
        bert,
        {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)},
        "encoder.layer.*.output",
        -1,
    ),
]


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize(("build", "example", "layers", "dim"), MODELS)
def test_an_injection_leaves_no_hooks_of_the_model_behind(
    build: Callable[[], Any], example: Any, layers: str, dim: int
) -> None:
    torch.manual_seed(0)
    model = build()
    before = picture(model)
    resadapt.inject_adapters(model, layers, 2, example_input=example)
    assert {site.channel_dim for site in resadapt.list_adapters(model)[0].sites} == {dim}
    resadapt.remove_adapters(model)
    assert picture(model) == before
    with pytest.raises(resadapt.InjectionError, match=f"channel_dim={-dim} is wrong"):
        resadapt.inject_adapters(model, layers, 2, example_input=example, channel_dim=-dim)
    assert picture(model) == before
    # The model does register hooks, so that this shows something, and they work afterwards.
    resadapt.inject_adapters(model, layers, 2, example_input=example)
    with_adapters = hooks(model)
    call = model(**example) if isinstance(example, dict) else model(example)
    assert hooks(model) > with_adapters
    assert call is not None
