"""A frozen or adapted module that other code replaces is told at the next training forward."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import images, small_net, small_resnet, train
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils.fusion import fuse_conv_bn_eval

import resadapt

X = images()
REPLACED = "were replaced after the injection.*Convert norms .*before the injection"


def adapted(*sites: str, **options: Any) -> Any:
    return resadapt.inject_adapters(small_resnet(), sites or ("layer1", "layer4"), 4, **options)


def told(model: nn.Module) -> str:
    """The message of the next training forward, which comes at each, and before any change."""
    before = copy.deepcopy(model.state_dict())
    messages = set()
    for _ in range(2):
        with pytest.raises(resadapt.InjectionError, match=REPLACED) as caught:
            model.train()(X)
        messages.add(str(caught.value))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    (message,) = messages
    return message


@pytest.mark.parametrize("norm", ["frozen", "affine+stats"])
@pytest.mark.parametrize("sites", [("layer4",), ("bn1", "layer4.1.bn2")])
def test_converted_norms_are_told(norm: str, sites: tuple[str, ...]) -> None:
    model = adapted(*sites, norm=norm)
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    message = told(model)
    assert "'bn1'" in message
    assert "conv" not in message


def test_norms_that_were_converted_before_are_frozen() -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(small_resnet())
    resadapt.inject_adapters(model, "layer4", 4)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert resadapt.check_backbone(model).ok


def test_a_conversion_that_keeps_the_slot_but_not_its_hook() -> None:
    """Children go along, as in `convert_sync_batchnorm`. This norm had no statistics to freeze."""
    model = small_net(norm=nn.BatchNorm2d(4, track_running_stats=False))
    resadapt.inject_adapters(model, "bn", 2)
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert model.bn.resadapt.sites
    assert "The modules 'bn' were replaced" in told(model)


def _fused(model: Any) -> None:
    block = model.layer2[0]
    block.conv1, block.bn1 = fuse_conv_bn_eval(block.conv1.eval(), block.bn1.eval()), nn.Identity()


def _fused_without_a_rest(model: Any) -> None:
    block = model.layer2[0]
    block.conv1, block.bn1 = fuse_conv_bn_eval(block.conv1.eval(), block.bn1.eval()), None


def _new_block(model: Any) -> None:
    model.layer4[1] = small_resnet().layer4[1].requires_grad_(False)


def _new_norm(model: Any) -> None:
    model.layer2[0].bn1 = copy.deepcopy(small_resnet().layer2[0].bn1)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (_fused, "'layer2.0.bn1'"),
        (_fused_without_a_rest, "'layer2.0.bn1'"),
        (_new_norm, "'layer2.0.bn1'"),
        (_new_block, "'layer4', 'layer4.1.bn1', 'layer4.1.bn2'"),
        (lambda model: setattr(model, "layer4", nn.Sequential()), "'layer4'"),
        (lambda model: setattr(model.layer4[1], "bn1", nn.Identity()), "'layer4.1.bn1'"),
        (lambda model: delattr(model, "bn1"), "'bn1'"),
        (lambda model: setattr(model, "fc", nn.Linear(512, 3)), "'fc'"),
    ],
)
def test_replaced_modules_are_named(change: Callable[[Any], None], names: str) -> None:
    model = adapted(head="fc")
    change(model)
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert f"The modules {names} were replaced" in told(each)


def test_a_swapped_activation_that_carried_an_adapter() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act, self.other = nn.Conv2d(3, 4, 1), nn.ReLU(), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.act(self.conv(x)))

    model = resadapt.inject_adapters(Net(), "act", 2)
    model.other = nn.SiLU()
    model.train()(X)
    model.act = nn.SiLU()
    model.eval()(X)
    assert "The modules 'act' were replaced" in told(model)


def test_frozen_norms_are_told_without_an_active_set() -> None:
    model = adapted()
    resadapt.set_active_adapters(model, None)
    _new_block(model)  # its adapter is not needed now
    assert "The modules 'layer4.1.bn1', 'layer4.1.bn2' were replaced" in told(model)


def test_the_injected_module_put_back() -> None:
    model = adapted()
    block = model.layer4[1]
    _new_block(model)
    told(model)
    model.layer4[1] = block
    model.train()(X)


def _wrapped(model: Any) -> None:
    model.layer2 = checkpoint_wrapper(model.layer2)
    model.layer4[1] = checkpoint_wrapper(model.layer4[1])
    model.bn1 = checkpoint_wrapper(model.bn1)


def _compiled(model: Any) -> None:
    model.layer4[1] = torch.compile(model.layer4[1], backend="eager")
    model.layer2[0].bn1.compile(backend="eager")


@pytest.mark.parametrize(
    "change",
    [
        _wrapped,
        _compiled,
        lambda model: nn.utils.parametrize.register_parametrization(
            model.bn1, "weight", nn.Identity()
        ),
        lambda model: setattr(model, "relu", nn.SiLU()),
        lambda model: setattr(model, "maxpool", nn.Identity()),
        lambda model: setattr(model, "layer3", nn.Conv2d(128, 256, 1)),  # with norms, none left
        lambda model: setattr(model, "conv1", copy.deepcopy(model.conv1)),
        lambda model: model.add_module("auxiliary", nn.BatchNorm2d(64)),
        lambda model: resadapt.optimize_backbone(model, fold_norms=False),
        lambda model: resadapt.optimize_backbone(model),
    ],
)
def test_no_false_alarm(change: Callable[[Any], object]) -> None:
    torch._dynamo.reset()
    model = adapted(head="fc")
    change(model)
    for each in (model, nn.DataParallel(model)):
        each.train()(X).sum().backward()


def test_accepted_norms_are_frozen_from_then_on() -> None:
    model = adapted()
    _new_norm(model)
    told(model)
    resadapt.accept_backbone(model)
    model.train()(X)
    _new_norm(model)
    assert "'layer2.0.bn1'" in told(model)


def test_a_set_injected_after_a_norm_came_in_freezes_the_norm() -> None:
    model = adapted()
    _new_norm(model)
    resadapt.inject_adapters(model, "layer3", 4, name="other")
    model.train()(X)
    _new_norm(model)
    assert "'layer2.0.bn1'" in told(model)
