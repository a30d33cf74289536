"""Which norms are folded: those that a forward gives a convolution's output, in any class."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from optimized import compare, near
from support import images
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import resadapt
from resadapt.base.overlay import PAIRS, Overlay


class Block(nn.Module):
    """What the blocks below have; each one's forward is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 1)
        self.m, self.n = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.skip = False
        self.seen: list[object] = []


class Branches(Block):
    def forward(self, x: Tensor, scale: float = 1.0, return_first: bool = False) -> Any:
        first, second = self.a(x), self.b(x)
        if return_first:
            return first
        return F.relu(self.n(second)) + scale * self.m(first)


class Swapped(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.m(self.b(self.n(self.a(x)).relu()))


class UsedTwice(Block):
    def forward(self, x: Tensor) -> Tensor:
        first = self.a(x)
        return self.m(first) + first + self.n(self.b(x))


class RunTwice(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.m(self.a(self.m(self.a(x)))) + self.n(self.b(x))


class NormFirst(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.n(self.a(self.m(x))))


class Untraceable(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.n(self.b(self.m(self.a(x)))) if x.sum() != 0 else x


class OtherInTraining(Block):
    def forward(self, x: Tensor) -> Tensor:
        first = self.a(x)
        return self.n(self.b(first if self.training else self.m(first)))


class Checkpointed(Block):
    def forward(self, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return self.m(self.a(x))

        return self.n(self.b(checkpoint(inner, x, use_reentrant=False)))


class Remembering(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        self.seen.append(x)
        return self.m(self.a(x)) + torch.rand(())


class Keeping(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.seen[:] = [{"first": self.a(x)}]
        self.features = self.b(x)
        return self.m(self.seen[0]["first"]) + self.n(self.features)  # type: ignore[index]


class ByKeyword(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.n(input=self.b(input=self.m(self.a(x))))


class Skipping(Block):
    def forward(self, x: Tensor) -> Tensor:
        first = self.a(x)
        return first if self.skip else self.m(first)


def injected(kind: type[Block]) -> Any:
    torch.manual_seed(0)
    net: Any = nn.Sequential(nn.Conv2d(3, 4, 3), kind(), nn.Conv2d(4, 4, 1))
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_var.uniform_(0.5, 4)
            norm.running_mean.normal_()
    return resadapt.inject_adapters(net, "0", family="ssf")


@pytest.mark.parametrize(
    ("kind", "pairs"),
    [
        (Branches, {"a": "m", "b": "n"}),
        (Swapped, {"a": "n", "b": "m"}),
        (UsedTwice, {"b": "n"}),
        (RunTwice, {"b": "n"}),
        (NormFirst, {"a": "n"}),
        (Untraceable, None),
        (OtherInTraining, {"b": "n"}),
        (Checkpointed, None),
        (Remembering, {"a": "m"}),
        (Keeping, None),
        (ByKeyword, {"a": "m", "b": "n"}),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_pairs_are_found_from_the_forward(kind: Any, pairs: Any, training: bool) -> None:
    model = injected(kind).train(training)
    x = images(2, 12)
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        out = model(x)
        gradients = torch.autograd.grad(out.square().sum(), [*resadapt.trainable_parameters(model)])
        results.append((out, gradients))
        state = torch.get_rng_state()
        seen = len(model[1].seen)
        resadapt.optimize_backbone(model)
        assert len(model[1].seen) == seen, "tracing leaves the module as it was"
        assert torch.equal(torch.get_rng_state(), state)
    assert model[1].__dict__.get(PAIRS) == pairs
    compare(results[1][0], results[0][0], fold=True)
    for ours, theirs in zip(results[1][1], results[0][1], strict=True):
        near(ours, theirs)


def test_a_forward_that_runs_otherwise_than_it_was_traced() -> None:
    model = resadapt.optimize_backbone(injected(Skipping)).eval()
    x = images(2, 12)
    model(x)
    model[1].skip = True
    with pytest.raises(resadapt.InjectionError, match=r"Skipping ran otherwise.*fold_norms=False"):
        model(x)
    expected = resadapt.optimize_backbone(model, fold_norms=False)(x)
    assert torch.equal(expected, resadapt.restore_backbone(model)(x))


def test_an_argument_that_was_not_traced() -> None:
    model = injected(Branches).eval()
    x = images(2, 12)[:, :1].expand(-1, 4, -1, -1)
    plain = model[1](x, scale=2.0)
    resadapt.optimize_backbone(model)
    compare(model[1](x, scale=2.0), plain, fold=True)
    with pytest.raises(resadapt.InjectionError, match="ran otherwise"):
        model[1](x, return_first=True)


def test_convolutions_called_outside_the_forward_they_were_found_in() -> None:
    model = injected(Swapped).eval()
    x = images(2, 12)[:, :1].expand(-1, 4, -1, -1)
    expected = [model[1].a(x), model[1].n(model[1].a(x)), nn.Sequential(model[1].a, model[1].n)(x)]
    resadapt.optimize_backbone(model)(images(2, 12))
    found = [model[1].a(x), model[1].n(model[1].a(x)), nn.Sequential(model[1].a, model[1].n)(x)]
    assert all(map(torch.equal, found, expected))


def test_copies_and_pickles_of_what_folds() -> None:
    model = resadapt.optimize_backbone(injected(Swapped)).eval()
    x = images(2, 12)
    expected, buffer = model(x), io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(other(x), expected)
        assert type(other[1]).__name__ == "Swapped"
        resadapt.remove_adapters(other)
        assert type(other[1]) is Swapped
        assert not any(isinstance(module, Overlay) for module in other.modules())
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[1].n.running_mean.add_(1)
    assert torch.equal(model(x), expected)
    assert not torch.allclose(other(x), expected)


def test_a_hook_that_calls_a_convolution_itself() -> None:
    """It gets what the stock convolution gives."""
    model, seen = injected(Swapped).eval(), []
    model[1].register_forward_hook(lambda module, args, _: seen.append(module.a(args[0])))
    for _ in range(2):
        model(images(2, 12))
        resadapt.optimize_backbone(model)
    assert torch.equal(*seen)


def test_the_signature_stays() -> None:
    model = resadapt.optimize_backbone(injected(Branches))
    assert inspect.signature(model[1].forward) == inspect.signature(Branches().forward)


def test_a_norm_that_is_compiled() -> None:
    model, x = injected(Swapped).eval(), images(2, 12)
    plain = model(x)
    model[1].n.compile(backend="eager")
    compare(resadapt.optimize_backbone(model)(x), plain, fold=True)


def test_a_thawed_norm_gets_its_gradient() -> None:
    model = resadapt.optimize_backbone(injected(Swapped)).eval()
    model(images(2, 12))
    weight = model[1].n.weight.requires_grad_()
    with pytest.warns(resadapt.AdapterWarning, match="not frozen any more"):
        model.train()(images(2, 12)).sum().backward()
    assert weight.grad is not None
