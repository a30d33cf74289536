"""Sets in float32 in a backbone in half precision, and other mixtures of dtypes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import backbone_bytes, images, private, scramble, small_net, train
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import resadapt
from resadapt.injection.own_dtype import dtype_of, in_own_dtype
from resadapt.injection.walk import slots_of

HALF = [torch.bfloat16, torch.float16]
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("pooled", {}),
    ("lora", {}),
    ("lora", {"dora": True}),
    ("parallel", {}),
    ("series", {"batch_norm": True}),
    ("ssf", {}),
    ("mona", {}),
    ("bottleneck", {}),
    ("conv", {"bottleneck": 1}),
]


def inject(model: nn.Module, family: str = "lora", *, norm: str = "affine", **options: Any) -> Any:
    """Adapts the first convolution, with values that matter, and a head and norms of the set."""
    sizes = {} if family in ("parallel", "series", "ssf") else {"bottleneck": 2}
    resadapt.inject_adapters(
        model, "conv", family=family, head="head", norm=norm, **{**sizes, **options}
    )
    for slot in slots_of(model):
        scramble(slot)
    return model.eval()


def dtypes(model: nn.Module, name: str | None = None) -> set[torch.dtype]:
    state = resadapt.adapter_state_dict(model, name)
    return {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}


@pytest.mark.parametrize("given", [{}, {"dtype": None}, {"dtype": torch.float64}])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
def test_a_set_is_at_least_in_the_dtype_that_is_given(
    dtype: torch.dtype, given: dict[str, Any]
) -> None:
    model, x = small_net().to(dtype).eval(), images().to(dtype)
    plain, before = model(x), backbone_bytes(model)
    inject(model, norm="affine+stats", **given)
    least = given.get("dtype", torch.float32)
    expected = dtype if least is None else torch.promote_types(least, dtype)
    assert dtypes(model) == {expected}
    assert model(x).dtype == dtype
    train(model, torch.optim.AdamW(resadapt.trainable_parameters(model)), 2, x)
    assert private(model, "bn").num_batches_tracked == 2
    with resadapt.adapters_disabled(model.eval()):
        assert torch.equal(model(x), plain)
    assert backbone_bytes(model) == before


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.float8_e4m3fn, "float32"])
def test_what_no_set_can_be_trained_in_is_refused(dtype: Any) -> None:
    with pytest.raises(resadapt.InjectionError, match=r"dtype=.*: give torch\.float32, .* or None"):
        resadapt.inject_adapters(small_net(), "conv", dtype=dtype)


def by_hand(model: Any, x: Tensor, round_to: torch.dtype) -> Tensor:
    """The forward of `inject`: the set's parts in float32, their results rounded."""
    with resadapt.adapters_disabled(model):
        h = model.conv(x)
    adapter, norm, head = model.conv.resadapt.default, private(model, "bn"), private(model, "head")
    reads = {"output": 1, "input": 2, "weight": 4}[adapter.reads]
    inputs = (h, x, model.conv.weight, model.conv.bias)[:reads]
    h = adapter(*(each.float() for each in inputs)).to(round_to)
    h = F.batch_norm(h.float(), norm.running_mean, norm.running_var, norm.weight, norm.bias)
    h = model.c2(torch.relu(h.to(round_to))).mean((2, 3))
    return F.linear(h.float(), head.weight, head.bias).to(round_to)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("family", "options"), FAMILIES)
def test_parts_of_a_set_compute_in_float32_and_round_once(
    family: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    model, x = inject(small_net().to(dtype), family, **options), images(size=8).to(dtype)
    results = []
    for forward in (model, lambda x: by_hand(model, x, dtype)):
        model.zero_grad()
        output = forward(x)
        output.float().square().sum().backward()
        results.append([output, *(p.grad for p in resadapt.trainable_parameters(model))])
    assert torch.equal(results[0][0], results[1][0])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert {p.grad.dtype for p in resadapt.trainable_parameters(model)} == {torch.float32}


def test_a_private_norm_saves_the_feature_map_as_it_is() -> None:
    saved: list[torch.dtype] = []
    model: Any = resadapt.inject_adapters(small_net().bfloat16(), (), norm="affine+stats")
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor.dtype if tensor.ndim == 4 else None), lambda _: None
    ):
        assert model.bn(images(channels=4).bfloat16()).dtype == torch.bfloat16
    assert {*saved} == {torch.bfloat16, None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "options"), FAMILIES)
def test_autocast_casts_inside_and_never_the_feature_map(
    family: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    model, x = inject(small_net().to(dtype), family, **options), images(size=8).to(dtype)
    seen, given = [], []
    model.conv.register_forward_hook(lambda _m, _a, output: seen.append(output.dtype))
    for module in (model.conv.resadapt.default, private(model, "bn")):
        module.register_forward_pre_hook(lambda _m, args: given.append(args[0].dtype))
    model.bn.register_forward_hook(lambda _m, _a, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        output = model.train()(x)
        output.float().square().sum().backward()
    assert {*seen, *given, output.dtype} == {torch.bfloat16}
    expected = model.eval()(x)
    assert torch.allclose(model(x).float(), expected.float(), rtol=0.1)


class Scaled(resadapt.Adapter):
    def __init__(self, site: Any = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def test_what_widens_a_map_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter gives the map back as it was; a head does what the backbone's module does."""
    monkeypatch.setitem(resadapt.adapters.FAMILIES, "scaled", Scaled)
    model: Any = small_net(head=Scaled())
    resadapt.inject_adapters(model, "conv", family="scaled", head="head")
    x = images(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.conv(x).dtype == torch.bfloat16
        with resadapt.adapters_disabled(model):
            assert model(x).dtype == torch.float32
        assert model(x).dtype == torch.float32


def test_small_steps_are_not_rounded_away() -> None:
    x, moved = images(2, 8).bfloat16(), []
    for dtype in (torch.float32, None):
        model = small_net().bfloat16()
        resadapt.inject_adapters(model, "conv", 2, norm="affine", head="head", dtype=dtype)
        start = resadapt.adapter_state_dict(model)
        train(model, torch.optim.AdamW(resadapt.trainable_parameters(model), lr=1e-4), 60, x)
        now = resadapt.adapter_state_dict(model)
        moved.append((now["norms.bn.weight"] - start["norms.bn.weight"]).abs().max().item())
    assert moved[0] > 3e-3
    assert moved[1] == 0.0


CASTS: dict[str, Callable[[Any], object]] = {
    "the whole model": lambda model: model.bfloat16(),
    "all sets": lambda model: [slot.bfloat16() for slot in slots_of(model)],
    "an adapter up": lambda model: model.conv.resadapt.default.double(),
    "a head down": lambda model: private(model, "head").bfloat16(),
    "norms": lambda model: private(model, "bn").half(),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_a_set_that_is_converted_by_hand_runs_and_trains(
    cast: Callable[[Any], object], dtype: torch.dtype, autocast: bool
) -> None:
    model, x = inject(small_net().to(dtype)), images(2, 8)
    expected = model(x.to(dtype)).float()
    cast(model)
    x, start = x.to(model.conv.weight.dtype), resadapt.adapter_state_dict(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(x)
        assert torch.allclose(output.float(), expected, rtol=0.1, atol=0.1)
        output.float().square().sum().backward()
    torch.optim.SGD(resadapt.trainable_parameters(model), lr=0.1).step()
    now = resadapt.adapter_state_dict(model)
    assert all(
        not torch.equal(now[key], start[key])
        for key in now
        if now[key].is_floating_point() and "running" not in key
    )


class Deep(nn.Module):
    """A block that torch.fx traces into, so that an adapter sees symbolic values."""

    def __init__(self) -> None:
        super().__init__()
        self.block = small_net()
        self.block.head = nn.Identity()
        self.block.mean = None
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x))


def compiled(model: nn.Module, x: Tensor) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="eager")


TOOLS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "compile": compiled,
    "export": lambda model, x: torch.export.export(model, (x,)).module(),
    "jit.trace": lambda model, x: torch.jit.trace(model, (x,)),
    "fx": lambda model, x: fx.symbolic_trace(model),
    "deepcopy": lambda model, x: copy.deepcopy(model),
    "checkpoint": lambda model, x: lambda x: checkpoint(model, x, use_reentrant=False),
}


@pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)
def test_tools_run_a_mixture_of_dtypes(tool: Callable[[nn.Module, Tensor], Any]) -> None:
    torch.manual_seed(0)
    model: Any = Deep().bfloat16()
    resadapt.inject_adapters(
        model, ("block", "block.c2"), 2, family="bottleneck", head="head", norm="affine"
    )
    for slot in slots_of(model):
        scramble(slot)
    x = images(2, 8).bfloat16()
    assert torch.equal(tool(model.eval(), x)(x), model(x))


def test_nothing_is_added_where_dtypes_agree() -> None:
    graphs = []
    for dtype in (torch.float32, torch.bfloat16):
        model = Deep().to(dtype)
        resadapt.inject_adapters(model, "block", 2, family="bottleneck", head="head", norm="affine")
        graphs.append(str(fx.symbolic_trace(model).graph))
    assert "target=to]" not in graphs[0]
    assert graphs[1].count("target=to]") == 4, "an adapter and a norm, in and out"


def test_a_full_checkpoint_holds_both_dtypes() -> None:
    model, twin = (inject(small_net().bfloat16()) for _ in range(2))
    train(
        model,
        torch.optim.SGD(resadapt.trainable_parameters(model), lr=0.1),
        1,
        images(2, 8).bfloat16(),
    )
    twin.load_state_dict(model.state_dict())
    assert dtypes(twin) == {torch.float32}
    x = images().bfloat16()
    assert torch.equal(twin.eval()(x), model.eval()(x))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_batch_mixes_sets_of_different_dtypes(autocast: bool) -> None:
    model = small_net().bfloat16().eval()
    names = {"wide": torch.float32, "narrow": None, "exact": torch.float64}
    for name, dtype in names.items():
        resadapt.inject_adapters(
            model, "conv", 2, name=name, head="head", norm="affine", dtype=dtype
        )
    for slot in slots_of(model):
        scramble(slot)
    x = images(4, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        apart = {}
        for name in names:
            resadapt.set_active_adapters(model, name)
            apart[name] = model(x)
        together = resadapt.forward_all(model, x)
        with resadapt.adapters_for(model, [*names, None]):
            rows = model(x)
    assert rows.dtype == torch.bfloat16
    for row, name in enumerate(names):
        assert torch.equal(together[name], apart[name])
        assert torch.allclose(rows[row], apart[name][row], rtol=0.02, atol=0.02)


def test_what_is_not_floating_point_is_left_alone() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x: dict[str, Any], scale: Any = None) -> dict[str, Any]:
            given.append({key: each.dtype for key, each in x.items()})
            return {**x, "y": self.weight, "text": "text"}

    given: list[Any] = []
    x = {
        "index": torch.arange(2),
        "wave": torch.ones(2, dtype=torch.complex64),
        "quantized": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "half": torch.ones(2).half(),
    }
    before = {key: each.dtype for key, each in x.items()}
    result = in_own_dtype(Picky(), (x,), {})
    assert given == [before | {"half": torch.float32}]
    assert {key: each.dtype for key, each in result.items() if key != "text"} == (
        before | {"y": torch.float16}
    )
    assert in_own_dtype(Picky(), (), {"x": x})["y"].dtype == torch.float16, "given by name"
    assert given[1] == given[0]
    whole = in_own_dtype(Picky(), ({"index": x["index"]},), {}, torch.bfloat16)
    assert whole["y"].dtype == torch.bfloat16, "no input tells: as the backbone's module"
    assert in_own_dtype(nn.Embedding(3, 2), (x["index"],), {}).dtype == torch.float32


def test_a_head_in_place_of_a_module_without_a_dtype() -> None:
    model: Any = small_net(head=nn.Identity()).bfloat16()
    resadapt.inject_adapters(model, (), head={"head": nn.Linear(4, 3)})
    assert dtypes(model) == {torch.float32}
    assert model(images().bfloat16()).dtype == torch.bfloat16


def test_a_replica_of_data_parallel_has_the_dtype_of_its_parameters() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Linear(2, 2))
    replica: Any = model[1]._replicate_for_data_parallel()
    replica._former_parameters = dict(model[1]._parameters)  # as torch.nn.parallel.replicate does
    model[1] = replica
    assert not list(model.parameters())
    assert dtype_of(model) == torch.float32


def test_a_kept_head_is_converted_to_the_backbones_dtype() -> None:
    model, x = inject(small_net().bfloat16()), images().bfloat16()
    head = private(model, "head").weight.detach().clone()
    resadapt.remove_adapters(model, keep_head=True)
    assert torch.equal(model.head.weight, head.bfloat16())
    assert model(x).dtype == torch.bfloat16


def test_other_functions_take_a_mixture_of_dtypes() -> None:
    model = inject(small_net().bfloat16())
    x = images(2, 8).bfloat16()
    expected = model(x)
    assert "float" not in str(resadapt.summary(model))
    assert resadapt.count_parameters(model).trainable == 80
    assert resadapt.estimate_training(model, tuple(x.shape)).adapters.trained == 80
    assert resadapt.suggest_layers(
        small_net().bfloat16(), 100, family="lora", layers="conv", example_input=x
    ).flops["conv"]
    resadapt.optimize_backbone(model, fold_norms=False)
    assert torch.equal(model(x), expected)
    resadapt.optimize_backbone(model)
    assert torch.allclose(model(x), expected, rtol=0.05)
