"""Trainable parameters, groups, counts and the table, against sums made by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import private, small_resnet
from torch import nn
from torchvision.models import resnet18

import resadapt


def test_the_study_model() -> None:
    model = resnet18()
    model.fc = nn.Linear(512, 3)
    resadapt.inject_adapters(model, ("layer1", "layer2", "layer3", "layer4"), 64, head="fc")
    count = resadapt.count_parameters(model)
    assert (count.adapters, count.head, count.trainable) == (124_096, 1_539, 125_635)
    assert count.total == sum(p.numel() for p in model.parameters())
    assert count.frozen == sum(p.numel() for p in model.parameters() if not p.requires_grad)
    smaller = resadapt.inject_adapters(resnet18(), bottleneck=25)
    assert resadapt.count_parameters(smaller).adapters == 49_060, (
        "the figure in the study's own text"
    )


def test_trainable_parameters_are_the_sets_own() -> None:
    model = resadapt.inject_adapters(small_resnet(), head="fc")
    named = dict(resadapt.named_trainable_parameters(model))
    assert len(named) == 4 * 4 + 2
    assert all(
        ".resadapt.default." in name or name.startswith("fc.resadapt.default@fc.") for name in named
    )
    assert [id(p) for p in resadapt.trainable_parameters(model)] == [id(p) for p in named.values()]
    model.requires_grad_(True)
    assert list(dict(resadapt.named_trainable_parameters(model))) == list(named), (
        "never one of the backbone"
    )
    assert resadapt.count_parameters(model).trainable > 11_000_000, (
        "and the count tells that it was unfrozen"
    )
    model.layer1.requires_grad_(False)
    private(model, "fc").bias.requires_grad_(False)
    assert len(list(resadapt.trainable_parameters(model))) == 3 * 4 + 1


@settings(max_examples=20, deadline=None)
@given(
    head=st.booleans(),
    head_lr=st.sampled_from([None, 0.5]),
    decay=st.sampled_from([0.0, 0.1]),
    decay_bias=st.booleans(),
)
def test_groups(head: bool, head_lr: float | None, decay: float, decay_bias: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    resadapt.inject_adapters(model, ["0", "1"], 2, head="3" if head else ())
    groups = resadapt.parameter_groups(
        model, 0.25, head_lr=head_lr, weight_decay=decay, decay_bias=decay_bias
    )
    seen = [id(p) for group in groups for p in group["params"]]
    assert len(seen) == len(set(seen))
    assert set(seen) == {id(p) for p in model.parameters() if p.requires_grad}
    assert all(group["params"] for group in groups)
    heads = {id(p) for p in model[3].parameters()}
    for group in groups:
        for p in group["params"]:
            assert group["lr"] == (head_lr if id(p) in heads and head_lr is not None else 0.25)
            assert group["weight_decay"] == (decay if decay_bias or p.ndim > 1 else 0.0)
            assert p.requires_grad
    torch.optim.AdamW(groups).step()


def test_groups_that_nothing_is_said_of() -> None:
    model = resadapt.inject_adapters(small_resnet(), head="fc")
    groups = resadapt.parameter_groups(model, 0.25)
    assert [(group["name"], group["lr"], group["weight_decay"]) for group in groups] == [
        ("adapters", 0.25, 0.0),
        ("head", 0.25, 0.0),
    ]
    groups = resadapt.parameter_groups(model, 0.25, weight_decay=0.5)
    assert [(group["name"], group["weight_decay"]) for group in groups] == [
        ("adapters", 0.5),
        ("head", 0.5),
    ], "biases too"
    groups = resadapt.parameter_groups(model, 0.25, weight_decay=0.5, decay_bias=False)
    names = ["adapters", "adapters, no decay", "head", "head, no decay"]
    assert [(group["name"], group["weight_decay"]) for group in groups] == list(
        zip(names, [0.5, 0.0] * 2, strict=True)
    )


@pytest.mark.parametrize("name", ["lr", "head_lr", "weight_decay", "decay_bias"])
def test_bad_rates_are_named(name: str) -> None:
    model = resadapt.inject_adapters(small_resnet(), head="fc")
    with pytest.raises(resadapt.AdapterError, match=rf"^{name}\b"):
        resadapt.parameter_groups(model, **{"lr": 0.1, name: -1.0})


def test_sizes_that_are_not_known_yet() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.LazyLinear(2))
    with pytest.raises(resadapt.AdapterError, match=r"Parameter '1\.weight' has no shape yet"):
        resadapt.count_parameters(model)


def test_nothing_to_train() -> None:
    model = resadapt.inject_adapters(small_resnet(), head="fc")
    with resadapt.adapters_disabled(model):
        assert list(resadapt.trainable_parameters(model)) == []
        assert resadapt.count_parameters(model).adapters == 0
        assert resadapt.summary(model).rows == ()
        with pytest.raises(resadapt.AdapterKeyError, match="no trainable parameters"):
            resadapt.parameter_groups(model, 0.1)
    assert resadapt.count_parameters(resnet18()).adapters == 0


def test_summary_agrees_with_the_counts() -> None:
    model = resadapt.inject_adapters(small_resnet(), {"layer1": 4, "layer[34]": 0.25}, head="fc")
    table, count = resadapt.summary(model), resadapt.count_parameters(model)
    assert sum(row[4] for row in table.rows) == count.adapters + count.head
    assert sum(row[5] for row in table.rows) == pytest.approx(count.trainable / count.total)
    assert [row[:4] for row in table.rows] == [
        ("layer1", "pooled", 64, 4),
        ("layer3", "pooled", 256, 64),
        ("layer4", "pooled", 512, 128),
        ("fc", "head", None, None),
    ]
    lines = str(table).splitlines()
    assert len({len(line) for line in lines}) == 1
    for label in ("adapters", "head", "trainable", "frozen", "total"):
        (line,) = [line for line in lines if line.startswith(label + " ")]
        assert f"{getattr(count, label):,}" in line


def test_a_shared_parameter_counts_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    resadapt.inject_adapters(model, "1", 2)
    assert resadapt.count_parameters(model).frozen == 16 + 4 + 4
