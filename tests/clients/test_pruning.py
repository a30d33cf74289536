"""torch-pruning prunes an inference copy."""

from __future__ import annotations

from typing import Any

import pytest
from roundtrip import small_backbone, small_images, with_strong_adapters

import resadapt

X = small_images(64)


def pruned(family: str, sites: str, gradients: bool) -> Any:
    tp = pytest.importorskip("torch_pruning")
    model = with_strong_adapters(
        resadapt.inject_adapters(small_backbone(), sites, family=family, head="fc")
    )
    plain = resadapt.inference_copy(model).requires_grad_(gradients)
    pruner = tp.pruner.BasePruner(
        plain,
        X,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=[plain.fc],
        round_to=8,
    )
    pruner.step()
    return plain


@pytest.mark.parametrize(
    ("family", "sites"),
    [("pooled", "layer*"), ("bottleneck", "layer*"), ("lora", "layer*.*.conv2"), ("ssf", "bn1")],
)
def test_a_copy_is_pruned_once_its_parameters_require_gradients(family: str, sites: str) -> None:
    plain = pruned(family, sites, True)
    assert plain.layer4[0].conv1.weight.shape[0] == 256
    assert plain.layer4[1].conv1.weight.shape[0] == 256
    assert plain(X).shape == (len(X), 3)
    still = pruned(family, sites, False)
    assert still.layer4[0].conv1.weight.shape[0] == 512, "if not, the docs need not tell of it"
