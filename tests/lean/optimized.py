"""What the tests of optimized backbones share: measuring one, and comparing it with a plain one."""

from __future__ import annotations

import pytest
import torch
from measuring import bytes_saved
from torch import Tensor, nn

import resadapt

FOLD = pytest.mark.parametrize("fold", [True, False], ids=["folded", "exact"])


def compare(ours: Tensor, theirs: Tensor, fold: bool) -> None:
    """The same to the last bit, or as far as another order of rounding lets them be."""
    if fold:
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))
    else:
        assert torch.equal(ours, theirs)


def near(ours: Tensor, theirs: Tensor) -> None:
    """Gradients: as far as rounding lets them be, some of whose elements are differences of much
    larger numbers.
    """
    allowed = 1e-7 if theirs.dtype is torch.float64 else 0.01
    assert (ours - theirs).norm() <= allowed * theirs.norm(), (ours, theirs)


def measured(model: nn.Module, x: Tensor) -> tuple[int, Tensor, list[Tensor]]:
    """Bytes saved for backward that are not the model's own, the output, and the gradients of what
    is trained.
    """
    training = model.training
    with torch.no_grad():
        model.eval()(x)  # so that what is folded is there: constants, as the weights are
    model.train(training)
    torch.manual_seed(1)  # the same dropout
    saved, output = bytes_saved(model, x)
    output = output["out"] if isinstance(output, dict) else output
    gradients = torch.autograd.grad(
        output.square().mean(), list(resadapt.trainable_parameters(model))
    )
    return saved, output.detach(), list(gradients)


PLACES = dict.fromkeys(("pooled", "bottleneck", "mona", "series"), "layer*") | {
    **{
        "lora": "layer*.*.conv2",
        "parallel": "layer*.*.conv1",
        "conv": "layer*.*.conv1",
        "ssf": "layer*.*.bn1",
    }
}


def lies(x: Tensor) -> tuple[bool, bool]:
    """How a tensor lies in memory: strides of sides of one pixel say nothing."""
    return x.is_contiguous(), x.is_contiguous(memory_format=torch.channels_last)
