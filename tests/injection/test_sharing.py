"""Several sets over one input: equal to separate forwards, and what they share is computed once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixed import SETS, gradients_of, mixed_model
from support import images, small_net, small_resnet
from torch import Tensor, nn
from torch.nn.parallel import DataParallel
from torch.utils.checkpoint import checkpoint
from torchvision.models import efficientnet_b0
from torchvision.models.segmentation import deeplabv3_resnet50

import resadapt
from resadapt.injection.ledger import ledger_of


def separately(model: nn.Module, inputs: Tensor, name: str | None) -> Any:
    resadapt.set_active_adapters(model, name)
    return model(inputs)


def counted(model: nn.Module) -> Counter[str]:
    """Counts the runs of each module's forward from now on, below whatever is put over it."""
    runs: Counter[str] = Counter()

    def count(name: str, forward: Any, *args: Any, **kwargs: Any) -> Any:
        runs[name] += 1
        return forward(*args, **kwargs)

    for name, module in model.named_modules():
        if name and "resadapt" not in name:
            module.forward = lambda *args, _name=name, _forward=module.forward, **kwargs: count(
                _name, _forward, *args, **kwargs
            )
    return runs


@settings(max_examples=12, deadline=None)
@given(
    st.permutations([*SETS, None]),
    st.integers(1, 5),
    st.booleans(),
    st.sampled_from([None, False, True]),
)
def test_equal_to_separate_forwards(
    names: list[str | None], count: int, training: bool, fold_norms: bool | None
) -> None:
    names = names[:count]
    together, apart = mixed_model().train(training), mixed_model().train(training)
    rounding = 1e-8 if fold_norms else 0.0  # a norm of which one set has its own is folded for none
    for each in (together, apart) if fold_norms is not None else ():
        resadapt.optimize_backbone(each, fold_norms=fold_norms)
    active = ledger_of(together).active
    outputs = resadapt.forward_all(together, images(3).double(), names)
    assert list(outputs) == names
    assert ledger_of(together).active == active
    if names != [None]:
        sum((output.square().sum() for output in outputs.values()), torch.zeros(())).backward()
    gradients = {name: gradients_of(together, name) for name in names if name is not None}
    for name in names:
        expected = separately(apart, images(3).double(), name)
        torch.testing.assert_close(outputs[name], expected, rtol=rounding, atol=rounding)
        if name is not None:
            expected.square().sum().backward()
            for key, gradient in gradients_of(apart, name).items():
                torch.testing.assert_close(
                    gradients[name][key], gradient, rtol=100 * rounding, atol=100 * rounding
                )
            mine, theirs = (resadapt.adapter_state_dict(each, name) for each in (together, apart))
            for key, tensor in theirs.items():  # statistics move once, as in a forward of its own
                torch.testing.assert_close(mine[key], tensor, rtol=rounding, atol=rounding)


def test_what_is_shared_is_computed_once() -> None:
    model = small_resnet()
    for name, layer in (("early", "layer2"), ("late", "layer4"), ("later", "layer4"), ("head", ())):
        resadapt.inject_adapters(model, layer, name=name, head="fc")
    runs = counted(model.eval())
    resadapt.forward_all(model, images())
    assert {
        key: runs[key]
        for key in ("conv1", "maxpool", "layer1.0.conv1", "layer2.0.conv1", "layer2.1.conv2")
    } == dict.fromkeys(
        ("conv1", "maxpool", "layer1.0.conv1", "layer2.0.conv1", "layer2.1.conv2"), 1
    )
    assert runs["layer3.0.conv1"] == runs["layer4.1.conv2"] == 2, (
        "once behind the early adapter, once for all others"
    )


def test_nothing_is_computed_with_what_a_model_changed_in_place() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = (nn.Conv2d(3, 3, 1) for _ in range(3))
            self.relu = nn.ReLU(inplace=True)
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            a = self.first(x)
            a += 1
            b = self.second(a)
            self.relu(b)
            c = self.third(b)
            c += b
            return self.head(c.mean((2, 3)))

    torch.manual_seed(0)
    model = InPlace()
    resadapt.inject_adapters(model, "third", name="series", family="series", init="he")
    resadapt.inject_adapters(model, (), name="one", head="head")
    resadapt.inject_adapters(model, (), name="other", head={"head": nn.Linear(3, 4)})
    names = ["series", "one", None, "other"]
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            outputs = resadapt.forward_all(model, images(), names)
            if mode is torch.enable_grad:
                sum(output.sum() for name, output in outputs.items() if name).backward()
        for name, output in outputs.items():
            assert torch.equal(output, separately(model, images(), name)), (mode, name)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "family", ["lora", "parallel", "conv", "ssf", "mona", "bottleneck", "series"]
)
def test_every_family_at_places_inside_of_blocks(family: str, autocast: bool) -> None:
    model = small_resnet().train()
    width = {} if family in ("parallel", "ssf", "series") else {"bottleneck": 4}
    for name, layers in (
        ("a", "layer3.0.conv2"),
        ("b", "layer3.1.conv1"),
        ("c", ("layer3.0.conv1", "layer4.0.conv1")),
    ):
        resadapt.inject_adapters(model, layers, name=name, family=family, head="fc", **width)
    precision = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with precision:
        outputs = resadapt.forward_all(model, images(), ["b", None, "a", "c"])
    sum(output.sum() for name, output in outputs.items() if name).backward()
    gradients = {name: gradients_of(model, name) for name in "abc"}
    for name, output in outputs.items():
        with precision:
            expected = separately(model, images(), name)
        assert output.dtype == (torch.bfloat16 if autocast else torch.float32)
        assert torch.equal(output, expected)
        if name is not None:
            expected.sum().backward()
            for key, gradient in gradients_of(model, name).items():
                torch.testing.assert_close(gradient, gradients[name][key], rtol=0, atol=0)


def test_other_models() -> None:
    torch.manual_seed(0)
    net: Any = deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=3)
    for name in ("a", "b"):
        resadapt.inject_adapters(
            net, "backbone.layer4", 4, name=name, init="identity" if name == "a" else "normal"
        )
    outputs = resadapt.forward_all(net.eval(), images(1, 64))
    for name, output in outputs.items():
        assert torch.equal(output["out"], separately(net, images(1, 64), name)["out"])
    efficient = resadapt.inject_adapters(
        efficientnet_b0(num_classes=3), "features.7", 4, name="a", head="classifier"
    )
    resadapt.inject_adapters(efficient, "features.8", 4, name="b", head="classifier")
    for name, output in resadapt.forward_all(efficient.eval(), {"x": images()}).items():
        assert torch.equal(output, separately(efficient, images(), name))


def test_compiled_and_wrapped_models() -> None:
    model = resadapt.inject_adapters(small_net(), "conv", 2, name="a")
    resadapt.inject_adapters(model, "c2", 2, name="b").eval()
    plain = resadapt.forward_all(model, images())
    compiled = torch.compile(model, backend="eager")
    for wrapped in (compiled, DataParallel(model)):
        found = resadapt.forward_all(wrapped, images())
        assert all(torch.equal(found[name], plain[name]) for name in plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations_are_refused_in_training(reentrant: bool) -> None:
    model = resadapt.inject_adapters(small_resnet(), "layer4", 8, name="a", head="fc")
    resadapt.inject_adapters(model, "layer3", 8, name="b", head="fc")
    layer4, x = model.layer4.forward, images(2).requires_grad_()
    model.layer4.forward = lambda x: checkpoint(layer4, x, use_reentrant=reentrant)
    before = ledger_of(model).active
    with pytest.raises(
        resadapt.InjectionError,
        match=r"Module 'layer4.*runs in torch.utils.checkpoint.*the sets one by one",
    ):
        resadapt.forward_all(model.train(), x)
    assert ledger_of(model).active == before
    with torch.no_grad():  # nothing is computed again
        outputs = resadapt.forward_all(model.eval(), x)
        for name, output in outputs.items():
            assert torch.equal(output, separately(model, x, name))


def test_bad_names() -> None:
    model = resadapt.inject_adapters(small_net(), "conv", 2, name="a")
    with pytest.raises(resadapt.AdapterError, match="give a list of names"):
        resadapt.forward_all(model, images(), "a")
    with pytest.raises(resadapt.AdapterKeyError, match="no adapter set 'b'"):
        resadapt.forward_all(model, images(), ["a", "b"])
    with pytest.raises(resadapt.InjectionError, match="was not injected into"):
        resadapt.forward_all(small_net(), images())
    with (
        resadapt.adapters_for(model, ["a"]),
        pytest.raises(resadapt.InjectionError, match="Inside adapters_for"),
    ):
        resadapt.forward_all(model, images())
    before = {key: "forward" in module.__dict__ for key, module in model.named_modules()}
    with pytest.raises(RuntimeError):
        resadapt.forward_all(model, images(channels=4))
    assert {key: "forward" in module.__dict__ for key, module in model.named_modules()} == before
    assert resadapt.forward_all(model, images(), []) == {}
