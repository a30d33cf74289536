"""Convolutions of every geometry in plain loops, and what every family must survive."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import resadapt
from resadapt.adapters import Adapter, Site
from resadapt.injection.own_dtype import apply

KINDS = {
    (dims, transposed): getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
    for dims in (1, 2, 3)
    for transposed in (0, 1)
}


@st.composite
def layers(draw: Any, most_dims: int = 3, most_channels: int = 3) -> tuple[Any, Tensor]:
    """A convolution of any geometry that torch has, in float64, and an input that it takes."""
    dims, transposed, groups = (
        draw(st.integers(1, most_dims)),
        draw(st.booleans()),
        draw(st.integers(1, 3)),
    )
    each = st.integers(1, most_channels)
    channels = (groups * draw(each), groups * draw(each))
    kernel = [draw(st.integers(1, 4 if dims < 3 else 3)) for _ in range(dims)]
    dilation = [draw(st.integers(1, 2)) for _ in range(dims)]
    stride = [draw(st.integers(1, 3)) for _ in range(dims)]
    reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    options: dict[str, Any] = {"groups": groups, "bias": draw(st.booleans())}
    if transposed:
        padding: Any = [draw(st.integers(0, span // 2)) for span in reach]
        options["output_padding"] = [
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        ]
        least = [1] * dims
    else:
        options["padding_mode"] = draw(
            st.sampled_from(["zeros", "reflect", "replicate", "circular"])
        )
        padding = draw(st.sampled_from(["same", "valid", None]))
        stride = [1] * dims if padding == "same" else stride
        padding = [draw(st.integers(0, k)) for k in kernel] if padding is None else padding
        added = {"same": [span - span // 2 for span in reach], "valid": [0] * dims}.get(
            str(padding), padding
        )
        least = [max(span + 1 - 2 * pad, pad + 1) for span, pad in zip(reach, added, strict=True)]
        least = [span + 1 for span in reach] if padding == "valid" else least
    layer = KINDS[dims, transposed](
        *channels, kernel, stride, padding, dilation=dilation, **options
    ).double()
    sizes = [size + draw(st.integers(0, 3 if dims < 3 else 1)) for size in least]
    return layer, torch.randn(draw(st.integers(1, 2)), channels[0], *sizes, dtype=torch.float64)


def slow(
    x: Tensor,
    weight: Tensor,
    layer: Any,
    sizes: Iterable[int],
    taps: Any = None,
    groups: int | None = None,
) -> Tensor:
    """What a weight gives at every output position in a layer's geometry, tap by tap; without bias.

    Args:
        x: ``[N, C_in, ...]``.
        weight: In the form of the layer's own.
        layer: Whose geometry it is.
        sizes: Spatial sizes of the output.
        taps: The taps that count; None for all.
        groups: None for the layer's.
    """
    groups = groups or layer.groups
    sums: dict[tuple[int, ...], Any] = dict.fromkeys(itertools.product(*map(range, sizes)), 0.0)
    for tap in itertools.product(*map(range, weight.shape[2:])) if taps is None else taps:
        at_tap = weight[(slice(None), slice(None), *tap)]
        if layer.transposed:
            for position in itertools.product(*map(range, x.shape[2:])):
                place = tuple(
                    p * s - pad + d * t
                    for p, s, pad, d, t in zip(
                        position, layer.stride, layer.padding, layer.dilation, tap, strict=True
                    )
                )
                if place in sums:
                    sums[place] = sums[place] + _mixed(
                        x[(slice(None), slice(None), *position)], at_tap, groups, True
                    )
            continue
        for place, value in sums.items():
            source = [
                _inside(p * s - before + d * t, size, layer.padding_mode)
                for p, s, before, d, t, size in zip(
                    place,
                    layer.stride,
                    _before(layer),
                    layer.dilation,
                    tap,
                    x.shape[2:],
                    strict=True,
                )
            ]
            if None not in source:
                sums[place] = value + _mixed(
                    x[(slice(None), slice(None), *source)], at_tap, groups, False
                )
    wide = groups * weight.shape[1] if layer.transposed else weight.shape[0]
    zeros = x.new_zeros(x.shape[0], wide)
    return torch.stack([zeros + each for each in sums.values()], dim=-1).reshape(
        x.shape[0], wide, *sizes
    )


def _before(layer: Any) -> list[int]:
    if layer.padding == "same":
        return [d * (k - 1) // 2 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    return [0] * len(layer.kernel_size) if layer.padding == "valid" else list(layer.padding)


def _inside(index: int, size: int, mode: str) -> int | None:
    """Which element of a dimension is seen at an index that may lie beside it."""
    if 0 <= index < size:
        return index
    if mode == "zeros":
        return None
    if mode == "replicate":
        return min(max(index, 0), size - 1)
    if mode == "circular":
        return index % size
    return -index if index < 0 else 2 * (size - 1) - index


def _mixed(vectors: Tensor, matrix: Tensor, groups: int, transposed: bool) -> Tensor:
    """Vectors ``[N, C_in]`` times what a weight has at one tap, group by group."""
    wide = matrix.shape[0] // groups
    parts = []
    for group, each in enumerate(vectors.chunk(groups, dim=1)):
        block = matrix[group * wide : (group + 1) * wide]
        parts.append(each @ (block if transposed else block.T))
    return torch.cat(parts, dim=1)


def pointwise(x: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
    """A convolution of one tap, position by position."""
    sizes = x.shape[2:]
    columns = [
        _mixed(column, weight.flatten(1), groups, False) for column in x.flatten(2).unbind(2)
    ]
    return torch.stack(columns, dim=2).reshape(x.shape[0], weight.shape[0], *sizes)


def site_of(module: Any) -> Site:
    linear = isinstance(module, nn.Linear)
    return (
        Site(module.out_features, 0, module=module)
        if linear
        else Site(module.out_channels, module.weight.dim() - 2, module=module)
    )


def strengthened(adapter: Any, deviation: float = 0.5) -> Any:
    """An adapter whose every parameter matters, in evaluation."""
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(deviation * torch.randn_like(parameter))
    return adapter.eval()


def assert_same_gradients(one: Tensor, other: Tensor, tensors: list[Tensor]) -> None:
    """Asks for equal values and gradients; what no output sees, as a transposed convolution may
    crop all, has one of zeros.
    """
    torch.testing.assert_close(one, other)
    weights = torch.randn_like(one)
    sums = [
        (output * weights).sum() + 0.0 * sum(tensor.sum() for tensor in tensors)
        for output in (one, other)
    ]
    pairs = [torch.autograd.grad(each, tensors) for each in sums]
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs)


@torch.no_grad()
def assert_folded(adapter: Adapter, module: Any, x: Tensor, tolerance: float, *args: Any) -> None:
    """Asks that a module with an adapter's weight gives what the adapter does, and that nothing was
    changed for it.
    """
    before = [copy.deepcopy(each.state_dict()) for each in (adapter, module)]
    output = module(x, *args)
    expected = apply(adapter, module, (x,), output)
    weight, bias = adapter.folded(module)
    for each, state in zip((adapter, module), before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in each.state_dict().items())
    assert (weight.dtype, weight.shape) == (module.weight.dtype, module.weight.shape)
    alone = copy.deepcopy(module)
    alone.weight.copy_(weight)
    assert (bias is None) == (module.bias is None)
    if bias is not None:
        alone.bias.copy_(bias)
    assert not torch.equal(alone.weight, module.weight)
    folded = alone(x, *args)
    assert folded.shape == expected.shape == output.shape
    torch.testing.assert_close(
        folded, expected, rtol=tolerance, atol=tolerance * max(1.0, expected.abs().max().item())
    )


def injected(
    model: nn.Module, layers: Any, family: str, deviation: float = 0.05, **options: Any
) -> Any:
    """A model with trained adapters, of which each was exactly nothing before."""
    resadapt.inject_adapters(model, layers, family=family, **options)
    for adapter in adapters_of(model).values():
        strengthened(adapter, deviation)
    return model.eval()


def adapters_of(model: Any) -> dict[str, Any]:
    (info,) = resadapt.list_adapters(model)
    return {site.name: model.get_submodule(f"{site.owner}.resadapt.default") for site in info.sites}


def folded(model: Any) -> Any:
    """A plain backbone with a model's adapters in its weights."""
    plain = resadapt.remove_adapters(copy.deepcopy(model))
    with torch.no_grad():
        for name, adapter in adapters_of(model).items():
            module = plain.get_submodule(name)
            weight, bias = adapter.folded(model.get_submodule(name))
            module.weight.copy_(weight)
            if bias is not None:
                module.bias.copy_(bias)
    return plain.eval()


def assert_model_folds(
    model: Any, x: Tensor, pick: Callable[[Any], Tensor] = lambda output: output
) -> None:
    with torch.no_grad():
        expected, given = pick(model(x)), pick(folded(model)(x))
        with resadapt.adapters_disabled(model):
            plain = pick(model(x))
    scale = expected.abs().max().item()
    assert (expected - plain).abs().max() > 1e-2 * scale, "the adapters matter"
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4 * scale)


def assert_starts_as_nothing(
    model: Any, x: Tensor, layers: Any, family: str, **options: Any
) -> None:
    """Asks for the backbone's own bits, and for a gradient in the adapters."""
    with torch.no_grad():
        plain = model.eval()(x)
    resadapt.inject_adapters(model, layers, family=family, **options)
    assert torch.equal(model(x), plain)
    model(x).square().sum().backward()
    for name, adapter in adapters_of(model).items():
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.parameters()), (
            name
        )


class Net(nn.Module):
    """A convolution, the layer under test on 8 channels, and a head."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.stem, self.layer, self.head = nn.Conv2d(3, 8, 3, padding=1), layer, nn.LazyLinear(2)
        self(torch.zeros(1, 3, 9, 9))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.layer(self.stem(x))).mean((2, 3)))


def net(layer: Callable[[], nn.Module]) -> Net:
    torch.manual_seed(0)
    return Net(layer())


def assert_survives(layer: Callable[[], nn.Module], path: Path, **options: Any) -> None:
    """Asks that whatever PyTorch does to a model leaves its adapters right, and that their file
    proves itself.
    """
    model, x = injected(net(layer), "layer", deviation=0.5, **options), torch.randn(2, 3, 9, 9)
    expected = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same: dict[str, Any] = {
            "deepcopy": copy.deepcopy(model),
            "pickle": pickle.loads(pickle.dumps(model)),
            "fx": torch.fx.symbolic_trace(model),
            "inference_copy": resadapt.inference_copy(model),
            "fx of a copy": torch.fx.symbolic_trace(resadapt.inference_copy(model)),
            "trace": torch.jit.trace(model, x),
            "export": torch.export.export(model, (x,)).module(),
            "channels_last": copy.deepcopy(model).to(memory_format=torch.channels_last),
        }
        if (
            "Transpose" not in type(model.layer).__name__
        ):  # of several arguments, and so in a copy's Adapted
            same["script"] = torch.jit.script(resadapt.inference_copy(model))
        torch._dynamo.reset()
        same["compile"] = torch.compile(model, fullgraph=True, backend="aot_eager")
        for name, each in same.items():
            torch.testing.assert_close(
                each(x),
                expected,
                rtol=1e-4,
                atol=1e-4,
                msg=lambda text, name=name: f"{name}: {text}",
            )
            if name in ("fx", "script"):
                assert each(torch.randn(3, 3, 12, 11)).shape == (3, 2)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
        assert model.layer(model.stem(x)).dtype == torch.bfloat16
    torch.testing.assert_close(
        output.float(), expected, rtol=0.1, atol=0.1 * expected.abs().max().item()
    )
    report = resadapt.save_adapters(model, path, rebuild=lambda: net(layer), probe=x)
    assert report.ok, report
    assert torch.equal(resadapt.load_adapters(net(layer), path).eval()(x), expected)
