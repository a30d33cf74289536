"""captum and grad-cam say of an adapted model what they say of the same model written by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from roundtrip import (
    LABELS,
    save_and_reload,
    seeded,
    small_backbone,
    small_images,
    three_steps,
    with_strong_adapters,
)
from support import small_resnet
from torch import Tensor, nn

import resadapt

X = small_images(16)
BASELINE = torch.zeros_like(X)

# captum tells each time what it does to inputs and layers.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Input Tensor 0 did not already", "ignore:Setting (forward|backward)"
)


class Net(nn.Module):
    """Every layer is a module, each used once, as attribution methods need it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act1 = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
        )
        self.conv2, self.act2 = nn.Conv2d(8, 16, 3, stride=2), nn.ReLU()
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.conv2(x))
        return self.fc(torch.flatten(self.pool(x), 1))


def net() -> Any:
    model = Net()
    model(X)  # so that the norm's statistics are not the defaults
    return model


class HandAdapter(nn.Module):
    """The adapter written down once more, without the library."""

    def __init__(self, tensors: dict[str, Tensor], site: str) -> None:
        super().__init__()
        width, channels = tensors[f"adapters.{site}.down.weight"].shape
        self.down, self.act, self.up = (
            nn.Linear(channels, width),
            nn.ReLU(),
            nn.Linear(width, channels),
        )
        for name in ("down", "up"):
            getattr(self, name).load_state_dict(
                {kind: tensors[f"adapters.{site}.{name}.{kind}"] for kind in ("weight", "bias")}
            )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.act(self.down(x.mean((2, 3)))))[:, :, None, None]


def by_hand(model: nn.Module, *sites: str) -> Any:
    """The adapted network built of plain modules, from nothing but its tensors."""
    built, tensors = seeded(net)(), resadapt.adapter_state_dict(model)
    built.fc.load_state_dict({kind: tensors[f"head.fc.{kind}"] for kind in ("weight", "bias")})
    for site in sites:
        setattr(built, site, nn.Sequential(getattr(built, site), HandAdapter(tensors, site)))
    return built.eval()


def adapted(*sites: str) -> Any:
    return with_strong_adapters(resadapt.inject_adapters(seeded(net)(), sites, 4, head="fc"))


class GuidedReLU(torch.autograd.Function):
    """A rectifier whose gradient is rectified too: Springenberg et al. 2014, arXiv:1412.6806."""

    guided = True

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad.clamp(min=0) * (x > 0)


class DeconvolvedReLU(GuidedReLU):
    """Zeiler and Fergus 2013 (arXiv:1311.2901): only the gradient is rectified."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clamp(min=0)


class Rectifier(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


def gradient(model: nn.Module, rectifier: type[torch.autograd.Function] | None = None) -> Tensor:
    """The gradient of the labels' outputs by plain autograd, with other rectifiers if asked."""
    for module in [*model.modules()] if rectifier else ():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, Rectifier(rectifier))
    x = X.clone().requires_grad_()
    (found,) = torch.autograd.grad(model(x).gather(1, LABELS[:, None]).sum(), x)
    return found


SITES = [("conv1", "conv2"), ("bn1",), ("act1", "act2")]


@pytest.fixture
def attr() -> Any:
    return pytest.importorskip("captum.attr")


def test_a_trained_network_comes_back_and_is_explained_alike(attr: Any, path: Any) -> None:
    model = resadapt.inject_adapters(seeded(net)(), ["conv1", "conv2"], 4, head="fc")
    three_steps(model, X)
    reloaded = save_and_reload(model, seeded(net), path, X)
    explained = [
        attr.DeepLift(each).attribute(X, BASELINE, target=LABELS) for each in (model, reloaded)
    ]
    assert torch.equal(*explained)


@pytest.mark.parametrize("sites", SITES)
def test_deep_lift_is_complete(sites: tuple[str, ...], attr: Any) -> None:
    """The sum of attributions is the difference of outputs, and what the network by hand gives."""
    model = adapted(*sites)
    expected = attr.DeepLift(by_hand(model, *sites)).attribute(X, BASELINE, target=LABELS)
    layers_are_rectifiers = sites == SITES[-1]
    for each in (resadapt.inference_copy(model), *([] if layers_are_rectifiers else [model])):
        attributions, delta = attr.DeepLift(each).attribute(
            X, BASELINE, target=LABELS, return_convergence_delta=True
        )
        outputs = [model(x).gather(1, LABELS[:, None])[:, 0] for x in (X, BASELINE)]
        torch.testing.assert_close(
            attributions.sum((1, 2, 3)), outputs[0] - outputs[1], atol=1e-5, rtol=1e-4
        )
        assert delta.abs().max() < 1e-5
        torch.testing.assert_close(attributions, expected)


@pytest.mark.parametrize("method", ["DeepLift", "Deconvolution"])
def test_a_rule_for_a_rectifier_that_carries_an_adapter_is_told(method: str, attr: Any) -> None:
    model = adapted("act1", "act2")
    with pytest.warns(
        resadapt.AdapterWarning, match=r"hooks on site 'act1' .*inference_copy\(model\)"
    ):
        wrong = getattr(attr, method)(model).attribute(X, target=LABELS)
    right = getattr(attr, method)(resadapt.inference_copy(model)).attribute(X, target=LABELS)
    assert not torch.allclose(wrong, right), (
        "if this is right now, the warning has no reason any more"
    )


@pytest.mark.parametrize("sites", SITES)
@pytest.mark.parametrize(
    ("method", "rectifier"), [("GuidedBackprop", GuidedReLU), ("Deconvolution", DeconvolvedReLU)]
)
def test_guided_gradients_are_those_of_guided_rectifiers(
    method: str, rectifier: type[torch.autograd.Function], sites: tuple[str, ...], attr: Any
) -> None:
    model = adapted(*sites)
    expected = gradient(by_hand(model, *sites), rectifier)
    assert not torch.allclose(expected, gradient(by_hand(model, *sites)))
    for each in (resadapt.inference_copy(model), *([] if sites == SITES[-1] else [model])):
        torch.testing.assert_close(
            getattr(attr, method)(each).attribute(X, target=LABELS), expected
        )


@pytest.mark.parametrize("sites", SITES)
def test_integrated_gradients_are_complete_and_saliency_is_the_gradient(
    sites: tuple[str, ...], attr: Any
) -> None:
    model = adapted(*sites)
    attributions, delta = attr.IntegratedGradients(model).attribute(
        X, BASELINE, target=LABELS, n_steps=200, return_convergence_delta=True
    )
    assert delta.abs().max() < 1e-2 * attributions.abs().sum((1, 2, 3)).max()
    expected = attr.IntegratedGradients(by_hand(model, *sites)).attribute(
        X, BASELINE, target=LABELS, n_steps=200
    )
    torch.testing.assert_close(attributions, expected)
    saliency = attr.Saliency(model).attribute(X, target=LABELS, abs=False)
    torch.testing.assert_close(saliency, gradient(by_hand(model, *sites)))


@pytest.mark.parametrize("sites", SITES)
def test_relevance_on_an_inference_copy_is_that_of_the_network_by_hand(
    sites: tuple[str, ...], attr: Any
) -> None:
    """LRP knows stock layers only, and takes a layer with a child for a container."""
    model = adapted(*sites)
    expected = attr.LRP(by_hand(model, *sites)).attribute(X, target=LABELS)
    relevance = attr.LRP(resadapt.inference_copy(model)).attribute(X, target=LABELS)
    assert expected.abs().max() > 0
    torch.testing.assert_close(relevance, expected)


def zennit_relevance(
    model: nn.Module, look: Callable[[], object] = lambda: None
) -> tuple[Tensor, Tensor]:
    """Outputs and relevance of inputs, by the composite that zennit has for a ResNet.

    Calls `look` while norms are merged.
    """
    attribution = pytest.importorskip("zennit.attribution")
    composites = pytest.importorskip("zennit.composites")
    canonizer = pytest.importorskip("zennit.torchvision").ResNetCanonizer()
    composite = composites.EpsilonPlusFlat(canonizers=[canonizer])
    with attribution.Gradient(model=model, composite=composite) as explainer:
        output, relevance = explainer(small_images(64), torch.eye(3)[LABELS])
        look()
    return output.detach(), relevance


@pytest.mark.parametrize("family", ["lora", "parallel", "series"])
def test_relevance_of_a_folded_model_is_that_of_a_stock_resnet(family: str) -> None:
    sizes = {"bottleneck": 8} if family == "lora" else {}
    model = resadapt.inject_adapters(
        small_resnet(), "layer*.*.conv*", family=family, head="fc", **sizes
    )
    three_steps(model, small_images(64))
    expected = model.eval()(small_images(64)).detach()
    stock = small_resnet().eval()
    stock.load_state_dict(resadapt.fold_adapters(model).state_dict())
    output, relevance = zennit_relevance(resadapt.fold_adapters(model))
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(relevance, zennit_relevance(stock)[1])


@pytest.mark.filterwarnings("ignore:The hooks on site:resadapt.AdapterWarning")
def test_a_canonizer_merges_norms_into_the_adapters_of_an_injected_model() -> None:
    """If this is right now, docs/sets.md need not warn of it any more."""
    model = resadapt.inject_adapters(small_resnet(), "layer*.*.conv*", 16, family="lora")
    three_steps(model, small_images(64))
    expected = model.eval()(small_images(64)).detach()
    output, _ = zennit_relevance(model)
    assert (output - expected).abs().max() > 0.01 * expected.abs().max()
    assert torch.equal(model(small_images(64)), expected), "zennit undoes what it merged"


@pytest.mark.parametrize(
    ("sites", "family", "unmerged"),
    [
        ("layer*", "pooled", 0),
        ("layer*.*.conv1", "pooled", 8),
        ("layer*.*.conv*", "lora", 16),
        ("layer*.*.bn*", "ssf", 0),
    ],
)
def test_zennit_merges_no_norm_into_an_adapter(sites: str, family: str, unmerged: int) -> None:
    """Its canonizer merges each norm into the layer registered before it."""
    model = with_strong_adapters(resadapt.inject_adapters(small_resnet(), sites, family=family))
    copied = resadapt.inference_copy(model)
    norms = [module for module in copied.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [norm.running_var.clone() for norm in norms]

    def check_norms() -> None:
        same = map(torch.equal, [norm.running_var for norm in norms], before)
        assert sum(same) == unmerged

    output, relevance = zennit_relevance(copied, check_norms)
    torch.testing.assert_close(output, model(small_images(64)), rtol=1e-3, atol=1e-3)
    assert relevance.isfinite().all()


def from_zero_to_one(maps: Tensor) -> Tensor:
    maps = maps - maps.amin((2, 3), keepdim=True)
    return maps / (1e-7 + maps.amax((2, 3), keepdim=True))


@pytest.mark.parametrize(
    "layer", [("layer3", 0), ("layer3", -1), ("layer4", 0), ("layer4", -1), ("layer4", None)]
)
@pytest.mark.parametrize("method", ["GradCAM", "HiResCAM"])
def test_class_activation_maps_are_those_of_the_formula(
    method: str, layer: tuple[str, int | None]
) -> None:
    """The map is the rectified sum of channels, weighted by their (mean) gradients."""
    cam = pytest.importorskip("pytorch_grad_cam")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    model = with_strong_adapters(resadapt.inject_adapters(small_backbone(), "layer*", 8, head="fc"))
    name, index = layer
    x = small_images(64).requires_grad_()  # the copy needs no gradients of its own
    chosen = int(model(x).sum(0).argmax())  # for a class that nothing speaks for, the map is empty

    def explained(each: Any) -> Tensor:
        target = getattr(each, name) if index is None else getattr(each, name)[index]
        with getattr(cam, method)(model=each, target_layers=[target]) as explainer:
            return torch.from_numpy(
                explainer(input_tensor=x, targets=[targets.ClassifierOutputTarget(chosen)] * len(x))
            )

    # By hand: the layer's output after its adapter, which another layer only has in the next
    # one's input.
    stages = [model.conv1, model.bn1, model.relu, model.maxpool, model.layer1, model.layer2]
    stages += [*model.layer3, *model.layer4]
    cut = {("layer3", 0): 7, ("layer3", -1): 8, ("layer4", 0): 9}.get(layer, 10)
    features = nn.Sequential(*stages[:cut])(x).detach().requires_grad_()
    rest = nn.Sequential(*stages[cut:], model.avgpool, nn.Flatten(), model.fc)
    (slope,) = torch.autograd.grad(rest(features)[:, chosen].sum(), features)
    weights = slope.mean((2, 3), keepdim=True) if method == "GradCAM" else slope
    raw = (weights * features).sum(1, keepdim=True).clamp(min=0).detach()
    expected = from_zero_to_one(
        nn.functional.interpolate(from_zero_to_one(raw), (64, 64), mode="bilinear")
    )[:, 0]
    assert expected.amax() > 0.99
    for each in (model, resadapt.inference_copy(model)):
        torch.testing.assert_close(explained(each), expected, atol=1e-3, rtol=1e-3)
