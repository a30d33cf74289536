"""Bugs found by hostile readers, one test each, named after the bug."""

from __future__ import annotations

import io
import os
import stat
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from support import backbone_bytes, images, picture, train
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torchvision.models import resnet18

import resadapt
from resadapt.files.adapter_file import read_adapter_file
from resadapt.files.container import _seal
from resadapt.proof.probe import farthest, record_probe

X = images(2, 8)


class Net(nn.Module):
    def __init__(self, norm: nn.Module | None = None, head: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = norm or nn.BatchNorm2d(4)
        self.c2 = nn.Conv2d(4, 4, 1)
        self.head = head or nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c2(torch.relu(self.bn(self.conv(x)))).mean((2, 3)))


def net(**parts: Any) -> Any:
    torch.manual_seed(0)
    return Net(**parts)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "set.pt"


def test_a_backbone_that_deepcopy_shares_is_not_changed_by_saving(path: Path) -> None:
    class Shared(nn.Sequential):
        def __deepcopy__(self, memo: object) -> Any:
            return self

    model = nn.Sequential()
    model.add_module("backbone", Shared(nn.Conv2d(3, 4, 3)))
    model.add_module("after", nn.Conv2d(4, 2, 1))
    before = picture(model)
    with pytest.raises(resadapt.AdapterFileError):
        resadapt.verify_adapters(model, path)
    resadapt.inject_adapters(model, "backbone", 2)
    model(X)
    injected = picture(model)
    with pytest.raises(resadapt.VerificationError, match="shares parts with it"):
        resadapt.save_adapters(model, path)
    assert picture(model) == injected
    resadapt.save_adapters(model, path, verify=False)
    resadapt.remove_adapters(model)
    with pytest.raises(resadapt.VerificationError, match="shares parts with it"):
        resadapt.verify_adapters(model, path)
    assert picture(model) == before


class NormWithChildren(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, input: Tensor) -> Tensor:
        return self.act(super().forward(input))


def test_a_norm_with_children_is_frozen_too() -> None:
    parametrized = nn.BatchNorm2d(4)
    nn.utils.parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    for norm in (NormWithChildren(4), parametrized):
        model = resadapt.inject_adapters(net(norm=norm), "c2", 2)
        frozen = backbone_bytes(model)
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), inputs=X)
        assert backbone_bytes(model) == frozen


def test_update_bn_leaves_frozen_statistics() -> None:
    model = resadapt.inject_adapters(net(), "c2", 2)
    model.bn.running_mean.data.fill_(0.5)
    averaged = AveragedModel(model)
    update_bn([X, X], averaged)
    assert averaged.module.bn.running_mean.tolist() == [0.5] * 4
    assert averaged(X).shape == (2, 2)


def test_what_is_tied_in_a_head_stays_tied(path: Path) -> None:
    head = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    head[1].weight = head[0].weight
    model = resadapt.inject_adapters(net(head=head), "c2", 2, head="head")
    assert model.head[0].weight is model.head[1].weight
    train(model, torch.optim.SGD(resadapt.trainable_parameters(model), lr=0.1), inputs=X)
    resadapt.save_adapters(model, path)
    expected = model.eval()(X)
    with resadapt.adapters_disabled(model):
        assert model.head[0].weight is model.head[1].weight
    assert torch.equal(model(X), expected)
    assert resadapt.count_parameters(model).head == 16 + 4 + 4


def test_a_metric_that_knows_the_live_model_proves_nothing(path: Path) -> None:
    model = resadapt.inject_adapters(net(), "c2", 2)
    before = picture(model)
    with pytest.raises(resadapt.VerificationError, match="it ran the live model when it was given the reloaded one"):
        resadapt.save_adapters(model, path, metric=lambda _: model(X).sum())
    assert {k: v for k, v in picture(model).items() if k} == {k: v for k, v in before.items() if k}
    assert resadapt.save_adapters(model, path, metric=lambda m: m(X).sum()).ok


def test_a_reloaded_model_that_fails_alone_is_a_failure(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = resadapt.inject_adapters(net(), "c2", 2)
    restore = resadapt.proof.compare.restore

    def broken(clean: Any, *args: Any) -> None:
        restore(clean, *args)
        clean.bn.eps = float("nan")

    monkeypatch.setattr(resadapt.proof.compare, "restore", broken)
    with pytest.raises(resadapt.VerificationError, match=r"outputs +failed +reloaded model: the model returned NaN"):
        resadapt.save_adapters(model, path)


def test_a_site_that_runs_twice_is_told_at_saving(path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x))

    with pytest.raises(resadapt.InjectionError, match="ran more than once"):
        resadapt.save_adapters(resadapt.inject_adapters(Twice(), "conv", 2), path)


class Reassigns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.register_buffer("n", torch.zeros(()))
        self.register_buffer("wide", torch.ones(1).expand(4))
        self.register_buffer("grid", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.conv(x)
        self.grid = torch.ones(x.shape[-1])
        self.n = self.n + 1
        return self.conv(x)


def test_buffers_that_a_forward_puts_in_place(path: Path) -> None:
    torch.manual_seed(0)
    model = Reassigns()
    before = picture(model)
    resadapt.inject_adapters(model, "conv", 2, example_input=X)
    assert resadapt.save_adapters(model, path).ok
    assert model.n == 0
    assert model.grid is None
    resadapt.remove_adapters(model)
    assert picture(model) == before


def test_a_cache_that_is_filled_later_is_no_drift(path: Path) -> None:
    class Caches(Reassigns):
        def forward(self, x: Tensor) -> Tensor:
            self.grid = torch.ones(x.shape[-1])
            return self.conv(x)

    torch.manual_seed(0)
    model = resadapt.inject_adapters(Caches(), "conv", 2)
    model(X)
    assert resadapt.check_backbone(model).ok
    assert resadapt.save_adapters(model, path).ok
    torch.manual_seed(0)
    ran = Caches()
    ran(X)
    resadapt.load_adapters(ran, path)


def test_keep_head_without_an_active_set() -> None:
    model = resadapt.inject_adapters(net(), "c2", 2, head="head")
    with torch.no_grad():
        model.head.weight.fill_(3)
    resadapt.inject_adapters(model, "c2", 2, name="b")
    resadapt.set_active_adapters(model, None)
    with pytest.raises(resadapt.InjectionError, match="whose head"):
        resadapt.remove_adapters(model, keep_head=True)
    resadapt.remove_adapters(model, "b")
    resadapt.remove_adapters(model, keep_head=True)
    assert model.head.weight.eq(3).all()


def test_loading_a_state_dict_is_all_or_nothing_for_any_tensor() -> None:
    model = resadapt.inject_adapters(net(), "c2", 2, head="head")
    before = picture(model)
    state = resadapt.adapter_state_dict(model)
    last = list(state)[-1]
    for wrong in (state[last].to("meta"), state[last].to_sparse()):
        changed = {key: value + 1 for key, value in state.items()} | {last: wrong}
        with pytest.raises(resadapt.AdapterKeyError, match="is no dense tensor with values"):
            resadapt.load_adapter_state_dict(model, changed)
        assert picture(model) == before
    with pytest.raises(resadapt.AdapterKeyError, match="state_dict is NoneType"):
        resadapt.load_adapter_state_dict(model, None)  # type: ignore[arg-type]


def test_loading_a_sets_own_tensors_in_another_order() -> None:
    model = resadapt.inject_adapters(net(head=nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))), "c2", 2, head="head")
    a, b = model.head[0].weight, model.head[1].weight
    expected = b.detach().clone(), a.detach().clone()
    state = resadapt.adapter_state_dict(model) | {"head.head.0.weight": b, "head.head.1.weight": a}
    resadapt.load_adapter_state_dict(model, state)
    assert torch.equal(a, expected[0])
    assert torch.equal(b, expected[1])


def test_threads_in_the_first_forward() -> None:
    model = resadapt.inject_adapters(net(), ["bn", "c2"], 2).eval()
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


def test_a_first_forward_that_fails_leaves_no_count() -> None:
    model = resadapt.inject_adapters(net(head=nn.Linear(5, 2)), "c2", 2)
    with pytest.raises(RuntimeError):
        model(X)
    for _ in range(2):
        model.c2(torch.zeros(1, 4, 2, 2))


def test_a_site_of_one_set_in_the_head_of_another() -> None:
    model = resadapt.inject_adapters(net(), "c2", 2, name="a")
    resadapt.inject_adapters(model, "bn", 2, name="b", head="c2")
    count = resadapt.count_parameters(model)
    assert count.head == 4 * 4 + 4 == resadapt.list_adapters(model)[1].head_parameters
    assert count.trainable == count.adapters + count.head


def test_a_norm_that_was_held_trains_in_a_head_at_once() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(4))
            self.bias = nn.Parameter(torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.mean += 1
            return x + self.bias[:, None, None]

    model = resadapt.inject_adapters(net(norm=Own()), "c2", 2, name="a").train()
    model(X)
    resadapt.inject_adapters(model, "c2", 2, name="b", head="bn")
    model(X)
    assert model.bn.mean.tolist() == [1.0] * 4


def test_models_that_hide_their_modules_and_parameters() -> None:
    class Hides(Net):
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
    plain = net()
    with torch.no_grad():
        for parameter in resadapt.trainable_parameters(model):
            parameter.add_(1)
    assert not torch.allclose(model(X), plain(X))
    resadapt.remove_adapters(model)


def test_a_model_that_changes_its_input(path: Path) -> None:
    class InPlace(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(2))

    torch.manual_seed(0)
    model = resadapt.inject_adapters(InPlace(), "c2", 2)
    probe = X.clone()
    assert resadapt.save_adapters(model, path, probe=probe)["outputs"].outcome == "passed"
    assert torch.equal(probe, X)


def test_two_models_that_share_a_backbone() -> None:
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    one, two = (nn.Sequential(backbone, nn.Conv2d(4, 4, 1)) for _ in range(2))
    resadapt.inject_adapters(one, "1", 2)
    with pytest.raises(resadapt.InjectionError, match="frozen by an injection into another model, which shares it"):
        resadapt.inject_adapters(two, "1", 2)
    assert resadapt.check_backbone(one).ok


def test_special_files_and_permissions_stay(tmp_path: Path) -> None:
    model = resadapt.inject_adapters(net(), "c2", 2)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(resadapt.AdapterFileError, match="no ordinary file"):
        resadapt.save_adapters(model, tmp_path / "fifo")
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)
    path = tmp_path / "set.pt"
    resadapt.save_adapters(model, path)
    path.chmod(0o600)
    resadapt.save_adapters(model, path)
    assert path.stat().st_mode & 0o777 == 0o600
    resadapt.save_adapters(model, tmp_path / ("n" * 250 + ".pt"))


def test_recorded_outputs_of_other_kinds_than_floats() -> None:
    for one, other in (
        (torch.tensor([1 + 0j]), torch.tensor([1 + 1000j])),
        (torch.tensor([2**60]), torch.tensor([2**60 + 7])),
    ):
        record, stored = record_probe("given", None, X, {"output": one})
        assert farthest(record, stored, {"output": one})[1]
        assert not farthest(record, stored, {"output": other})[1]
    record, stored = record_probe("given", None, X, {"output": torch.ones(3)})
    assert not farthest(record, {"probe.output": torch.ones(0)}, {"output": torch.ones(3)})[1]


def test_no_numbers_are_no_proof(path: Path) -> None:
    class Empty(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:0]

    report = resadapt.save_adapters(resadapt.inject_adapters(Empty(), "c2", 2), path)
    assert report["outputs"].outcome == "not checked"


def test_a_failed_load_keeps_gradients(path: Path) -> None:
    resadapt.save_adapters(resadapt.inject_adapters(net(), "c2", 2, head="head"), path)
    model = net(head=nn.Linear(4, 5)).eval()
    model(X).sum().backward()
    with pytest.raises(resadapt.AdapterKeyError):
        resadapt.load_adapters(model, path)
    assert model.conv.weight.grad is not None


def test_a_forward_of_its_own_on_one_sequential() -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1)))
    model[0].forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(resadapt.InjectionError, match="container with a forward of its own"):
        resadapt.inject_adapters(model, "0", 2)


def test_saving_under_autocast_records_what_is_there_without(path: Path) -> None:
    model = resadapt.inject_adapters(net(), "c2", 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert resadapt.save_adapters(model, path).ok
    assert resadapt.verify_adapters(model, path)["recorded outputs"].outcome == "passed"


def _resealed(content: Any, path: Path, compression: int = zipfile.ZIP_STORED) -> None:
    buffer, out = io.BytesIO(), io.BytesIO()
    torch.save(content, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(out, "w", compression) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member), compress_type=compression)
        new.comment = b"resadapt:" + b"0" * 64
    data = bytearray(out.getvalue())
    data[-64:] = _seal(data, len(data) - 64)
    path.write_bytes(data)


def test_bombs(path: Path) -> None:
    """A small file cannot take a large memory."""
    resadapt.save_adapters(resadapt.inject_adapters(net(), "c2", 2), path)
    content = torch.load(path, weights_only=True)
    _resealed(content, path, zipfile.ZIP_DEFLATED)
    with pytest.raises(resadapt.AdapterFileError, match="compressed content"):
        resadapt.read_adapter_info(path)
    for bomb in (torch.ones(1).expand(10**14), torch.ones(2, 2).to_sparse(), torch.ones(2, device="meta")):
        _resealed({**content, "tensors": {"adapters.c2.up.bias": bomb}}, path)
        with pytest.raises(resadapt.AdapterFileError, match=r"no plain tensor|cannot be read"):
            read_adapter_file(path)


@pytest.mark.parametrize(
    "call",
    [
        lambda m, p: resadapt.inject_adapters(m, None),  # type: ignore[arg-type]
        lambda m, p: resadapt.inject_adapters(m, 3),  # type: ignore[arg-type]
        lambda m, p: resadapt.inject_adapters(m, {3: 4}),  # type: ignore[dict-item]
        lambda m, p: resadapt.inject_adapters(m, "c2", head=None),  # type: ignore[arg-type]
        lambda m, p: resadapt.inject_adapters(m, "c2", name=["a"]),  # type: ignore[arg-type]
        lambda m, p: resadapt.inject_adapters(m, "c2", None),  # type: ignore[arg-type]
        lambda m, p: resadapt.load_adapters(m, None),  # type: ignore[arg-type]
        lambda m, p: resadapt.load_adapters(m, "a\0b"),
        lambda m, p: resadapt.load_adapters("m", p),  # type: ignore[type-var]
        lambda m, p: resadapt.save_adapters(resadapt.inject_adapters(m, "c2"), 3),  # type: ignore[arg-type]
        lambda m, p: resadapt.save_adapters(resadapt.inject_adapters(m, "c2"), None),  # type: ignore[arg-type]
        lambda m, p: resadapt.save_adapters(resadapt.inject_adapters(m, "c2"), p, metric=3),  # type: ignore[arg-type]
        lambda m, p: resadapt.save_adapters(resadapt.inject_adapters(m, "c2"), p, metric=lambda m: 10**400),
        lambda m, p: resadapt.save_adapters(resadapt.inject_adapters(m, "c2"), p, metric=lambda m: "0.5"),  # type: ignore[arg-type]
        lambda m, p: resadapt.summary("m"),  # type: ignore[arg-type]
        lambda m, p: resadapt.count_parameters(None),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments_get_an_error_of_the_librarys_own(call: Any, path: Path) -> None:
    with pytest.raises(resadapt.AdapterError):
        call(net(), path)
    assert not path.exists()


def test_contexts_around_injection(path: Path) -> None:
    with torch.inference_mode():
        model = resadapt.inject_adapters(net(), "c2", 2, head="head")
    with torch.device("meta"):
        other = resadapt.inject_adapters(_on_cpu(), "c2", 2, head="head")
    assert {p.device.type for p in other.parameters()} == {"cpu"}
    fresh = _on_cpu()
    resadapt.inject_adapters(fresh, "c2", 2)
    train(fresh, torch.optim.SGD(resadapt.trainable_parameters(fresh), lr=0.1), inputs=X)
    assert resadapt.list_adapters(model)


def _on_cpu() -> Any:
    with torch.device("cpu"):
        return net()


def test_a_resnet_block_with_other_parts() -> None:
    model = resnet18()
    model.layer4[1].conv2 = nn.Sequential(nn.Conv2d(512, 512, 3, padding=1))
    resadapt.inject_adapters(model, "layer4", 2)
    assert resadapt.list_adapters(model)[0].sites[0].channels == 512


def test_a_name_that_looks_like_a_glob() -> None:
    model = nn.Sequential()
    model.add_module("[x]", nn.Conv2d(3, 4, 1))
    assert resadapt.list_adapters(resadapt.inject_adapters(model, "[x]", 2))[0].sites[0].name == "[x]"
