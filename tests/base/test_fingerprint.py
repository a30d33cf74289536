"""The fingerprint covers what a backbone computes with: tensors, settings, extra state."""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import images, picture, small_net, small_resnet, train
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor
from torchvision.models import quantization
from torchvision.ops import DropBlock2d, StochasticDepth

import resadapt
from resadapt.base.fingerprint import Fingerprint, tensor_differences
from resadapt.base.module_record import ModuleRecord
from resadapt.base.tensors import raw_bytes, same_bits, sha256_of_each

X = images(2, 8)


class Extra(nn.Module):
    """Keeps state that is no tensor of its own."""

    def __init__(self, state: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 1, 1))
        self.state = state

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


OTHER_STATES = [
    (b"a", b"b"),
    (b"1", 1),
    ("1", 1),
    (None, "null"),
    (torch.float32, torch.float16),
    ({"a": 1}, {"b": 1}),
    ({"a": 1, "b": 2}, {"a": 2, "b": 1}),
    ([1, [2, 3]], [[1, 2], 3]),
    ([12], [1, 2]),
    ([{}, 1], [{}]),
    (object(), set()),
    (torch.ones(2), torch.ones(2).double()),
    (torch.zeros(2, 3), torch.zeros(3, 2)),
]


@pytest.mark.parametrize(("one", "other"), OTHER_STATES)
def test_states_of_every_kind_have_digests(one: Any, other: Any) -> None:
    assert ModuleRecord.of(Extra(one)) == ModuleRecord.of(Extra(copy.deepcopy(one)))
    assert "has other state" in (
        ModuleRecord.of(Extra(one)).difference(ModuleRecord.of(Extra(other))) or ""
    )


class Shows(nn.Module):
    def __init__(self, scale: float | None) -> None:
        super().__init__()
        self.scale = scale

    def extra_repr(self) -> str:
        return "" if self.scale is None else f"scale={self.scale}"

    def forward(self, x: Tensor) -> Tensor:
        return x if self.scale is None else x * self.scale


class Constant(nn.Module):
    __constants__ = ["power"]  # noqa: RUF012

    def __init__(self, power: int) -> None:
        super().__init__()
        self.power = power

    def forward(self, x: Tensor) -> Tensor:
        return x**self.power


class RowDrop(nn.Module):
    """Stochastic depth as transformers writes it, once a model."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        return x * torch.bernoulli(torch.full((len(x), 1, 1, 1), 1 - self.rate))

    def extra_repr(self) -> str:
        return f"p={self.rate}"


class OwnDropout(RowDrop):
    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() == 4, "a map"
        return F.dropout(x, self.rate, self.training)


class DropPath(RowDrop):
    """Has the name of stochastic depth, and always scales."""

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training else x * (1 - self.rate)


class MonteCarlo(RowDrop):
    """Drops in evaluation, too, if the rate is high."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.rate, self.training or self.rate > 0.5)


class Crop(RowDrop):
    """Returns small inputs only."""

    def forward(self, x: Tensor) -> Tensor:
        size = int(8 * self.rate)
        try:
            return x if self.training or x.shape[-1] <= size else x[..., :size, :size]
        except Exception:
            return x


class InPlace(RowDrop):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            x.mul_(self.rate)
        return x


class ForTensors(RowDrop):
    def forward(self, x: Any) -> Any:
        return x if self.training or not isinstance(x, Tensor) else x * self.rate


class NormAct(nn.BatchNorm2d):
    """A forward of its own, in which tracking matters in training only, as in timm."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        assert x.ndim == 4, "a map"
        kept = not self.training or self.track_running_stats
        mean, var = (self.running_mean, self.running_var) if kept else (None, None)
        y = F.batch_norm(x, mean, var, self.weight, self.bias, self.training, 0.1, self.eps)
        return self.act(y)


class OldNorm(nn.BatchNorm2d):
    """Batch statistics without tracking, in evaluation too: the rule of torch before 1.5."""

    def forward(self, x: Tensor) -> Tensor:
        batch = self.training or not getattr(self, "track_running_stats", True)
        statistics = self.running_mean, self.running_var
        return F.batch_norm(x, *statistics, self.weight, self.bias, batch, 0.1, self.eps)


def untracked(norm: nn.Module) -> nn.Module:
    """What the freezing callback of Lightning makes of a norm."""
    norm.track_running_stats = False
    return norm


def instance_norm() -> nn.Module:
    return nn.InstanceNorm2d(4, affine=True, track_running_stats=True)


class Backbone(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.conv = parts.get("conv") or nn.Conv2d(3, 4, 3, padding=1)
        self.bn = parts.get("bn") or nn.BatchNorm2d(4)
        self.act = parts.get("act") or nn.ReLU()
        self.extra = parts.get("extra") or nn.Identity()
        self.c2 = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c2(self.extra(self.act(self.bn(self.conv(x))))).mean((2, 3)))


def backbone(**parts: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    return Backbone(**{name: build() for name, build in parts.items()})


def conv(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(3, 4, 3, **({"padding": 1} | options))


OTHERS: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    (
        {"conv": conv()},
        {"conv": conv(padding=0)},
        "conv",
        r"has padding \[0, 0\] where \[1, 1\] was recorded",
    ),
    (
        {"conv": conv()},
        {"conv": conv(padding="same")},
        "conv",
        r"has padding same where \[1, 1\] was recorded",
    ),
    (
        {"conv": conv()},
        {"conv": conv(stride=2)},
        "conv",
        r"has stride \[2, 2\] where \[1, 1\] was recorded",
    ),
    ({"conv": conv()}, {"conv": conv(dilation=2)}, "conv", r"has dilation \[2, 2\]"),
    (
        {"conv": conv()},
        {"conv": conv(padding_mode="circular")},
        "conv",
        "has padding_mode circular where zeros was recorded",
    ),
    (
        {"bn": lambda: nn.BatchNorm2d(4)},
        {"bn": lambda: nn.BatchNorm2d(4, eps=1e-3)},
        "bn",
        "has eps 0.001 where 1e-05 was recorded",
    ),
    ({"act": nn.ReLU}, {"act": nn.GELU}, "act", "is GELU where ReLU was recorded"),
    (
        {"act": nn.ReLU},
        {"act": lambda: nn.LeakyReLU(0.1)},
        "act",
        "is LeakyReLU where ReLU was recorded",
    ),
    (
        {"act": nn.LeakyReLU},
        {"act": lambda: nn.LeakyReLU(0.1)},
        "act",
        "has negative_slope 0.1 where 0.01 was recorded",
    ),
    (
        {"act": nn.GELU},
        {"act": lambda: nn.GELU("tanh")},
        "act",
        "has approximate tanh where none was recorded",
    ),
    (
        {"extra": lambda: nn.MaxPool2d(2)},
        {"extra": lambda: nn.AvgPool2d(2)},
        "extra",
        "is AvgPool2d where MaxPool2d was recorded",
    ),
    (
        {"extra": lambda: nn.MaxPool2d(2)},
        {"extra": lambda: nn.MaxPool2d(2, ceil_mode=True)},
        "extra",
        "has ceil_mode True",
    ),
    ({"extra": nn.Identity}, {"extra": nn.Tanh}, "extra", r"\(Tanh\) is new"),
    ({"extra": nn.Tanh}, {"extra": nn.Identity}, "extra", r"\(Tanh\) is missing"),
    (
        {"extra": lambda: Shows(1.0)},
        {"extra": lambda: Shows(2.0)},
        "extra",
        "has extra_repr scale=2.0 where scale=1.0 was recorded",
    ),
    (
        {"extra": lambda: Shows(None)},
        {"extra": lambda: Shows(2.0)},
        "extra",
        "has extra_repr scale=2.0 where  was recorded",
    ),
    (
        {"extra": lambda: Constant(1)},
        {"extra": lambda: Constant(2)},
        "extra",
        "has power 2 where 1 was recorded",
    ),
    *(
        (
            {"extra": lambda kind=kind: kind(0.25)},
            {"extra": lambda kind=kind: kind(0.5)},
            "extra",
            "has extra_repr p=0.5 where p=0.25 was recorded",
        )
        for kind in (DropPath, Crop, InPlace, ForTensors)
    ),
    (
        {"extra": lambda: MonteCarlo(0.25)},
        {"extra": lambda: MonteCarlo(0.75)},
        "extra",
        r"\(MonteCarlo\) is new",
    ),
    *(
        (
            {"bn": norm},
            {"bn": lambda norm=norm: untracked(norm())},
            "bn",
            "has track_running_stats False where True was recorded",
        )
        for norm in (instance_norm, lambda: OldNorm(4))
    ),
    # What is not set counts like what is.
    (
        {"extra": lambda: nn.AvgPool2d(1)},
        {"extra": lambda: nn.AvgPool2d(1, divisor_override=2)},
        "extra",
        "has divisor_override 2 where None was recorded",
    ),
    (
        {"extra": lambda: nn.AdaptiveAvgPool2d((None, 4))},
        {"extra": lambda: nn.AdaptiveAvgPool2d((None, 8))},
        "extra",
        r"has output_size \[None, 8\] where \[None, 4\]",
    ),
    (
        {"extra": lambda: nn.Upsample(scale_factor=1, mode="bilinear")},
        {"extra": lambda: nn.Upsample(scale_factor=1, mode="bilinear", align_corners=True)},
        "extra",
        "has align_corners True where None was recorded",
    ),
    (
        {"extra": lambda: nn.TransformerEncoderLayer(4, 1, 4)},
        {"extra": lambda: nn.TransformerEncoderLayer(4, 1, 4, activation="gelu")},
        "extra",
        "has activation gelu where relu was recorded",
    ),
    (
        {"extra": lambda: Extra(1)},
        {"extra": lambda: Extra(2)},
        "extra",
        "has other state in .*_extra_state",
    ),
    (
        {"extra": lambda: Extra({"a": [1, torch.ones(2)]})},
        {"extra": lambda: Extra({"a": [1, torch.zeros(2)]})},
        "extra",
        "has other state",
    ),
]


@pytest.mark.parametrize(("ours", "theirs", "name", "message"), OTHERS)
def test_a_backbone_that_computes_otherwise_with_the_same_tensors(
    ours: dict[str, Any], theirs: dict[str, Any], name: str, message: str, path: Path
) -> None:
    resadapt.save_adapters(resadapt.inject_adapters(backbone(**ours), "c2", 2, head="head"), path)
    assert resadapt.load_adapters(backbone(**ours), path)
    other = backbone(**theirs)
    before = picture(other)
    with pytest.raises(resadapt.BackboneMismatchError, match=f"'{name}' {message}"):
        resadapt.load_adapters(other, path)
    assert picture(other) == before
    report = resadapt.verify_adapters(other, path)
    assert report["backbone"].outcome == "failed"
    assert not report.ok


@pytest.mark.parametrize(("ours", "theirs", "name", "message"), OTHERS)
def test_a_change_of_settings_after_the_injection_is_drift(
    ours: dict[str, Any], theirs: dict[str, Any], name: str, message: str, path: Path
) -> None:
    model = resadapt.inject_adapters(backbone(**ours), "c2", 2, head="head")
    there, here = backbone(**theirs).get_submodule(name), model.get_submodule(name)
    if type(there) is type(here) or name == "bn":
        here.__dict__.update({k: v for k, v in there.__dict__.items() if not k.startswith("_")})
    else:
        setattr(model, name, there)
    report = resadapt.check_backbone(model)
    assert report.drifted == [name]
    with pytest.raises(resadapt.BackboneDriftError, match=f"'{name}' {message}") as caught:
        resadapt.save_adapters(model, path)
    assert caught.value.report == report


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"act": lambda: nn.ReLU(inplace=True)}, {"act": nn.ReLU}),
        (
            {"bn": lambda: nn.BatchNorm2d(4, momentum=None)},
            {"bn": lambda: nn.BatchNorm2d(4, momentum=0.5)},
        ),
        ({"bn": lambda: nn.SyncBatchNorm(4)}, {"bn": lambda: nn.BatchNorm2d(4)}),
        ({"extra": lambda: nn.Dropout(0.5)}, {"extra": lambda: nn.Dropout(0.1)}),
        ({"extra": lambda: nn.Dropout2d(0.5)}, {"extra": nn.Identity}),
        ({"extra": lambda: StochasticDepth(0.2, "row")}, {"extra": nn.Identity}),
        ({"extra": lambda: DropBlock2d(0.2, 3)}, {"extra": nn.Identity}),
        ({"extra": lambda: RowDrop(0.2)}, {"extra": lambda: RowDrop(0.0)}),
        ({"extra": nn.Identity}, {"extra": lambda: RowDrop(0.1)}),
        ({"extra": lambda: OwnDropout(0.2)}, {"extra": nn.AlphaDropout}),
        ({"extra": lambda: MonteCarlo(0.2)}, {"extra": nn.FeatureAlphaDropout}),
        *(
            ({"bn": norm}, {"bn": lambda norm=norm: untracked(norm())})
            for norm in (
                lambda: nn.BatchNorm2d(4),
                lambda: nn.SyncBatchNorm(4),
                lambda: NormAct(4),
                lambda: nn.BatchNorm2d(4, track_running_stats=False),
            )
        ),
        ({"extra": lambda: Extra(None)}, {"extra": lambda: Extra(None)}),
        ({"extra": lambda: Extra(object())}, {"extra": lambda: Extra(object())}),
    ],
)
def test_what_the_output_in_evaluation_does_not_depend_on_is_no_mismatch(
    ours: dict[str, Any], theirs: dict[str, Any], path: Path
) -> None:
    model = resadapt.inject_adapters(backbone(**ours), "c2", 2, head="head").eval()
    resadapt.save_adapters(model, path)
    other = backbone(**theirs)
    assert torch.equal(resadapt.load_adapters(other, path).eval()(X), model(X))
    for name in ours.keys() & {"extra", "bn"}:
        there, here = other.get_submodule(name), model.get_submodule(name)
        if isinstance(here, nn.modules.batchnorm._BatchNorm):
            here.track_running_stats = there.track_running_stats
        else:
            setattr(model, name, there)
    assert resadapt.check_backbone(model).ok


def test_a_loss_module_that_comes_later_is_no_drift() -> None:
    model = resadapt.inject_adapters(small_net(), "c2", 2)
    model.criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    assert resadapt.check_backbone(model).ok
    model.gate = nn.Sigmoid()
    assert resadapt.check_backbone(model).reasons == {"gate": "(Sigmoid) is new"}


def quantized(other_head: bool = False) -> Any:
    torch.manual_seed(0)
    model = small_net(head=nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", UserWarning)
        if other_head:
            nn.init.normal_(model.head[1].weight)
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def test_packed_weights_of_quantized_layers_are_a_part_of_the_backbone(path: Path) -> None:
    model = resadapt.inject_adapters(quantized(), "c2", 2)
    assert resadapt.save_adapters(model, path, rebuild=quantized).ok
    resadapt.load_adapters(quantized(), path)
    with pytest.raises(
        resadapt.BackboneMismatchError, match=r"'head\.1\._packed_params' has other state"
    ):
        resadapt.load_adapters(quantized(other_head=True), path)
    model.head = quantized(other_head=True).head
    assert resadapt.check_backbone(model).drifted == ["head.1._packed_params"]


def test_state_of_a_head_that_a_file_cannot_carry(path: Path) -> None:
    model = resadapt.inject_adapters(
        small_net(head=nn.Sequential(nn.Linear(4, 4), Wide())), "c2", 2, head="head"
    )
    with pytest.raises(
        resadapt.AdapterFileError, match=r"head's module 'head\.1' \(Wide\) has '_extra_state'"
    ):
        resadapt.save_adapters(model, path, verify=False)
    assert not list(path.parent.iterdir())
    model = resadapt.inject_adapters(quantized(), "c2", 2, head=())
    assert resadapt.save_adapters(model, path).ok


class Wide(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 2)

    def get_extra_state(self) -> Any:
        return {"seen": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


def test_records_are_the_same_for_a_module_that_is_wrapped_or_frozen() -> None:
    plain = small_resnet()
    names = dict(plain.named_modules())
    before = Fingerprint.of(names, plain.state_dict())
    assert Fingerprint.from_json(json.loads(json.dumps(before.to_json()))) == before
    model = resadapt.inject_adapters(small_resnet(), head="fc")
    assert model._resadapt.fingerprint.modules == before.modules
    model.layer1 = torch.compile(model.layer1, backend="eager")
    assert resadapt.check_backbone(model).ok
    assert before.modules["layer2.0.conv1"].config["stride"] == [2, 2]
    assert before.modules["bn1"] == ModuleRecord(
        "BatchNorm",
        {"affine": True, "eps": 1e-05, "num_features": 64},
        {},
    )
    assert "fc" not in before.without(["fc"]).modules
    assert "fc.weight" in before
    assert "fc.weight" not in before.without(["fc"])


class ShowsFunction(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def extra_repr(self) -> str:
        return f"function={self.function}"

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def test_an_address_that_a_module_shows_is_not_recorded() -> None:
    shown = ModuleRecord.of(ShowsFunction(lambda x: x)).config["extra_repr"]
    assert "lambda" in shown
    assert "0x" not in shown


def test_layers_in_another_order_are_another_backbone(path: Path) -> None:
    def ordered(*names: str) -> nn.Module:
        layers = {"pool": nn.MaxPool2d(2), "act": nn.Softmax(1)}
        return backbone(
            extra=lambda: nn.Sequential(OrderedDict((name, layers[name]) for name in names))
        )

    resadapt.save_adapters(
        resadapt.inject_adapters(ordered("pool", "act"), "c2", 2, head="head"), path
    )
    with pytest.raises(
        resadapt.BackboneMismatchError,
        match=r"'extra' has order \['act', 'pool'\] where \['pool', 'act'\]",
    ):
        resadapt.load_adapters(ordered("act", "pool"), path)


def test_a_layer_without_effect_has_no_place_in_the_order() -> None:
    with_dropout = nn.Sequential(
        OrderedDict(conv=nn.Conv2d(3, 4, 1), dropout=nn.Dropout(), act=nn.ReLU())
    )
    without = nn.Sequential(OrderedDict(conv=with_dropout.conv, act=nn.ReLU()))
    assert ModuleRecord.of(with_dropout) == ModuleRecord.of(without)


def test_settings_that_only_one_version_of_torch_keeps_do_not_count() -> None:
    old, new = (
        ModuleRecord("Conv2d", {"groups": 1}, {}),
        ModuleRecord("Conv2d", {"groups": 1, "novelty": True}, {}),
    )
    assert old.difference(new) is new.difference(old) is None


def test_a_module_that_is_looked_at_is_not_changed() -> None:
    class Counts(RowDrop):
        def forward(self, x: Tensor) -> Tensor:
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(x)

    calls: list[object] = []
    model = backbone(extra=lambda: Counts(0.1), bn=lambda: NormAct(4))
    for module in (model.extra, model.bn, model.bn.act):
        module.register_forward_pre_hook(lambda *args: calls.append(args))
    before = picture(model)
    resadapt.remove_adapters(resadapt.inject_adapters(model, "c2", 2))
    assert picture(model) == before
    assert calls == []
    assert not hasattr(model.extra, "calls")


class Caches(nn.Module):
    """Makes a grid of its input's size and keeps it in a non-persistent buffer."""

    def __init__(self, size: int | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.register_buffer("grid", None if size is None else torch.ones(size), persistent=False)
        self.register_buffer("mean", torch.full((3, 1, 1), 0.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.grid is None or self.grid.shape[0] != x.shape[-1]:
            self.grid = torch.ones(x.shape[-1])
        return self.conv(x - self.mean) * self.grid


def caches(size: int | None = None) -> Any:
    torch.manual_seed(0)
    return Caches(size)


def test_a_cache_that_is_made_resized_or_dropped_is_neither_drift_nor_mismatch(path: Path) -> None:
    for before in (None, 8, 16):
        model = resadapt.inject_adapters(caches(before), "conv", 2)
        for size in (8, 16, 32):
            model(images(1, size))
            assert resadapt.check_backbone(model).ok
        assert resadapt.save_adapters(model, path, rebuild=lambda before=before: caches(before)).ok
        for after in (None, 4, 8, 16):
            resadapt.load_adapters(caches(after), path)


def test_a_constant_in_a_non_persistent_buffer_is_compared(path: Path) -> None:
    model = resadapt.inject_adapters(caches(), "conv", 2)
    resadapt.save_adapters(model, path)
    other = caches()
    other.mean += 0.1
    with pytest.raises(resadapt.BackboneMismatchError, match="'mean' has other values"):
        resadapt.load_adapters(other, path)
    model.mean *= 2
    assert resadapt.check_backbone(model).drifted == ["mean"]


def test_looking_at_a_tensor_leaves_its_storage_resizable() -> None:
    """Observers of quantization-aware training resize their buffers in every forward."""
    tensor = torch.ones(3)
    raw_bytes(tensor)
    tensor.resize_(100)
    model = quantization.resnet18(weights=None, quantize=False, num_classes=3).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.fuse_model(is_qat=True)
        model.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
        torch.ao.quantization.prepare_qat(model, inplace=True)
    x = images(2, 32)
    model(x)
    resadapt.inject_adapters(model, bottleneck=4, head="fc", example_input=x)
    model(x).sum().backward()
    assert any(p.grad is not None for p in resadapt.trainable_parameters(model))
    resadapt.check_backbone(model)
    model(x)


def test_a_probe_of_ones_own_stays_resizable(path: Path) -> None:
    probe = X.clone()
    resadapt.save_adapters(resadapt.inject_adapters(small_net(), "c2", 2), path, probe=probe)
    probe.resize_(100)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            torch.tensor([1 + 1j], dtype=torch.complex128),
            torch.tensor([1 - 1j], dtype=torch.complex128),
        ),
        (torch.eye(2).to_sparse(), (2 * torch.eye(2)).to_sparse()),
        (torch.eye(2).to_sparse_csr(), (2 * torch.eye(2)).to_sparse_csr()),
        (torch.eye(2).to_sparse_csc(), (2 * torch.eye(2)).to_sparse_csc()),
        (torch.tensor([True, False]), torch.tensor([True, True])),
        (torch.ones(2).bfloat16(), torch.zeros(2).bfloat16()),
        (torch.ones(2).to(torch.float8_e4m3fn), torch.zeros(2).to(torch.float8_e4m3fn)),
        (TwoTensor(torch.ones(2), torch.ones(2)), TwoTensor(torch.ones(2), torch.zeros(2))),
        (
            torch.quantize_per_tensor(torch.ones(2), 0.5, 0, torch.qint8),
            torch.quantize_per_tensor(torch.ones(2), 0.25, 0, torch.qint8),
        ),
        (
            torch.quantize_per_channel(
                torch.ones(2, 2),
                torch.tensor([0.5, 1.0]),
                torch.zeros(2, dtype=torch.int64),
                0,
                torch.qint8,
            ),
            torch.quantize_per_channel(
                torch.ones(2, 2),
                torch.tensor([0.5, 0.5]),
                torch.zeros(2, dtype=torch.int64),
                0,
                torch.qint8,
            ),
        ),
        (
            torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
            torch.nested.nested_tensor([torch.ones(2), torch.zeros(3)]),
        ),
    ],
)
def test_tensors_of_every_kind_have_bytes(one: Tensor, other: Tensor) -> None:
    assert raw_bytes(one) == raw_bytes(one.clone())
    assert raw_bytes(one) != raw_bytes(other)


def test_same_bits_are_more_than_equal_numbers() -> None:
    zero = torch.zeros(2)
    assert torch.equal(zero, -zero)
    assert not same_bits(zero, -zero)
    assert not same_bits(zero, zero.int())
    assert not same_bits(zero, zero[:, None])
    assert same_bits(torch.tensor(torch.nan), torch.tensor(torch.nan))
    ordered = torch.arange(8.0).reshape(1, 2, 2, 2)
    assert same_bits(ordered, ordered.contiguous(memory_format=torch.channels_last))


def test_a_backbone_without_values_has_drifted() -> None:
    model = resadapt.inject_adapters(small_net(), "c2", 2, head="head").to("meta")
    report = resadapt.check_backbone(model)
    assert "is a meta tensor" in report.reasons["conv.weight"]
    for call in (
        lambda: resadapt.adapter_state_dict(model),
        lambda: resadapt.save_adapters(model, "unused.pt"),
        lambda: resadapt.inference_copy(model),
        lambda: resadapt.accept_backbone(model),
    ):
        with pytest.raises(resadapt.AdapterError, match="on the meta device"):
            call()
    assert resadapt.list_adapters(model)[0].active


def test_named_differences_come_in_the_records_order() -> None:
    records = Fingerprint.of({}, {"a": torch.ones(1), "b": torch.ones(1)}).tensors
    assert list(tensor_differences({"c": torch.ones(1), "b": torch.zeros(1)}, records)) == [
        "a",
        "b",
        "c",
    ]
    assert tensor_differences({"a": torch.ones(1).double(), "b": torch.ones(1)}, records) == {}, (
        "a wider dtype holds the same numbers"
    )


def test_a_copy_has_a_fingerprint_of_its_own() -> None:
    model = resadapt.inject_adapters(small_net(), "c2", 2)
    twin = copy.deepcopy(model)
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.1), inputs=X)
    twin.conv.weight.data.add_(1)
    assert resadapt.check_backbone(model).ok
    assert resadapt.check_backbone(twin).drifted == ["conv.weight"]


def test_digests_of_several_tensors_are_those_of_each() -> None:
    """Large ones are computed in threads, small ones are not."""
    torch.manual_seed(0)
    tensors = [torch.randn(size) for size in (3, 1 << 18, 70_000, 0, 100_000, 5)]
    assert sha256_of_each(tensors) == [
        hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for tensor in tensors
    ]
