"""The frozen part before the first adapter, computed once.

The same answers and gradients as the whole model, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from av1partition.data.inputs import with_quantizer
from av1partition.data.tasks import STAGE2
from av1partition.models.backbones import BackboneKind
from av1partition.models.cascade import Answers, Cascade, adapt
from av1partition.models.shared_front import BehindFront, shared_end
from av1partition.models.stage1_files import load_stage1
from av1partition.training.loop import predict_logits
from av1partition.training.small_maps import SmallMaps
from av1partition.training.trainees import behind_front
from torch import nn
from torch.utils.data import TensorDataset, default_collate

from resadapt import cache_prefix, forward_all, set_active_adapters

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("kind", "layers", "end"),
    [
        ("plain", None, "layer1"),
        ("plain", ["layer3", "layer4"], "layer3"),
        ("plain", ["layer?.?"], "maxpool"),
        ("fine", ["layer2.1", "layer4"], "layer1"),
        ("attention", None, "se1"),
        ("plain", ["layer4"], "layer4"),
        ("plain", {"layers": ["layer4"], "norm": "affine"}, "conv1"),
        ("fine", {"layers": (), "norm": "affine+stats"}, "conv1"),
        ("plain", {"layers": ["bn1", "layer2.0.bn1"], "family": "ssf"}, "bn1"),
        ("plain", {"layers": ["layer3.0.conv1"], "family": "lora", "bottleneck": 2}, "layer2"),
    ],
)
def test_behind_the_front_is_the_whole(
    kind: BackboneKind,
    layers: Sequence[str] | dict[str, Any] | None,
    end: str,
    stage1_file: Callable[[BackboneKind], Path],
) -> None:
    torch.manual_seed(0)
    options = layers if isinstance(layers, dict) else {"layers": layers}
    cascade = adapt(Cascade(load_stage1(stage1_file(kind))), STAGE2, quantizer=True, **options)
    inputs = with_quantizer(torch.rand(70, 1, 16, 16), torch.randint(0, 256, (70,)))
    labels = torch.randint(0, 3, (70,))
    assert shared_end(cascade) == end
    model, (data,) = behind_front(cascade, STAGE2, [TensorDataset(inputs, labels)], CPU)
    assert isinstance(model, BehindFront)
    assert torch.equal(
        predict_logits(model, data.tensors[0], CPU),
        predict_logits(Answers(cascade, STAGE2), inputs, CPU),
    )
    # The whole model asks its other heads too, whose dropout would draw other random numbers before
    # the one that counts.
    for heads in (cascade.stage1.head, cascade.dropout, cascade.specialists):
        for module in heads.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    trained = [p for p in cascade.parameters() if p.requires_grad]
    assert trained
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(
                0.01 * torch.randn_like(parameter)
            )  # away from starts whose gradient is zero
    results = []
    for each, x in ((model, data.tensors[0]), (Answers(cascade, STAGE2), inputs)):
        each.train()
        torch.manual_seed(1)  # the same dropout in the adapters
        with SmallMaps():
            loss = nn.functional.cross_entropy(each(x), labels)
        results.append((loss.detach(), torch.autograd.grad(loss, trained)))
    assert torch.equal(results[0][0], results[1][0])
    for ours, theirs in zip(results[0][1], results[1][1], strict=True):
        assert ours.any()
        assert torch.equal(ours, theirs)
    assert len(list(model.parameters())) == len(list(cascade.parameters())), (
        "nothing is registered twice"
    )


def test_nothing_is_shared_where_the_first_part_is_adapted(
    stage1_file: Callable[[BackboneKind], Path],
) -> None:
    torch.manual_seed(0)
    cascade = adapt(
        Cascade(load_stage1(stage1_file("plain"))), STAGE2, layers=["conv1"], family="parallel"
    )
    nn.init.normal_(cascade.backbone.get_submodule("conv1.resadapt.stage2.alpha").weight)  # type: ignore[arg-type]
    assert shared_end(cascade) == ""
    inputs = with_quantizer(torch.rand(70, 1, 16, 16), torch.randint(0, 256, (70,)))
    model, (data,) = behind_front(cascade, STAGE2, [TensorDataset(inputs, torch.zeros(70))], CPU)
    assert torch.equal(
        predict_logits(model, data.tensors[0], CPU),
        predict_logits(Answers(cascade, STAGE2), inputs, CPU),
    )


def test_the_library_gives_the_same_answers(stage1_file: Callable[[BackboneKind], Path]) -> None:
    torch.manual_seed(0)
    cascade = adapt(
        Cascade(load_stage1(stage1_file("plain"))),
        STAGE2,
        layers=["layer3", "layer4"],
        quantizer=True,
    ).eval()
    data = TensorDataset(
        with_quantizer(torch.rand(64, 1, 16, 16), torch.randint(0, 256, (64,))), torch.zeros(64)
    )
    model, (packed,) = behind_front(cascade, STAGE2, [data], CPU)
    expected = predict_logits(model, packed.tensors[0], CPU)
    with torch.no_grad(), SmallMaps():
        cache = cache_prefix(cascade, data, batch_size=64)
        features, _ = default_collate([cache[i] for i in range(64)])
        assert torch.equal(cache.forward(features)["stage2"], expected)
        answers = forward_all(cascade, data.tensors[0], [None, "stage2"])
    assert torch.equal(answers["stage2"]["stage2"], expected)
    set_active_adapters(cascade, None)
    with torch.no_grad(), SmallMaps():
        assert torch.equal(answers[None]["stage1"], cascade(data.tensors[0])["stage1"])


def test_several_sets_share_what_none_of_them_changes(
    stage1_file: Callable[[BackboneKind], Path],
) -> None:
    cascade = Cascade(load_stage1(stage1_file("plain")))
    assert shared_end(cascade) == "layer4"
    adapt(cascade, STAGE2, layers=["layer3", "layer4"])
    adapt(cascade, STAGE2, layers=["layer3.0"], name="inside")
    assert shared_end(cascade) == "layer2"
    adapt(cascade, STAGE2, layers=["layer1"], name="early")
    set_active_adapters(cascade, None)
    assert shared_end(cascade) == "layer1"
