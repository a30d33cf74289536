"""The pooled adapter against the study's model written by hand, and against plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import images, private, small_resnet
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

import resadapt
from resadapt.adapters import PooledAdapter, Site


class StudyAdapter(nn.Module):
    """As the study wrote it: global average pool, Linear, ReLU, Dropout, Linear, added back per
    channel.
    """

    def __init__(self, channels: int, bottleneck: int, dropout: float) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.net = nn.Sequential(
            nn.Linear(channels, bottleneck),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(bottleneck, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        n, c, _, _ = x.shape
        return x + self.net(self.pool(x).view(n, c)).view(n, c, 1, 1)


class StudyResNet(ResNet):
    """Adapters called explicitly between the stages."""

    def __init__(self, bottleneck: int, dropout: float) -> None:
        super().__init__(BasicBlock, [2, 2, 2, 2], num_classes=3)
        self.extra = nn.ModuleList(
            StudyAdapter(c, bottleneck, dropout) for c in (64, 128, 256, 512)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage, adapter in zip(
            (self.layer1, self.layer2, self.layer3, self.layer4), self.extra, strict=True
        ):
            x = adapter(stage(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


@pytest.mark.parametrize("training", [False, True])
def test_bit_identical_to_the_study_in_outputs_and_gradients(training: bool) -> None:
    model = small_resnet()
    weights = model.state_dict()
    study = StudyResNet(64, 0.1)
    missing = study.load_state_dict(weights, strict=False).missing_keys
    assert all(key.startswith("extra.") for key in missing)
    resadapt.inject_adapters(model, bottleneck=64, head="fc", dropout=0.1)
    for site, extra in zip(resadapt.list_adapters(model)[0].sites, study.extra, strict=True):
        adapter = model.get_submodule(f"{site.owner}.resadapt.default")
        with torch.no_grad():  # large enough to matter
            for parameter in adapter.parameters():
                parameter.normal_(std=0.1)
        extra.net[0].load_state_dict(adapter.down.state_dict())
        extra.net[3].load_state_dict(adapter.up.state_dict())

    model.train(training)
    study.train(training)
    for module in study.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    x = images(4, 64).requires_grad_()
    results = []
    for each in (model, study):
        torch.manual_seed(3)  # the same dropout masks
        output = each(x)
        gradient = torch.autograd.grad(output.square().sum(), x, retain_graph=True)[0]
        output.square().sum().backward()
        results.append((output.detach(), gradient))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    for site, extra in zip(resadapt.list_adapters(model)[0].sites, study.extra, strict=True):
        adapter = model.get_submodule(f"{site.owner}.resadapt.default")
        for ours, theirs in ((adapter.down, extra.net[0]), (adapter.up, extra.net[3])):
            assert torch.equal(ours.weight.grad, theirs.weight.grad)
            assert torch.equal(ours.bias.grad, theirs.bias.grad)
    assert torch.equal(private(model, "fc").weight.grad, study.fc.weight.grad)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 3),
    c=st.integers(1, 5),
    b=st.integers(1, 4),
    spatial=st.lists(st.integers(1, 4), max_size=3),
)
def test_against_loops(n: int, c: int, b: int, spatial: list[int]) -> None:
    adapter = PooledAdapter(Site(c, len(spatial)), b).double().eval()
    nn.init.normal_(adapter.down.weight)
    nn.init.normal_(adapter.up.weight)
    nn.init.normal_(adapter.down.bias)
    nn.init.normal_(adapter.up.bias)
    x = torch.randn(n, c, *spatial, dtype=torch.float64)
    expected = x.clone()
    for i in range(n):
        means = [x[i, j].reshape(-1).tolist() for j in range(c)]
        means = [sum(values) / len(values) for values in means]
        hidden = [
            max(
                0.0,
                sum(adapter.down.weight[k, j].item() * means[j] for j in range(c))
                + adapter.down.bias[k].item(),
            )
            for k in range(b)
        ]
        for j in range(c):
            expected[i, j] += (
                sum(adapter.up.weight[j, k].item() * hidden[k] for k in range(b))
                + adapter.up.bias[j].item()
            )
    torch.testing.assert_close(adapter(x), expected)


def test_gradients() -> None:
    adapter = PooledAdapter(Site(3), 2, dropout=0.0).double()
    nn.init.normal_(adapter.up.weight)
    nn.init.normal_(adapter.down.weight)
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: adapter(x), (x, *adapter.parameters()))


def test_start() -> None:
    torch.manual_seed(0)
    adapter = PooledAdapter(Site(512), 64)
    for linear in (adapter.down, adapter.up):
        assert linear.weight.std().item() == pytest.approx(1e-3, rel=0.02)
        assert not linear.bias.any()
    x = torch.randn(2, 512, 3, 3)
    assert not torch.equal(adapter(x), x)
    assert torch.equal(PooledAdapter(Site(512), 64, init="identity")(x), x)


def test_identity_start_learns() -> None:
    model = resadapt.inject_adapters(small_resnet(), "layer4", 4, init="identity")
    x = images()
    model.eval()
    with resadapt.adapters_disabled(model):
        plain = model(x)
    assert torch.equal(model(x), plain)
    model(x).square().sum().backward()
    assert model.layer4[-1].resadapt.default.up.weight.grad.abs().max() > 0


def test_dropout_only_in_training() -> None:
    adapter = PooledAdapter(Site(4), 64, dropout=0.9)
    nn.init.normal_(adapter.up.weight)
    nn.init.constant_(adapter.down.bias, 1.0)
    x = torch.randn(1, 4, 2, 2)
    assert not torch.equal(adapter(x), adapter(x))
    assert torch.equal(adapter.eval()(x), adapter(x))


def test_channels_last_is_kept() -> None:
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    assert PooledAdapter(Site(8), 2)(x).is_contiguous(memory_format=torch.channels_last)
