"""Several sets on one backbone: any order of switching, disabling and removing is right."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support import (
    SmallNet,
    backbone_bytes,
    images,
    picture,
    private,
    small_net,
    small_resnet,
    train,
)
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import resadapt


class Tiny(nn.Module):
    """A residual net small enough for many runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.blocks = nn.Sequential(
            nn.Conv2d(4, 4, 1), nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6))
        )
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(6), nn.Linear(6, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(torch.relu(self.bn(self.conv(x)))))


X = images(4, 6)


def without_objects(seen: dict[str, Any]) -> dict[str, Any]:
    """A picture without the identities of the parameters, which are others in a copy."""
    return {
        name: {k: v for k, v in each.items() if k != "objects"} if isinstance(each, dict) else each
        for name, each in seen.items()
    }


class AnyOrderOfCalls(RuleBasedStateMachine):
    """Injects, trains, switches, saves, copies and removes in any order, beside a model of what
    must be.
    """

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
        train(
            self.model,
            torch.optim.AdamW(self.model.parameters(), lr=0.05, weight_decay=0.1),
            inputs=X,
        )
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
        resadapt.load_adapter_state_dict(
            self.model, {k: torch.zeros_like(v) for k, v in state.items()}, name
        )
        resadapt.load_adapter_state_dict(self.model, state, name)

    @precondition(lambda self: self.expected)
    @rule(modes=st.booleans())
    def change_mode(self, modes: bool) -> None:
        self.model.train(modes)

    @rule(copier=st.sampled_from([copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]))
    def continue_with_a_copy(self, copier: Callable[[nn.Module], nn.Module]) -> None:
        left, self.model = self.model, copier(self.model)
        with torch.no_grad():
            for tensor in (*left.parameters(), *left.buffers()):  # the copy must not notice
                tensor.zero_()
        self.before = without_objects(self.before)

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
            now = picture(self.model)
            assert now == self.before or without_objects(now) == self.before
            assert resadapt.list_adapters(self.model) == []
            return
        infos = resadapt.list_adapters(self.model)
        assert {info.name: info.active for info in infos} == {
            n: n == self.active for n in self.expected
        }
        assert resadapt.check_backbone(self.model).ok
        assert torch.equal(
            self.outputs(), self.expected[self.active] if self.active else self.plain
        )
        count, active = (
            resadapt.count_parameters(self.model),
            [info for info in infos if info.active],
        )
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
    trained = private(model, "fc").weight.detach().clone()
    with pytest.raises(
        resadapt.InjectionError, match="keep_head would change the backbone under the other sets"
    ):
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
    assert not torch.equal(
        resadapt.adapter_state_dict(model, "a")["head.fc.weight"], a["head.fc.weight"]
    )


def test_leftover_gradients_do_not_move_a_set_that_was_left() -> None:
    model = resadapt.inject_adapters(small_resnet(), head="fc", name="a")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(images()).sum().backward()
    state = resadapt.adapter_state_dict(model, "a")
    resadapt.set_active_adapters(model, None)
    optimizer.step()
    assert all(torch.equal(v, state[k]) for k, v in resadapt.adapter_state_dict(model, "a").items())


def test_loading_into_a_set_leaves_no_gradients_on_the_one_before(path: Path) -> None:
    model = resadapt.inject_adapters(small_resnet(), head="fc", name="a")
    resadapt.inject_adapters(model, head="fc", name="b")
    resadapt.save_adapters(model, path, name="b", verify=False)
    resadapt.set_active_adapters(model, "a")
    model(images()).sum().backward()
    own = dict(resadapt.named_trainable_parameters(model))
    assert all(p.grad is not None for p in own.values())
    resadapt.load_adapters(model, path, name="b")
    assert all(p.grad is None for name, p in own.items() if ".resadapt.a." in name)
    model(images()).sum().backward()
    gradients = {
        name: p.grad.clone()
        for name, p in resadapt.named_trainable_parameters(model)
        if p.grad is not None
    }
    resadapt.load_adapters(model, path, name="b")
    assert all(
        torch.equal(p.grad, gradients[name])
        for name, p in resadapt.named_trainable_parameters(model)
        if p.grad is not None
    )
    resadapt.set_active_adapters(model, None)
    resadapt.load_adapters(model, path, name="b")
    assert [each.name for each in resadapt.list_adapters(model) if each.active] == ["b"]


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
        resadapt.named_trainable_parameters(model),
        resadapt.named_trainable_parameters(twin),
        strict=True,
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
        lambda: resadapt.adapter_state_dict(model, "default"),
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
            patch.setattr(resadapt.injection.installation, "watch", interrupted)
            with pytest.raises(KeyboardInterrupt):
                resadapt.inject_adapters(model, name="late", head="fc")
        assert backbone_bytes(model) == frozen
        assert [info.name for info in resadapt.list_adapters(model) if info.active] == (
            [active] if active else []
        )
        assert picture(model) == before


def test_what_is_tied_in_a_head_stays_tied(path: Path) -> None:
    head = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    head[1].weight = head[0].weight
    model = resadapt.inject_adapters(small_net(head=head), "c2", 2, head="head")
    assert model.head[0].weight is model.head[1].weight
    train(model, torch.optim.SGD(resadapt.trainable_parameters(model), lr=0.1), inputs=X)
    resadapt.save_adapters(model, path)
    expected = model.eval()(X)
    with resadapt.adapters_disabled(model):
        assert model.head[0].weight is model.head[1].weight
    assert torch.equal(model(X), expected)
    assert resadapt.count_parameters(model).head == 16 + 4 + 4


def test_heads_tied_to_each_other(path: Path) -> None:
    def tied() -> Any:
        model = small_net(head=nn.Linear(4, 4))
        model.c2.other = nn.Linear(4, 4)
        model.c2.other.weight = model.head.weight
        return model

    model = resadapt.inject_adapters(tied(), "conv", 2, head=["head", "c2.other"])
    assert private(model, "c2.other").weight is private(model, "head").weight
    with pytest.warns(resadapt.AdapterWarning, match="did not run"):
        model(X)
    train(model, torch.optim.SGD(resadapt.trainable_parameters(model), lr=0.1), inputs=X)
    assert resadapt.save_adapters(model, path, rebuild=tied).ok
    loaded = resadapt.load_adapters(tied(), path)
    assert private(loaded, "c2.other").weight is private(loaded, "head").weight
    assert torch.equal(private(loaded, "head").weight, private(model, "head").weight)


def test_a_file_with_two_tensors_where_the_model_has_one(path: Path) -> None:
    def net(tie: bool) -> Any:
        model = small_net(head=nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
        if tie:
            model.head[1].weight = model.head[0].weight
        return model

    resadapt.save_adapters(resadapt.inject_adapters(net(False), "c2", 2, head="head"), path)
    plain = net(True)
    before = picture(plain)
    with pytest.raises(
        resadapt.AdapterKeyError,
        match=r"'head.head.1.weight' is tied to 'head.head.0.weight' in this model",
    ):
        resadapt.load_adapters(plain, path)
    assert picture(plain) == before


def test_keep_head_without_an_active_set() -> None:
    model = resadapt.inject_adapters(small_net(), "c2", 2, head="head")
    with torch.no_grad():
        private(model, "head").weight.fill_(3)
    resadapt.inject_adapters(model, "c2", 2, name="b")
    resadapt.set_active_adapters(model, None)
    with pytest.raises(resadapt.InjectionError, match="none of 'default', 'b' is active"):
        resadapt.remove_adapters(model, keep_head=True)
    resadapt.remove_adapters(model, "b")
    resadapt.remove_adapters(model, keep_head=True)
    assert model.head.weight.eq(3).all()


def test_a_site_of_one_set_in_the_head_of_another() -> None:
    model = resadapt.inject_adapters(small_net(), "c2", 2, name="a")
    resadapt.inject_adapters(model, "bn", 2, name="b", head="c2")
    count = resadapt.count_parameters(model)
    assert count.head == 4 * 4 + 4 == resadapt.list_adapters(model)[1].head_parameters
    assert count.trainable == count.adapters + count.head


def test_models_that_hide_their_modules_and_parameters() -> None:
    class Hides(SmallNet):
        def modules(self) -> Any:
            return iter(())

        def named_parameters(self, *args: Any, **options: Any) -> Any:
            return iter(())

        def __setattr__(self, name: str, value: Any) -> None:
            if name != "_resadapt":
                super().__setattr__(name, value)

    torch.manual_seed(0)
    model = resadapt.inject_adapters(Hides(), "c2", 2, head="head")
    assert len(list(resadapt.trainable_parameters(model))) == 6
    assert resadapt.count_parameters(model).trainable > 0
    plain = small_net()
    with torch.no_grad():
        for parameter in resadapt.trainable_parameters(model):
            parameter.add_(1)
    assert not torch.allclose(model(X), plain(X))
    resadapt.remove_adapters(model)


def test_contexts_around_injection(path: Path) -> None:
    with torch.inference_mode():
        model = resadapt.inject_adapters(small_net(), "c2", 2, head="head")
    with torch.device("meta"):
        other = resadapt.inject_adapters(_on_cpu(), "c2", 2, head="head")
    assert {p.device.type for p in other.parameters()} == {"cpu"}
    fresh = _on_cpu()
    resadapt.inject_adapters(fresh, "c2", 2)
    train(fresh, torch.optim.SGD(resadapt.trainable_parameters(fresh), lr=0.1), inputs=X)
    assert resadapt.list_adapters(model)


def _on_cpu() -> Any:
    with torch.device("cpu"):
        return small_net()


def test_the_work_of_switching_does_not_grow_with_the_number_of_sets() -> None:
    model = small_net()
    work = []
    for number in range(12):
        resadapt.inject_adapters(model, "c2", 2, name=f"s{number}", head="head", norm="affine")
        resadapt.set_active_adapters(model, "s0")
        calls: list[str] = []
        sys.setprofile(lambda _frame, event, _arg, calls=calls: calls.append(event))
        try:
            resadapt.set_active_adapters(model, None)
            resadapt.set_active_adapters(model, "s0")
        finally:
            sys.setprofile(None)
        work.append(calls.count("call"))
    assert work[1] == work[-1]


def test_removing_checks_first_and_changes_then() -> None:
    """Sets a and b, and the block of b replaced: a must not be gone when that is found."""
    model = resadapt.inject_adapters(small_resnet(), "layer1", 4, name="a", head="fc")
    resadapt.inject_adapters(model, "layer4", 4, name="b", head="fc")
    block, model.layer4[1] = model.layer4[1], small_resnet().layer4[1]
    for active in ("b", "a", None):
        before = picture(model)
        for call in (
            lambda: resadapt.remove_adapters(model),
            lambda: resadapt.remove_adapters(model, "a"),
            lambda: resadapt.remove_adapters(model, keep_head=active is not None),
            lambda: resadapt.set_active_adapters(model, "a" if active == "b" else "b"),
            lambda: resadapt.inject_adapters(model, "layer2", name="c"),
            lambda: (
                resadapt.adapters_disabled(model).__enter__()
                if active == "b"
                else resadapt.remove_adapters(model)
            ),
        ):
            with pytest.raises(
                resadapt.InjectionError, match=r"'layer4.1' has lost its adapter of set 'b'"
            ):
                call()
            assert picture(model) == before
            assert list(model._resadapt.sets) == ["a", "b"]
        model.layer4[1], block = block, model.layer4[1]
        resadapt.set_active_adapters(model, {"b": "a", "a": None, None: None}[active])
        model.layer4[1], block = block, model.layer4[1]
    model.layer4[1] = block
    plain = picture(small_resnet())["state_dict"]
    assert picture(resadapt.remove_adapters(model))["state_dict"] == plain


@pytest.mark.parametrize(
    "move", [lambda m: m.double(), lambda m: m.to(torch.bfloat16).float(), lambda m: m]
)
def test_switching_in_inference_mode(move: Any) -> None:
    model = resadapt.inject_adapters(small_net(), "c2", 2, head="head", name="a")
    resadapt.inject_adapters(model, "c2", 2, head="head", name="b")
    move(model)
    x = images().to(model.conv.weight.dtype)
    with torch.inference_mode():
        for name in ("a", None, "b", "a"):
            resadapt.set_active_adapters(model, name)
            model(x)
    assert not any(tensor.is_inference() for tensor in model.state_dict().values())
    train(model, torch.optim.SGD(resadapt.trainable_parameters(model), lr=0.1), inputs=x)
    resadapt.set_active_adapters(model, "b")
    train(model, torch.optim.SGD(resadapt.trainable_parameters(model), lr=0.1), inputs=x)
    resadapt.remove_adapters(model)
    assert model.head.weight.requires_grad
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), inputs=x)


@pytest.mark.parametrize("inside", [False, True])
def test_a_model_that_was_built_in_inference_mode(inside: bool) -> None:
    with torch.inference_mode():
        model = small_net()
        before = picture(model)
        if inside:
            resadapt.inject_adapters(model, "c2", 2, head="head")
    if not inside:
        resadapt.inject_adapters(model, "c2", 2, head="head")
    with torch.inference_mode():
        model(images())
    with resadapt.adapters_disabled(model):
        pass
    assert resadapt.check_backbone(model).ok
    resadapt.remove_adapters(model)
    assert picture(model) == before


def test_names_mean_the_active_set_where_they_are_left_out(tmp_path: Path) -> None:
    model = resadapt.inject_adapters(small_net(), "c2", 2, name="day", head="head")
    assert resadapt.save_adapters(model, tmp_path / "one.pt").ok, (
        "with one set there is nothing to say"
    )
    assert resadapt.read_adapter_info(tmp_path / "one.pt").set.name == "day"
    resadapt.inject_adapters(model, "bn", 3, name="night")
    assert resadapt.read_adapter_info(_saved(model, tmp_path)).set.name == "night"
    assert next(iter(resadapt.adapter_state_dict(model))) == "adapters.bn.down.weight"
    resadapt.load_adapter_state_dict(model, resadapt.adapter_state_dict(model))
    resadapt.set_active_adapters(model, "day")
    assert resadapt.read_adapter_info(_saved(model, tmp_path)).set.name == "day"
    resadapt.set_active_adapters(model, None)
    for call in (
        lambda: _saved(model, tmp_path),
        lambda: resadapt.adapter_state_dict(model),
        lambda: resadapt.load_adapter_state_dict(model, {}),
        lambda: resadapt.inference_copy(model),
    ):
        with pytest.raises(
            resadapt.AdapterKeyError,
            match=r"No adapter set is active; the model has 'day', 'night'.* with name=",
        ):
            call()
    resadapt.remove_adapters(model, "night")
    assert resadapt.read_adapter_info(_saved(model, tmp_path)).set.name == "day", (
        "the only one there is"
    )


def _saved(model: nn.Module, folder: Path) -> Path:
    resadapt.save_adapters(model, folder / "saved.pt")
    return folder / "saved.pt"


def test_a_head_glob_passes_over_modules_without_parameters() -> None:
    head = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 2))
    model = resadapt.inject_adapters(small_net(head=head), "c2", 2, head="head.*")
    assert resadapt.list_adapters(model)[0].head == ("head.0", "head.3")
    for wrong in ("head.1", "head.[12]"):
        with pytest.raises(
            resadapt.InjectionError, match=r"head: module 'head\.\S+' has no parameters to train"
        ):
            resadapt.inject_adapters(small_net(head=copy.deepcopy(head)), "c2", 2, head=wrong)


def test_an_attribute_that_is_called_like_the_slot() -> None:
    model = small_net()
    model.c2.resadapt = "mine"
    before = picture(model)
    with pytest.raises(
        resadapt.InjectionError,
        match=r"'c2' .* has a child or attribute named 'resadapt'",
    ):
        resadapt.inject_adapters(model, "c2", 2)
    assert picture(model) == before
    resadapt.inject_adapters(model, "bn", 2)


def test_wrappers_are_seen_through() -> None:
    model = resadapt.inject_adapters(small_net(), "c2", 2, head="head")
    for wrapper in (
        AveragedModel(model),
        nn.DataParallel(AveragedModel(model)),
        torch.compile(nn.DataParallel(model)),
    ):
        assert (
            resadapt.count_parameters(wrapper).adapters == resadapt.count_parameters(model).adapters
        )
        assert [info.name for info in resadapt.list_adapters(wrapper)] == ["default"]
        assert resadapt.check_backbone(wrapper).ok

    class Task(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

    with pytest.raises(
        resadapt.InjectionError, match=r"Its submodule 'net' was: pass model.get_submodule\('net'\)"
    ):
        resadapt.adapter_state_dict(Task())
