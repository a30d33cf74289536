"""The container of a module and its adapter in a copy has the module's attributes.

Tools that fuse norms by these attributes give the right outputs, or an error.
"""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import images, scramble
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights

import resadapt

X = images(2, 16)


class ConvNorm(nn.Module):
    """As in Ultralytics' networks: fused by an attribute `forward`, and by a method `fuse` as in
    timm's, which returns another module.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv, self.bn = (
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

    def forward_fuse(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))

    def fuse(self) -> nn.Module:
        return nn.Sequential(fuse_conv_bn_eval(self.conv, self.bn), self.act)


class Detector(nn.Module):
    """Each block has a number and the numbers of its inputs, which the model's forward reads."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(ConvNorm(3, 4), ConvNorm(4, 4), ConvNorm(4, 4))
        for number, block in enumerate(self.blocks):
            block.i, block.f = number, -1
        self.blocks[2].f = 0

    def forward(self, x: Tensor) -> Tensor:
        kept = {}
        for block in self.blocks:
            kept[block.i] = block(
                (x if block.f == -1 else kept[block.f]).to(block.conv.weight.dtype)
            )
            x = kept[block.i]
        return x


def adapted(sites: Any, family: str = "pooled", **options: Any) -> Any:
    torch.manual_seed(0)
    model = scramble(Detector())
    resadapt.inject_adapters(model, sites, family=family, example_input=X, **options)
    for parameter in resadapt.trainable_parameters(model):
        nn.init.normal_(parameter, std=0.5)
    return model.eval()


def rebuilt(conv: Any, norm: Any) -> nn.Module:
    """Ultralytics' `fuse_conv_and_bn` as of 8.0."""
    fused = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
    )
    tensors = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    fused.weight, fused.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *tensors)
    return fused


def in_place(conv: Any, norm: Any) -> nn.Module:
    """Ultralytics' `fuse_conv_and_bn` as of 8.4."""
    tensors = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *tensors)
    return conv


def fuse(model: Any, merged: Callable[[Any, Any], nn.Module]) -> Any:
    for module in [*model.modules()]:
        if isinstance(module, ConvNorm):
            module.conv = merged(module.conv, module.bn)
            del module.bn
            module.forward = module.forward_fuse
    return model


FUSIONS = pytest.mark.parametrize("merged", [rebuilt, in_place, fuse_conv_bn_eval])


@pytest.mark.parametrize(
    ("sites", "family"),
    [("blocks.*", "pooled"), ("blocks.*", "bottleneck"), ("blocks.1.act", "pooled")],
)
@FUSIONS
def test_norms_are_fused_inside_a_block_with_an_adapter(
    sites: str, family: str, merged: Callable[[Any, Any], nn.Module]
) -> None:
    model = adapted(sites, family)
    plain = resadapt.inference_copy(model)
    assert torch.equal(plain(X), model(X))
    fused = fuse(plain, merged)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    torch.testing.assert_close(fused(X), model(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("site", "family", "kind"),
    [("blocks.1.conv", "lora", "Conv2d"), ("blocks.1.bn", "ssf", "BatchNorm2d")],
)
@FUSIONS
def test_a_norm_beside_an_adapter_is_not_fused_in_silence(
    site: str, family: str, kind: str, merged: Callable[[Any, Any], nn.Module]
) -> None:
    model = adapted(site, family)
    plain = resadapt.inference_copy(model)
    assert torch.equal(plain(X), model(X))
    with pytest.raises(
        (resadapt.AdapterError, AttributeError),
        match=f"This {kind} has an adapter, which a tool that uses '.*' would ignore.*"
        + re.escape("call resadapt.fold_adapters(model) first"),
    ):
        fuse(plain, merged)
    folded = fuse(resadapt.fold_adapters(model), merged)
    torch.testing.assert_close(folded(X), model(X), rtol=1e-5, atol=1e-5)


def test_fusing_by_a_method_reaches_the_module_inside() -> None:
    """As timm's `reparameterize_model`: a method of the container would return no adapter."""

    def fuse_children(model: nn.Module) -> None:
        for name, child in model.named_children():
            if hasattr(child, "fuse"):
                setattr(model, name, child.fuse())
            else:
                fuse_children(child)

    model = adapted("blocks.*")
    plain = resadapt.inference_copy(model)
    for block in plain.blocks:
        with pytest.raises(AttributeError, match=r"ConvNorm has an adapter.* 'fuse' .*\[0\]"):
            block.fuse()
    blocks = plain.blocks
    fuse_children(blocks)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in blocks.modules())
    x = blocks[0](X)
    torch.testing.assert_close(
        blocks[2](x), model.blocks[2](model.blocks[0](X)), rtol=1e-5, atol=1e-5
    )


def leaves(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from leaves(child)
    if not module._modules:
        yield module


@pytest.mark.parametrize(
    ("site", "family"),
    [
        ("blocks.*.conv", "pooled"),
        ("blocks.*.conv", "lora"),
        ("blocks.*.conv", "bottleneck"),
        ("blocks.*.bn", "ssf"),
        ("blocks.*", "pooled"),
    ],
)
def test_norms_merged_into_the_layer_registered_before(site: str, family: str) -> None:
    """As zennit's canonizers do."""
    model = adapted(site, family)
    plain = resadapt.inference_copy(model)
    last: Any = None
    for leaf in leaves(plain):
        if isinstance(last, nn.Conv2d | nn.Linear) and isinstance(leaf, nn.BatchNorm2d):
            in_place(last, leaf)
            leaf.reset_running_stats()
            leaf.eps = 0.0
            nn.init.ones_(leaf.weight)
            nn.init.zeros_(leaf.bias)
        last = leaf
    torch.testing.assert_close(plain(X), model(X), rtol=1e-5, atol=1e-5)


def test_attributes_are_read_and_set_on_the_module_inside() -> None:
    plain = resadapt.inference_copy(adapted("blocks.1"))
    block, inside = plain.blocks[1], plain.blocks[1][0]
    assert (block.i, block.f, block.conv, type(inside)) == (1, -1, inside.conv, ConvNorm)
    with pytest.raises(AttributeError, match="no attribute 'g'"):
        _ = block.g
    block.i, block.g = 7, 8
    assert (inside.i, block.i, block.g, hasattr(inside, "g")) == (7, 7, 8, False)
    block.act = nn.ReLU()
    assert type(inside.act) is nn.ReLU
    assert [name for name, _ in block.named_children()] == ["0", "1", "2"]
    inside._hf_hook = object()  # as accelerate marks a module
    assert not hasattr(block, "_hf_hook")
    block._hf_hook = 1
    assert inside._hf_hook != 1
    block.train()
    assert block.training
    assert inside.training


def test_sizes_of_a_layer_stay_with_the_layer() -> None:
    conv = resadapt.inference_copy(adapted("blocks.1.conv", "lora")).blocks[1].conv
    assert conv.weight is conv[0].weight
    assert conv.bias is None
    for name in ("in_channels", "kernel_size", "stride"):
        with pytest.raises(AttributeError, match=f"This Conv2d has an adapter.*'{name}'"):
            getattr(conv, name)
        assert hasattr(conv[0], name)
    conv[0].weight = nn.Parameter(conv.weight * 2)
    assert conv.weight is conv[0].weight


@pytest.mark.parametrize(
    "way",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: torch.export.export(model, (X,)).module(),
        lambda model: torch.compile(model, backend="eager", fullgraph=True),
        lambda model: torch.jit.trace(model, X),
        torch.fx.symbolic_trace,
    ],
    ids=["deepcopy", "pickle", "export", "compile", "trace", "fx"],
)
@pytest.mark.parametrize(("sites", "family"), [("blocks.*", "pooled"), ("blocks.*.conv", "lora")])
def test_a_copy_whose_attributes_are_read_survives(
    way: Callable[[Any], Any], sites: str, family: str
) -> None:
    torch._dynamo.reset()
    model = adapted(sites, family)
    assert torch.equal(way(resadapt.inference_copy(model))(X), model(X))


def test_tools_may_add_buffers_to_every_module() -> None:
    """As thop does: what was added to the module inside is not the container's."""
    copied = resadapt.inference_copy(adapted("blocks.*.conv", "lora", bottleneck=2))
    for module in copied.modules():
        module.register_buffer("total_ops", torch.zeros(1))
        module.counted = id(module)
    assert all(module.counted == id(module) for module in copied.modules())
    assert len({module.total_ops.data_ptr() for module in copied.modules()}) == len(
        list(copied.modules())
    )
