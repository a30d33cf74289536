"""Several sets on one backbone, switching, disabling, removing: every order of calls keeps the books straight."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support import backbone_bytes, images, picture, small_resnet, train
from torch import Tensor, nn

import resadapt


class Tiny(nn.Module):
    """A residual net small enough for many runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.blocks = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(6), nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(torch.relu(self.bn(self.conv(x)))))


X = images(4, 6)


class AnyOrderOfCalls(RuleBasedStateMachine):
    """Injects, trains, switches, saves, copies and removes in any order, beside a model of what must be."""

    @initialize(training=st.booleans())
    def build(self, training: bool) -> None:
        torch.manual_seed(0)
        self.model = Tiny().train()
        self.model(X)
        self.model.train(training)
        self.model.conv.weight.requires_grad_(training)
        self.model.bn.eval()
        self.before = picture(self.model)
        self.plain = self.outputs()
        self.expected: dict[str, Tensor] = {}
        self.active: str | None = None

    def outputs(self) -> Tensor:
        flags = [(m, m.training) for m in self.model.modules()]
        with torch.no_grad():
            result = self.model.eval()(X)
        for module, flag in flags:
            module.training = flag
        return result

    @rule(
        name=st.sampled_from(["a", "b", "c"]),
        layers=st.sampled_from(["bn", "blocks", ["conv", "blocks"], ["blocks.0", "blocks.1"]]),
        head=st.sampled_from([(), "head", "head.3"]),
    )
    def inject(self, name: str, layers: str | list[str], head: str | tuple[str, ...]) -> None:
        if name in self.expected:
            with pytest.raises(resadapt.InjectionError, match="already"):
                resadapt.inject_adapters(self.model, layers, 2, name=name, head=head)
        else:
            resadapt.inject_adapters(self.model, layers, 2, name=name, head=head)
            self.active = name
            self.expected[name] = self.outputs()

    @precondition(lambda self: self.active)
    @rule()
    def fit(self) -> None:
        train(self.model, torch.optim.AdamW(self.model.parameters(), lr=0.05, weight_decay=0.1), inputs=X)
        self.expected[self.active] = self.outputs()

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def switch(self, data: st.DataObject) -> None:
        self.active = data.draw(st.sampled_from([None, *self.expected]))
        resadapt.set_active_adapters(self.model, self.active)

    @precondition(lambda self: self.expected)
    @rule()
    def disable(self) -> None:
        with resadapt.adapters_disabled(self.model):
            assert torch.equal(self.outputs(), self.plain)
            with resadapt.adapters_disabled(self.model):
                assert torch.equal(self.outputs(), self.plain)

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def reload(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(list(self.expected)))
        state = resadapt.adapter_state_dict(self.model, name)
        resadapt.load_adapter_state_dict(self.model, {k: torch.zeros_like(v) for k, v in state.items()}, name)
        resadapt.load_adapter_state_dict(self.model, state, name)

    @precondition(lambda self: self.expected)
    @rule(modes=st.booleans())
    def change_mode(self, modes: bool) -> None:
        self.model.train(modes)

    @rule()
    def continue_with_a_copy(self) -> None:
        if self.expected:  # parameters of a copy are other objects, so `before` is of no use to it
            copied = copy.deepcopy(self.model)
            resadapt.remove_adapters(copied)
            assert picture(copied)["state_dict"] == self.before["state_dict"]

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([None, *self.expected]))
        resadapt.remove_adapters(self.model, name)
        if name is None:
            self.expected, self.active = {}, None
        else:
            del self.expected[name]
            self.active = None if self.active == name else self.active

    @invariant()
    def books_are_straight(self) -> None:
        if not self.expected:
            assert picture(self.model) == self.before
            assert resadapt.list_adapters(self.model) == []
            return
        infos = resadapt.list_adapters(self.model)
        assert {info.name: info.active for info in infos} == {n: n == self.active for n in self.expected}
        assert resadapt.check_backbone(self.model).ok
        assert torch.equal(self.outputs(), self.expected[self.active] if self.active else self.plain)
        count, active = resadapt.count_parameters(self.model), [info for info in infos if info.active]
        assert count.trainable == count.adapters + count.head
        assert count.adapters == sum(info.adapter_parameters for info in active)
        assert count.head == sum(info.head_parameters for info in active)


AnyOrderOfCalls.TestCase.settings = settings(max_examples=60, stateful_step_count=15, deadline=None)
test_any_order_of_calls = AnyOrderOfCalls.TestCase


def test_removal_restores_a_whole_resnet() -> None:
    model = small_resnet().eval()
    model.layer2.train()
    model.conv1.weight.requires_grad_(False)
    model.layer4.register_forward_hook(lambda m, a, o: None)
    before = picture(model)
    resadapt.inject_adapters(model, head="fc")
    model.train()
    train(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    model.requires_grad_(True)
    resadapt.remove_adapters(model)
    assert picture(model) == before


def test_keep_head() -> None:
    model = resadapt.inject_adapters(small_resnet(), head="fc")
    resadapt.inject_adapters(model, "layer4", name="other")
    resadapt.set_active_adapters(model, "default")
    train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    trained = model.fc.weight.detach().clone()
    with pytest.raises(resadapt.InjectionError, match="keep_head would change the backbone under the other sets"):
        resadapt.remove_adapters(model, "default", keep_head=True)
    resadapt.remove_adapters(model, "other", keep_head=False)
    resadapt.set_active_adapters(model, None)
    resadapt.remove_adapters(model, "default", keep_head=True)
    assert torch.equal(model.fc.weight, trained)
    assert model.fc.weight.requires_grad


def test_each_set_trains_alone_with_its_own_optimizer() -> None:
    model = resadapt.inject_adapters(small_resnet(), head="fc", name="a")
    first = torch.optim.AdamW(resadapt.trainable_parameters(model), lr=0.01)
    train(model, first, steps=1)
    resadapt.inject_adapters(model, head="fc", name="b")
    second = torch.optim.AdamW(resadapt.trainable_parameters(model), lr=0.01)
    a = resadapt.adapter_state_dict(model, "a")
    train(model, second)
    first.step()  # nothing of it is active, nothing has gradients
    assert all(torch.equal(v, a[k]) for k, v in resadapt.adapter_state_dict(model, "a").items())
    b = resadapt.adapter_state_dict(model, "b")
    assert not torch.equal(a["head.fc.weight"], b["head.fc.weight"])
    resadapt.set_active_adapters(model, "a")
    train(model, first)
    assert all(torch.equal(v, b[k]) for k, v in resadapt.adapter_state_dict(model, "b").items())
    assert not torch.equal(resadapt.adapter_state_dict(model, "a")["head.fc.weight"], a["head.fc.weight"])


def test_leftover_gradients_do_not_move_a_set_that_was_left() -> None:
    model = resadapt.inject_adapters(small_resnet(), head="fc", name="a")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(images()).sum().backward()
    state = resadapt.adapter_state_dict(model, "a")
    resadapt.set_active_adapters(model, None)
    optimizer.step()
    assert all(torch.equal(v, state[k]) for k, v in resadapt.adapter_state_dict(model, "a").items())


def test_disabling_between_forward_and_backward() -> None:
    """As for distillation: the teacher is the same model with its adapters off."""
    model = resadapt.inject_adapters(small_resnet(), head="fc").eval()
    twin = copy.deepcopy(model)
    output = model(images())
    with resadapt.adapters_disabled(model), torch.no_grad():
        model(images())
    output.square().sum().backward()
    twin(images()).square().sum().backward()
    for (name, p), (_, q) in zip(
        resadapt.named_trainable_parameters(model), resadapt.named_trainable_parameters(twin), strict=True
    ):
        assert p.grad is not None, name
        assert torch.equal(p.grad, q.grad), name


def test_disabling_survives_an_error_and_a_removal() -> None:
    model = resadapt.inject_adapters(small_resnet(), head="fc")
    with pytest.raises(ZeroDivisionError), resadapt.adapters_disabled(model):
        raise ZeroDivisionError
    assert resadapt.list_adapters(model)[0].active
    with resadapt.adapters_disabled(model):
        resadapt.remove_adapters(model)
    assert resadapt.list_adapters(model) == []


def test_a_head_follows_the_model_while_it_is_parked() -> None:
    model = resadapt.inject_adapters(small_resnet(), head="fc").double()
    x = images().double()
    with resadapt.adapters_disabled(model):
        assert model(x).dtype == torch.float64
    model(x)
    resadapt.remove_adapters(model)
    assert model.fc.weight.dtype == torch.float64


def test_unknown_set() -> None:
    model = resadapt.inject_adapters(small_resnet(), name="day")
    for call in (
        lambda: resadapt.set_active_adapters(model, "nigth"),
        lambda: resadapt.remove_adapters(model, "default"),
        lambda: resadapt.adapter_state_dict(model),
    ):
        with pytest.raises(resadapt.AdapterKeyError, match="the model has 'day'"):
            call()


def test_an_interrupted_injection_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_resnet()
    for stage in (None, "a"):
        if stage:
            resadapt.inject_adapters(model, "layer1", name=stage, head="fc")
        before, active = picture(model), stage
        frozen = backbone_bytes(model)

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(resadapt.injection.installation, "watch_first_forward", interrupted)
            with pytest.raises(KeyboardInterrupt):
                resadapt.inject_adapters(model, name="late", head="fc")
        assert backbone_bytes(model) == frozen
        assert [info.name for info in resadapt.list_adapters(model) if info.active] == ([active] if active else [])
        assert picture(model) == before
