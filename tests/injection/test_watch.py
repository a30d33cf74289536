"""No adapter is idle in silence: what runs never or without a gradient is named."""

from __future__ import annotations

import copy
import dataclasses
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import images, picture, private, small_net, small_resnet, train
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torchvision.models.resnet import BasicBlock

import resadapt

X = images(2, 8)


class Paths(nn.Module):
    """Modules that run once, twice, sometimes, never, or not as modules."""

    def __init__(self) -> None:
        super().__init__()
        self.once, self.twice, self.never, self.inside = (nn.Conv2d(3, 3, 1) for _ in range(4))
        self.pair = nn.Conv2d(3, 3, 1)
        self.attention = nn.MultiheadAttention(3, 1, batch_first=True)
        self.train_only = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        x = self.once(x)
        x = self.inside.forward(x)
        x = self.pair(x) + (self.pair(other) if other is not None else 0)
        tokens = x.flatten(2).transpose(1, 2)
        x = x + self.attention(tokens, tokens, tokens)[0].transpose(1, 2).reshape(x.shape)
        if self.training:
            x = self.train_only(x)
        return self.twice(self.twice(x))


def paths() -> Any:
    torch.manual_seed(0)
    return Paths()


def warned(run: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [
        str(each.message) for each in caught if issubclass(each.category, resadapt.AdapterWarning)
    ]


@pytest.mark.parametrize("site", ["never", "inside", "attention.out_proj"])
def test_a_site_that_never_runs_is_named_at_the_first_forward(site: str, path: Path) -> None:
    model = resadapt.inject_adapters(paths(), ["once", site], 2)
    for _ in range(2):
        with pytest.raises(
            resadapt.VerificationError,
            match=rf"sites +failed +the adapters at '{site}' did not run",
        ) as caught:
            resadapt.save_adapters(model, path, probe=X)
    assert not caught.value.report.ok
    assert not list(path.parent.iterdir())
    model = resadapt.inject_adapters(paths(), ["once", site], 2)
    (message,) = warned(lambda: model(X))
    assert f"The adapters at '{site}' did not run in the first forward" in message
    assert "once" not in message
    assert warned(lambda: model(X)) == [], "once is enough"
    resadapt.inject_adapters(model, [site], 2, name="other")
    assert len(warned(lambda: model(X))) == 1, "each set is looked at"
    assert (
        resadapt.save_adapters(model, path, name="default", probe=X, verify=False)["sites"].outcome
        == "not checked"
    )
    report = resadapt.verify_adapters(model, path, probe=X)
    assert (report["sites"].outcome, report.ok) == ("failed", False)


def _gradient_of_the_layer(model: nn.Module, site: str) -> None:
    """What captum's DeepLift does: notes the layer's input and output, with a rule of its own for
    what is between them.
    """
    model.get_submodule(site).register_forward_pre_hook(lambda _module, _args: None)
    model.get_submodule(site).register_forward_hook(lambda _module, _args, _output: None)


def _full_backward(model: nn.Module, site: str) -> None:
    model.get_submodule(site).register_full_backward_hook(
        lambda _module, _grad_input, _grad_output: None
    )


@pytest.mark.parametrize("hook", [_gradient_of_the_layer, _full_backward])
def test_hooks_for_the_gradient_of_a_layer_that_carries_an_adapter_are_told(
    hook: Callable[[nn.Module, str], None],
) -> None:
    model = resadapt.inject_adapters(paths(), ["once", "pair"], 2).eval()
    hook(model, "once")
    (message,) = warned(lambda: model(X))
    assert "The hooks on site 'once' see the layer and its adapter as one layer." in message
    with torch.no_grad():
        assert warned(lambda: model(X)) == [], "without gradients they only look"
    with resadapt.adapters_disabled(model):
        assert warned(lambda: model(X)) == []
    assert warned(lambda: model.train()(X)) == []


def test_hooks_that_only_look_are_not_told() -> None:
    model = resadapt.inject_adapters(paths(), "once", 2).eval()
    model.once.register_forward_hook(lambda _module, _args, _output: None)
    blocks = resadapt.inject_adapters(small_resnet(), "layer4").eval()
    _gradient_of_the_layer(blocks, "layer4.1")  # not a layer: its gradient has no rule
    early = paths().eval()
    _gradient_of_the_layer(early, "once")  # before the adapter, whose input they see
    assert (
        warned(lambda: (model(X), blocks(images()), resadapt.inject_adapters(early, "once", 2)(X)))
        == []
    )


def test_a_model_that_runs_all_its_sites_warns_of_nothing(path: Path) -> None:
    model = resadapt.inject_adapters(small_resnet(), head="fc")
    assert warned(lambda: train(model, torch.optim.SGD(model.parameters(), lr=0.1))) == []
    assert resadapt.save_adapters(model, path)["sites"].detail == "all 4 adapters ran on the probe"
    assert warned(lambda: resadapt.load_adapters(small_resnet(), path)) == []


def test_a_part_of_the_model_may_run_as_often_as_one_likes() -> None:
    model = resadapt.inject_adapters(small_net(), "c2", 2)
    model(X)
    for _ in range(2):
        model.c2(torch.zeros(1, 4, 2, 2))


class Interrupt(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyboardInterrupt


def test_an_interrupted_forward_leaves_no_count() -> None:
    """KeyboardInterrupt is no Exception, and torch calls no hooks after it."""
    model = resadapt.inject_adapters(small_net(), ["conv", "c2"], 2)
    head, model.head = model.head, Interrupt()
    with pytest.raises(KeyboardInterrupt):
        model(X)
    model.head = head
    for _ in range(2):
        model.conv(X)
    model(X)
    for _ in range(2):
        model.conv(X)


def test_a_first_forward_that_fails_leaves_no_count() -> None:
    model = resadapt.inject_adapters(small_net(head=nn.Linear(5, 2)), "c2", 2)
    with pytest.raises(RuntimeError):
        model(X)
    for _ in range(2):
        model.c2(torch.zeros(1, 4, 2, 2))
    model.head = nn.Linear(4, 2).requires_grad_(False)
    assert warned(lambda: model(X)) == []


def test_threads() -> None:
    model = resadapt.inject_adapters(small_net(), ["bn", "c2"], 2).eval()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            for _ in range(20):
                model(X)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_an_injected_model_inside_another_one() -> None:
    """A student that calls its teacher, both injected: each counts for itself."""

    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.teacher = [resadapt.inject_adapters(small_net(), "c2", 2)]

        def forward(self, x: Tensor) -> Tensor:
            self.teacher[0](x)
            x = self.conv(x)
            return x + self.teacher[0](x).mean()

    model = resadapt.inject_adapters(Student(), "conv", 2)
    for _ in range(2):
        assert warned(lambda: model(X)) == []


class Detaches(nn.Module):
    """What hand-made training loops do to a frozen backbone."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
        self.neck = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        if self.how == "no_grad":
            with torch.no_grad():
                x = self.body(x)
        elif self.how == "reentrant":
            x = checkpoint(self.body, x, use_reentrant=True)
        elif self.how == "checkpoint":
            x = checkpoint(self.body, x, use_reentrant=False)
        else:
            x = self.body(x)
        if self.how == "detach":
            x = x.detach()
        result = self.head(self.neck(x).mean((2, 3)))
        return {"nested": [result, None]} if self.how == "nested" else result


@pytest.mark.parametrize("how", ["no_grad", "detach", "nested", "plain", "checkpoint", "reentrant"])
def test_an_adapter_that_gets_no_gradient_is_named_at_the_first_training_forward(how: str) -> None:
    model = resadapt.inject_adapters(Detaches(how), ["body", "neck"], 2, head="head")
    model.eval()
    assert warned(lambda: model(X)) == []
    model.train()
    with torch.no_grad():
        assert warned(lambda: model(X)) == []
    x = X.clone().requires_grad_(how == "reentrant")
    messages = warned(lambda: model(x))
    if how in ("no_grad", "detach"):
        (message,) = messages
        assert "'body' get no gradient from the model's output" in message
    else:
        assert messages == []
    assert warned(lambda: model(x)) == []


def test_an_adapter_frozen_by_hand_needs_no_gradient() -> None:
    model = resadapt.inject_adapters(Detaches("no_grad"), ["body", "neck"], 2)
    model.body[0].requires_grad_(False)
    model.body[1].requires_grad_(False)
    assert warned(lambda: model(X)) == []


def test_compiled_blocks_are_not_said_to_be_idle() -> None:
    torch._dynamo.reset()
    for compile_ in (
        lambda m: m.c2.compile(backend="eager"),
        lambda m: setattr(m, "c2", torch.compile(m.c2, backend="eager")),
        lambda m: setattr(m.c2, "forward", torch.compile(m.c2.forward, backend="eager")),
    ):
        model = resadapt.inject_adapters(small_net(), ["conv", "c2"], 2)
        compile_(model)
        assert warned(lambda model=model: model(X)) == []


def test_activation_checkpointing_put_on_afterwards(path: Path) -> None:
    model = resadapt.inject_adapters(small_resnet(), head="fc")
    train(model, torch.optim.SGD(resadapt.trainable_parameters(model), lr=0.1))
    expected = model.eval()(images())
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, BasicBlock))
    assert torch.equal(model(images()), expected)
    assert (
        warned(lambda: train(model, torch.optim.SGD(resadapt.trainable_parameters(model), lr=0.0)))
        == []
    )
    assert resadapt.check_backbone(model).ok
    report = resadapt.save_adapters(model, path, rebuild=small_resnet)
    assert {check.name for check in report.checks if check.outcome != "passed"} == {"metric"}
    assert torch.equal(resadapt.load_adapters(small_resnet(), path).eval()(images()), expected)
    with resadapt.adapters_disabled(model):
        assert torch.equal(model.eval()(images()), small_resnet().eval()(images()))
    resadapt.remove_adapters(model)
    assert not any("resadapt" in name for name, _ in model.named_modules())
    assert all(module.training for module in model.modules()), "as before the injection"


def test_recomputing_in_checkpoints_is_not_running_twice() -> None:
    model = resadapt.inject_adapters(
        nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(4)]), ["1", "2"], 2
    )

    class Wrapped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint_sequential(model, 2, x, use_reentrant=False)

    for _ in range(2):
        Wrapped()(X.clone().requires_grad_()).sum().backward()
    model(X)


def test_a_head_that_was_replaced_is_told_at_the_first_training_forward(path: Path) -> None:
    model = resadapt.inject_adapters(small_net(), "c2", 2, head="head")
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), inputs=X)
    model.head = nn.Linear(4, 2)  # of the same shape: nothing else would tell
    assert resadapt.check_backbone(model).reasons["head"] == "was replaced after the injection"
    model.eval()(X)
    for _ in range(2):
        with pytest.raises(
            resadapt.InjectionError,
            match=r"'head' were replaced after the injection.*replace the head before",
        ):
            model.train()(X)
    with pytest.raises(
        resadapt.BackboneDriftError, match="'head' was replaced after the injection"
    ):
        resadapt.save_adapters(model, path)
    before = picture(model)
    for call in (
        lambda: resadapt.remove_adapters(model),
        lambda: resadapt.set_active_adapters(model, None),
        lambda: resadapt.inject_adapters(model, "c2", 2, name="other"),
    ):
        with pytest.raises(resadapt.InjectionError, match="it was replaced after the injection"):
            call()
        assert picture(model) == before


def test_a_head_that_is_gone() -> None:
    model = resadapt.inject_adapters(
        small_net(head=nn.Sequential(nn.Linear(4, 2))), "c2", 2, head="head.0"
    )
    del model.head[0]
    assert resadapt.check_backbone(model).reasons["head.0"] == "(Linear) is missing"
    with pytest.raises(
        resadapt.InjectionError, match=r"has no module 'head.0'|'head.0' were replaced"
    ):
        model.train()(X)
    with pytest.raises(resadapt.InjectionError):
        resadapt.summary(model)


@pytest.mark.parametrize(
    "copier",
    [
        copy.deepcopy,
        lambda m: m.double().float(),
        lambda m: m.to(memory_format=torch.channels_last),
    ],
)
def test_a_head_that_only_moved_is_the_same(copier: Callable[[Any], Any]) -> None:
    model = copier(resadapt.inject_adapters(small_net(), "c2", 2, head="head"))
    resadapt.inject_adapters(model, "c2", 2, name="other")
    resadapt.set_active_adapters(model, "default")
    model.train()(X)
    assert resadapt.check_backbone(model).ok
    before = set(small_net().head.__dict__)
    resadapt.remove_adapters(model)
    assert set(model.head.__dict__) == before


@dataclasses.dataclass
class SetLater:
    logits: Tensor
    loss: Tensor = dataclasses.field(init=False)


def _holds_itself(y: Tensor) -> Any:
    output: dict[str, Any] = {"y": y}
    output["all"] = output
    return output


@pytest.mark.parametrize("wrap", [SetLater, _holds_itself])
def test_outputs_that_cannot_be_walked_to_the_end(wrap: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Any:
            return wrap(self.conv(x))

    assert resadapt.inject_adapters(Net(), "conv", 2).train()(images(2, 8))


def two_sets() -> Any:
    model = resadapt.inject_adapters(small_net(), "c2", 2, name="other", head="head")
    return resadapt.inject_adapters(model, "c2", 2, name="own", head="head", norm="affine+stats")


def test_a_set_that_other_code_froze_is_told_at_the_next_training_forward() -> None:
    model = two_sets()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    model.requires_grad_(False)
    for forward in (lambda: model.eval()(X), lambda: resadapt.adapters_disabled(model)):
        assert warned(forward) == []
    (message,) = warned(lambda: model.train()(X))
    assert "Set 'own': none of its parameters requires a gradient" in message
    assert "Call set_active_adapters(model, 'own')" in message
    assert warned(lambda: model(X)) == [], "once"
    resadapt.set_active_adapters(model, "own")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    model(X).sum().backward()
    assert all(p.grad is not None for p in resadapt.trainable_parameters(model))
    model.requires_grad_(False)
    (message,) = warned(lambda: model(X))  # another time
    assert "none of its parameters requires a gradient" in message
    resadapt.set_active_adapters(model, "own")
    resadapt.set_active_adapters(model, "other")
    with resadapt.adapters_for(model, ["own", "other"]):  # trains both
        model.requires_grad_(False)
    resadapt.set_active_adapters(model, "own")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_a_set_frozen_in_part_is_not_told() -> None:
    model = two_sets()
    for module in (private(model, "head", "own"), private(model, "bn", "own")):
        module.requires_grad_(False)
    assert warned(lambda: model.train()(X)) == []
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    resadapt.set_active_adapters(model, "own")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    nothing_to_train = resadapt.inject_adapters(small_net(), (), norm="stats")
    assert warned(lambda: nothing_to_train.train()(X)) == []


def test_one_of_a_mixed_batchs_sets_may_be_frozen() -> None:
    model = two_sets()
    private(model, "head", "other").requires_grad_(False)
    for each in model.c2.resadapt.children():
        each.requires_grad_(False)
    with resadapt.adapters_for(model, ["own", "other"]):
        for path, parameter in model.named_parameters():
            if ".other" in path:
                parameter.requires_grad_(False)
        assert warned(lambda: model.train()(X)) == []


def test_a_thawed_backbone_is_told_at_the_next_training_forward_and_freezes_again(
    tmp_path: Path,
) -> None:
    """Ultralytics' trainer, for one, sets requires_grad on every parameter."""
    model = two_sets()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.requires_grad_(True)
    assert warned(lambda: model.eval()(X)) == []
    (message,) = warned(lambda: model.train()(X))
    assert "The backbone is not frozen any more: 'conv.weight'" in message
    assert "Call set_active_adapters(model, 'own'), which freezes the backbone again" in message
    assert warned(lambda: model(X).sum().backward()) == [], "once"
    resadapt.set_active_adapters(model, "own")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert warned(lambda: model(X)) == []
    model.bn.weight.requires_grad_(True)  # later, as at an epoch that a callback was given
    (message,) = warned(lambda: model(X))
    assert "not frozen any more: 'bn.weight' require" in message
    resadapt.set_active_adapters(model, "own")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model(X).sum().backward()
    optimizer.step()
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert changed
    assert all(flags[name] for name in changed)
    assert resadapt.save_adapters(model, tmp_path / "a.pt").ok


@pytest.mark.parametrize("name", ["other", None])
def test_a_switch_freezes_a_thawed_backbone_too(name: str | None) -> None:
    model = two_sets()
    model.requires_grad_(True)
    model(X).sum().backward()
    resadapt.set_active_adapters(model, name)
    backbone = [p for path, p in model.named_parameters() if "resadapt" not in path.split(".")]
    assert not any(p.requires_grad or p.grad is not None for p in backbone)
    trained = {path for path, _ in resadapt.named_trainable_parameters(model)}
    assert all(".other" in path for path in trained)
    assert bool(trained) is (name is not None)
