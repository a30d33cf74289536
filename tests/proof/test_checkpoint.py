"""Loading trusts nothing: wrong bytes, backbone or shapes; and the model is as before."""

from __future__ import annotations

import builtins
import copy
import importlib.util
import io
import json
import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import images, picture, private, small_net, small_resnet, train
from torch import Tensor, nn
from torchvision.models import resnet50

import resadapt
from resadapt.base.fingerprint import TensorRecord
from resadapt.files.container import decode, encode

FORMATS = ["pt", "safetensors"]
X = images()


@pytest.fixture(params=FORMATS)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / f"set.{request.param}"


def tiny(classes: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 30 * 30, classes)
    ).eval()


def trained_tiny() -> nn.Module:
    model = resadapt.inject_adapters(tiny(), ["0", "1"], 2, head="3")
    train(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    return model.eval()


def test_round_trip(path: Path) -> None:
    model = resadapt.inject_adapters(small_resnet(), head="fc")
    train(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    assert resadapt.save_adapters(model, path, metadata={"f1": 0.5, "notes": ["a", None]}).ok
    assert path.stat().st_size < 600_000
    fresh = resadapt.load_adapters(small_resnet(), path)
    assert torch.equal(fresh.eval()(X), model.eval()(X))
    assert [p.requires_grad for p in fresh.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    info = resadapt.read_adapter_info(path)
    assert info.metadata == {"f1": 0.5, "notes": ["a", None]}
    assert info.size == path.stat().st_size
    assert info.set == replace(
        info.set, name="default", family="pooled", dropout=0.1, norm="frozen", head=("fc",)
    )
    assert [(s.name, s.channels, s.bottleneck) for s in info.set.sites] == [
        (f"layer{i}", 32 * 2**i, 64) for i in range(1, 5)
    ]
    assert "fc.weight" not in info.backbone
    assert "bn1.running_mean" in info.backbone
    assert set(info.versions) == {"resadapt", "torch", "torchvision"}


def test_same_seed_same_bytes(path: Path) -> None:
    written = []
    for _ in range(2):
        torch.manual_seed(7)
        model = resadapt.inject_adapters(small_resnet(), head="fc")
        train(model, torch.optim.AdamW(resadapt.parameter_groups(model, 0.01)))
        resadapt.save_adapters(model, path, metadata={"b": 1, "a": 2})
        written.append(path.read_bytes())
        path.unlink()
    assert written[0] == written[1]
    private(model, "fc").bias.data[0] += 1
    resadapt.save_adapters(model, path)
    assert path.read_bytes() != written[0]


def test_saving_does_not_disturb_the_training(path: Path) -> None:
    results = []
    for saving in (False, True):
        torch.manual_seed(7)
        model = resadapt.inject_adapters(small_resnet(), head="fc", dropout=0.5)
        optimizer = torch.optim.AdamW(resadapt.parameter_groups(model, 0.01))
        for _ in range(3):
            train(model, optimizer, steps=1)
            if saving:
                resadapt.save_adapters(
                    model, path, metric=lambda m: m(X + torch.rand(())).sum().item()
                )
                assert model.training
        results.append(resadapt.adapter_state_dict(model))
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_every_bit_of_the_file_counts(path: Path) -> None:
    resadapt.save_adapters(resadapt.inject_adapters(small_net(), "c2", 2, head="head"), path)
    data = path.read_bytes()
    decode(data, path)
    changed = bytearray(data)
    for position in range(len(data)):
        for bit in range(8):
            changed[position] ^= 1 << bit
            with pytest.raises(resadapt.AdapterFileError, match="damaged"):
                decode(bytes(changed), path)
            changed[position] ^= 1 << bit
    for position in range(0, len(data), 37):
        for changed in (
            data[:position],
            data[:position] + data[position + 1 :],
            data[:position] + b"\0" + data[position:],
        ):
            with pytest.raises(resadapt.AdapterFileError, match="damaged"):
                decode(changed, path)
    with pytest.raises(resadapt.AdapterFileError):
        decode(data + b"\0", path)


def test_a_damaged_file_leaves_the_model_as_it_was(path: Path) -> None:
    resadapt.save_adapters(trained_tiny(), path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    for model in (tiny(), trained_tiny()):
        before = picture(model)
        for call in (resadapt.load_adapters, resadapt.verify_adapters):
            with pytest.raises(resadapt.AdapterFileError, match="damaged"):
                call(model, path)
        assert picture(model) == before


def plain_pt(path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(3)}, path)


def evil(path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (open, (str(path) + ".executed", "w"))

    buffer = io.BytesIO()
    torch.save({"manifest": Evil(), "tensors": {}}, buffer)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = b"resadapt:" + b"0" * 64
    data = bytearray(buffer.getvalue())
    from resadapt.files.container import _seal

    data[-64:] = _seal(data, len(data) - 64)
    path.write_bytes(data)


def foreign_safetensors(path: Path) -> None:
    import safetensors.torch

    safetensors.torch.save_file({"a": torch.zeros(3)}, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p.write_bytes(b""), "not an adapter file"),
        (lambda p: p.write_bytes(b"PK"), "not an adapter file"),
        (lambda p: p.write_bytes(b"\x80\x04N."), "not an adapter file"),
        (lambda p: p.write_bytes(b"\xff" * 100), "not an adapter file"),
        (lambda p: p.write_bytes((9).to_bytes(8, "little") + b'{"a":"b"}'), "not an adapter file"),
        (lambda p: p.write_bytes(pickle.dumps({"a": 1})), "not an adapter file"),
        (plain_pt, "not an adapter file"),
        (foreign_safetensors, "not an adapter file"),
        (evil, "cannot be read"),
        (lambda p: p.mkdir(), "the directory has neither"),
        (lambda p: None, "No such file"),
    ],
)
def test_other_files(make: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    make(path)
    with pytest.raises(resadapt.AdapterFileError, match=message):
        resadapt.read_adapter_info(path)
    with pytest.raises(resadapt.AdapterFileError, match=message):
        resadapt.load_adapters(tiny(), path)
    assert not list(tmp_path.glob("*.executed"))


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], Any]) -> None:
    """Writes a file again with a valid seal and another content."""
    manifest, tensors = decode(path.read_bytes(), path)
    change(manifest, tensors)
    path.write_bytes(encode(manifest, tensors, path.suffix[1:]))


def _absurd(
    sizes: dict[str, int], family: str, **options: Any
) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def change(manifest: dict[str, Any], _tensors: dict[str, Tensor]) -> None:
        manifest["set"]["sites"][0].update(sizes)
        manifest["set"].update(family=family, options=options)

    return change


def _added(manifest: dict[str, Any], tensors: dict[str, Tensor], key: str) -> None:
    tensors[key] = torch.zeros(1)
    record = TensorRecord.of(tensors[key])
    manifest["tensors"][key] = [record.dtype, list(record.shape), record.sha256]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda m, t: m.update(format_version=5),
            resadapt.AdapterFileError,
            "written in format 5 by .* Install a newer resadapt",
        ),
        (lambda m, t: m.pop("format_version"), resadapt.AdapterFileError, "format None"),
        *(
            (
                lambda m, t, number=number: m.update(format_version=number),
                resadapt.AdapterFileError,
                f"written in format {number}. Formats before 3 were never released.* save the file",
            )
            for number in (2, 1, 0)
        ),
        (
            lambda m, t: m["backbone"].update(modules=None),
            resadapt.AdapterFileError,
            "manifest is not valid for format 3",
        ),
        (
            lambda m, t: m.pop("backbone"),
            resadapt.AdapterFileError,
            "manifest is not valid for format 3.*backbone",
        ),
        (
            lambda m, t: m["set"].pop("family"),
            resadapt.AdapterFileError,
            "expected exactly the fields",
        ),
        (
            lambda m, t: m["set"].update(extra=1),
            resadapt.AdapterFileError,
            "expected exactly the fields",
        ),
        (
            lambda m, t: m["set"].update(dropout="0.1"),
            resadapt.AdapterFileError,
            "set.dropout: expected float",
        ),
        (
            lambda m, t: m["set"]["sites"][0].update(channels=True),
            resadapt.AdapterFileError,
            "site.channels: expected int",
        ),
        (
            lambda m, t: m["set"]["sites"][0].update(bottleneck=-1),
            resadapt.AdapterFileError,
            "below 1",
        ),
        (lambda m, t: m["set"].update(head=[3]), resadapt.AdapterFileError, "lists of names"),
        (
            lambda m, t: m["set"].update(blueprints={"bn": {}}),
            resadapt.AdapterFileError,
            "blueprints: expected names of head modules only",
        ),
        (_absurd({"bottleneck": 0}, "conv"), resadapt.AdapterFileError, "ZeroDivisionError"),
        (
            _absurd({"spatial_dims": 8, "bottleneck": 1}, "conv"),
            resadapt.AdapterFileError,
            "Conv8d",
        ),
        (_absurd({}, "lora", alpha=10**400), resadapt.AdapterFileError, "OverflowError"),
        (
            lambda m, t: m["set"].update(family="lola"),
            resadapt.AdapterFileError,
            "family='lola' does not exist.*register",
        ),
        (
            lambda m, t: m["set"].update(norm="train"),
            resadapt.AdapterFileError,
            "norm='train' does not exist",
        ),
        (lambda m, t: m["set"].update(name="a.b"), resadapt.AdapterFileError, "cannot name a set"),
        (
            lambda m, t: m["set"].update(options={"init": 3}),
            resadapt.AdapterFileError,
            "init=3 is not known",
        ),
        (
            lambda m, t: m["set"].update(options={"x": 3}),
            resadapt.AdapterFileError,
            "does not take these options",
        ),
        (
            lambda m, t: m["set"]["sites"][0].update(name="9", owner="9"),
            resadapt.AdapterFileError,
            "has no module '9'",
        ),
        (
            lambda m, t: m["set"]["sites"][0].update(owner="2"),
            resadapt.AdapterFileError,
            "cannot be injected",
        ),
        (
            lambda m, t: m["set"]["sites"][0].update(owner="1"),
            resadapt.AdapterFileError,
            "is named twice",
        ),
        (lambda m, t: m["set"].update(sites=[]), resadapt.AdapterKeyError, "is unexpected"),
        (
            lambda m, t: m["set"].update(sites=[], head=[], blueprints={}),
            resadapt.AdapterFileError,
            "the set is empty",
        ),
        (
            lambda m, t: m["set"].update(norms=["1"]),
            resadapt.AdapterFileError,
            "are not those of this model",
        ),
        (
            lambda m, t: m["set"].update(blueprints={"3": {"type": "Linear"}}),
            resadapt.AdapterFileError,
            "cannot be built from its description",
        ),
        (
            lambda m, t: m["set"].update(head=["3", "3"]),
            resadapt.AdapterFileError,
            "is named twice",
        ),
        (
            lambda m, t: t.update(strange=torch.zeros(1)),
            resadapt.AdapterFileError,
            "unknown kind: 'strange'",
        ),
        (
            lambda m, t: _added(m, t, "adapters.9.up.bias"),
            resadapt.AdapterKeyError,
            "'adapters.9.up.bias' is unexpected",
        ),
        (
            lambda m, t: (m["tensors"].pop("probe.output"), t.pop("probe.output")),
            resadapt.AdapterFileError,
            "'output' are missing",
        ),
        (
            lambda m, t: m["backbone"]["tensors"]["1.running_mean"].__setitem__(0, "quint8"),
            resadapt.BackboneMismatchError,
            "is float32 where",
        ),
        (
            lambda m, t: m["set"].update(head=["3", "9"]),
            resadapt.AdapterFileError,
            "cannot be injected",
        ),
        (
            lambda m, t: m["tensors"].pop("head.3.bias"),
            resadapt.AdapterFileError,
            "'head.3.bias' is new",
        ),
        (lambda m, t: t.pop("head.3.bias"), resadapt.AdapterFileError, "'head.3.bias' is missing"),
        (
            lambda m, t: t["head.3.bias"].add_(1),
            resadapt.AdapterFileError,
            "'head.3.bias' has other values",
        ),
        (
            lambda m, t: m["tensors"]["head.3.bias"].__setitem__(0, "mess"),
            resadapt.AdapterFileError,
            "not valid for format 3",
        ),
        (
            lambda m, t: (m["tensors"].pop("head.3.bias"), t.pop("head.3.bias")),
            resadapt.AdapterKeyError,
            "'head.3.bias' is missing",
        ),
        (
            lambda m, t: m["backbone"]["tensors"]["1.running_mean"].__setitem__(2, "0"),
            resadapt.BackboneMismatchError,
            "'1.running_mean'",
        ),
        (
            lambda m, t: m.update(probe={"source": "x"}),
            resadapt.AdapterFileError,
            "not valid for format 3",
        ),
        (
            lambda m, t: m["probe"].update(outputs=[]),
            resadapt.AdapterFileError,
            "not valid for format 3",
        ),
        (
            lambda m, t: m["probe"]["outputs"]["output"].pop("step"),
            resadapt.AdapterFileError,
            "not an output record",
        ),
        (
            lambda m, t: m["probe"].update(autocast="float64"),
            resadapt.AdapterFileError,
            "not a probe record",
        ),
        (lambda m, t: m.update(format_version=0), resadapt.AdapterFileError, "format 0"),
        (
            lambda m, t: m["set"]["sites"][0].update(bottleneck=10**15),
            resadapt.AdapterFileError,
            "does not match the file's tensors",
        ),
        (
            lambda m, t: m["set"]["sites"][0].update(bottleneck=2**62),
            resadapt.AdapterFileError,
            "cannot be injected",
        ),
        (
            lambda m, t: m["set"]["sites"][0].update(spatial_dims=10**9),
            resadapt.AdapterFileError,
            "more than 8",
        ),
    ],
)
def test_sealed_files_with_wrong_content(
    change: Any, error: type[Exception], message: str, path: Path
) -> None:
    resadapt.save_adapters(trained_tiny(), path, probe=X)
    rewritten(path, change)
    for model in (tiny(), resadapt.inject_adapters(tiny(), "0", 2, name="other")):
        before = picture(model)
        with pytest.raises(error, match=message):
            resadapt.load_adapters(model, path)
        assert picture(model) == before


def _new_layer(model: nn.Module, name: str) -> nn.Module:
    nn.init.ones_(model.get_submodule(name).weight)  # type: ignore[arg-type]
    return model


def _drifted_norm(model: nn.Module) -> nn.Module:
    model.bn1.running_mean[0] += 1e-6
    return model


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: small_resnet(1), r"'conv1\.weight' has other values"),
        (
            lambda: _drifted_norm(small_resnet()),
            r"1 tensors and modules differ from the file: "
            r"'bn1\.running_mean' has other values\. Build the same .* first\.$",
        ),
        (
            lambda: _new_layer(small_resnet(), "conv1"),
            r"If 'conv1' is a new layer with random weights, .*head='conv1'",
        ),
        (lambda: resnet50(num_classes=3), r"has shape \[64, 64, 1, 1\] where \[64, 64, 3, 3\]"),
        (lambda: small_resnet().half(), r"is float16 where float32 was recorded"),
        (tiny, r"'conv1\.weight' is missing"),
    ],
)
def test_wrong_backbones(other: Callable[[], nn.Module], message: str, tmp_path: Path) -> None:
    resadapt.save_adapters(resadapt.inject_adapters(small_resnet(), head="fc"), tmp_path / "set.pt")
    model = other()
    before = picture(model)
    with pytest.raises(resadapt.BackboneMismatchError, match=message):
        resadapt.load_adapters(model, tmp_path / "set.pt")
    with pytest.raises(resadapt.InjectionError, match=r"model is \w+Path, not"):
        resadapt.load_adapters(tmp_path / "set.pt", model)  # type: ignore[type-var, arg-type]
    assert picture(model) == before
    report = resadapt.verify_adapters(model, tmp_path / "set.pt")
    assert not report.ok
    assert report["backbone"].outcome == "failed"
    assert report["tensors"].outcome == report["outputs"].outcome == "not checked"


def test_a_head_of_another_width_gives_way_to_that_of_the_file(path: Path) -> None:
    model = trained_tiny()
    resadapt.save_adapters(model, path)
    other = tiny(classes=5)
    before = picture(other)
    assert torch.equal(resadapt.load_adapters(other, path).eval()(X), model.eval()(X))
    resadapt.remove_adapters(other)
    assert picture(other.train(before[""]["training"])) == before
    rewritten(path, lambda m, t: m["set"].update(blueprints={}))
    with pytest.raises(
        resadapt.AdapterKeyError,
        match=r"'head.3.weight' has shape \[2, 3600\], the model has \[5, 3600\].*Replace",
    ):
        resadapt.load_adapters(other, path)
    assert picture(other) == before


def test_a_double_model_takes_a_float_file(path: Path) -> None:
    model = trained_tiny()
    resadapt.save_adapters(model, path)
    double = resadapt.load_adapters(tiny().double(), path)
    assert torch.allclose(double(X.double()), model(X).double(), atol=1e-4)
    state = {k: v + 1e-12 for k, v in resadapt.adapter_state_dict(double).items()}
    with pytest.raises(
        resadapt.AdapterKeyError, match="is float64 and would lose precision in the model's float32"
    ):
        resadapt.load_adapter_state_dict(model, state)


def test_state_dict_is_strict_and_all_or_nothing() -> None:
    model = trained_tiny()
    state = resadapt.adapter_state_dict(model)
    assert all(key.startswith(("adapters.0.", "adapters.1.", "head.3.")) for key in state)
    before = picture(model)
    zeros = {key: torch.zeros_like(value) for key, value in state.items()}
    for change, message in (
        (lambda s: s.pop("adapters.1.up.bias"), "'adapters.1.up.bias' is missing"),
        (lambda s: s.update(typo=torch.zeros(1)), "'typo' is unexpected"),
        (
            lambda s: s.update({"head.3.bias": torch.zeros(3)}),
            r"'head.3.bias' has shape \[3\], the model has \[2\]",
        ),
        (lambda s: s.update({"head.3.bias": [0, 0]}), "'head.3.bias' is list, not a tensor"),
        (lambda s: s.update({"head.3.bias": None}), "'head.3.bias' is NoneType, not a tensor"),
    ):
        wrong: Any = dict(zeros)
        change(wrong)
        with pytest.raises(resadapt.AdapterKeyError, match=message):
            resadapt.load_adapter_state_dict(model, wrong)
        assert picture(model) == before
    kept = {key: value.clone() for key, value in state.items()}
    resadapt.load_adapter_state_dict(model, zeros)
    assert all(torch.equal(state[key], kept[key]) for key in state), "what was handed out is a copy"
    assert not any(value.any() for value in resadapt.adapter_state_dict(model).values())


def test_loading_into_sets(path: Path) -> None:
    model = trained_tiny()
    resadapt.save_adapters(model, path)
    expected = model(X)
    resadapt.load_adapters(model, path, name="copy")
    first, second = resadapt.list_adapters(model)
    assert (first.name, first.active, second.name, second.active) == (
        "default",
        False,
        "copy",
        True,
    )
    assert (
        (first.norm, first.family, first.head)
        == (second.norm, second.family, second.head)
        == ("frozen", "pooled", ("3",))
    )
    assert torch.equal(model(X), expected)
    state = resadapt.adapter_state_dict(model)
    resadapt.load_adapter_state_dict(model, {k: torch.zeros_like(v) for k, v in state.items()})
    resadapt.load_adapters(model, path)
    assert [info.active for info in resadapt.list_adapters(model)] == [True, False]
    assert torch.equal(model(X), expected)
    resadapt.inject_adapters(model, "0", 3, name="else")
    before = picture(model)
    with pytest.raises(
        resadapt.AdapterKeyError, match="set 'else' differs from the file's in 'sites', 'head'"
    ):
        resadapt.load_adapters(model, path, name="else")
    assert picture(model) == before


def test_a_set_that_is_not_active_is_saved_as_itself(path: Path) -> None:
    model = trained_tiny()
    expected = model(X)
    resadapt.inject_adapters(model, "1", 2, name="other", head="3")
    model(X)
    before = picture(model)
    assert resadapt.save_adapters(
        model, path, name="default", metric=lambda m: m(X).sum().item()
    ).ok
    assert picture(model) == before
    assert torch.equal(resadapt.load_adapters(tiny(), path)(X), expected)
    resadapt.set_active_adapters(model, None)
    assert (
        resadapt.verify_adapters(model, path, metric=lambda m: m(X).sum().item())["metric"].outcome
        == "passed"
    )
    assert [info.name for info in resadapt.list_adapters(model) if info.active] == []


def test_wrapped_models(tmp_path: Path) -> None:
    resadapt.save_adapters(nn.DataParallel(trained_tiny()), tmp_path / "set.pt")
    with pytest.raises(resadapt.InjectionError, match="wraps the model"):
        resadapt.load_adapters(nn.DataParallel(tiny()), tmp_path / "set.pt")
    resadapt.load_adapters(nn.DataParallel(trained_tiny()), tmp_path / "set.pt")


def test_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained_tiny()
    resadapt.save_adapters(model, tmp_path / "with.safetensors")
    find, real = importlib.util.find_spec, builtins.__import__
    monkeypatch.setattr(
        "resadapt.files.container.find_spec",
        lambda name: None if name == "safetensors" else find(name),
    )

    def no_import(name: str, *args: Any) -> Any:
        if name.startswith("safetensors"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", no_import)
    with pytest.raises(resadapt.AdapterFileError, match=r"Install resadapt\[safetensors\]"):
        resadapt.save_adapters(model, tmp_path / "new.safetensors")
    with pytest.raises(resadapt.AdapterFileError, match=r"install resadapt\[safetensors\]"):
        resadapt.load_adapters(tiny(), tmp_path / "with.safetensors")
    for name in ("set", "set.pt"):
        assert resadapt.save_adapters(model, tmp_path / name).ok
        assert (tmp_path / name).read_bytes()[:2] == b"PK"


def test_a_name_without_suffix_prefers_safetensors(tmp_path: Path) -> None:
    resadapt.save_adapters(trained_tiny(), tmp_path / "set")
    assert (tmp_path / "set").read_bytes()[8:9] == b"{"
    resadapt.load_adapters(tiny(), tmp_path / "set")


def test_pt_files_are_plain_for_other_readers(tmp_path: Path) -> None:
    model = trained_tiny()
    resadapt.save_adapters(model, tmp_path / "set.pt")
    content = torch.load(tmp_path / "set.pt", weights_only=True)
    state = resadapt.adapter_state_dict(model)
    assert all(torch.equal(content["tensors"][key], value) for key, value in state.items())
    assert json.loads(content["manifest"])["set"]["family"] == "pooled"


def test_head_norms_travel(path: Path) -> None:
    model = resadapt.inject_adapters(small_resnet(), "layer1", 2, head=["layer4", "fc"])
    train(model, torch.optim.SGD(model.parameters(), lr=0.01))
    resadapt.save_adapters(model, path)
    fresh = resadapt.load_adapters(small_resnet(), path)
    one, other = (private(each, "layer4")[1].bn2 for each in (fresh, model))
    assert torch.equal(one.running_var, other.running_var)
    assert one.num_batches_tracked == other.num_batches_tracked == 3
    assert torch.equal(fresh.eval()(X), model.eval()(X))


def test_non_persistent_buffers_of_a_head_stay_at_home(path: Path) -> None:
    class Head(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 2)
            self.register_buffer("cache", torch.ones(2), persistent=False)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Head())
    twin = copy.deepcopy(model)
    resadapt.save_adapters(resadapt.inject_adapters(model, "0", 2, head="3"), path)
    assert "head.3.cache" not in resadapt.read_adapter_info(path).tensors
    assert torch.equal(resadapt.load_adapters(twin, path).eval()(X), model.eval()(X))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"a": float("nan")}, "metadata is not JSON"),
        ({"a": torch.zeros(1)}, "metadata is not JSON"),
        ({1: "a"}, "JSON would change metadata"),
        ({"a": (1, 2)}, "JSON would change metadata"),
        ([1, 2], "metadata is list"),
        ("text", "metadata is str"),
    ],
)
def test_metadata_that_would_not_come_back(metadata: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(resadapt.AdapterFileError, match=message):
        resadapt.save_adapters(trained_tiny(), tmp_path / "set.pt", metadata=metadata)
    assert not list(tmp_path.iterdir())


def test_loading_a_state_dict_is_all_or_nothing_for_any_tensor() -> None:
    model = resadapt.inject_adapters(small_net(), "c2", 2, head="head")
    before = picture(model)
    state = resadapt.adapter_state_dict(model)
    last = list(state)[-1]
    for wrong in (state[last].to("meta"), state[last].to_sparse()):
        changed = {key: value + 1 for key, value in state.items()} | {last: wrong}
        with pytest.raises(
            resadapt.AdapterKeyError, match="sparse, quantized or on the meta device"
        ):
            resadapt.load_adapter_state_dict(model, changed)
        assert picture(model) == before
    with pytest.raises(resadapt.AdapterKeyError, match="state_dict is NoneType"):
        resadapt.load_adapter_state_dict(model, None)  # type: ignore[arg-type]


def test_loading_a_sets_own_tensors_in_another_order() -> None:
    model = resadapt.inject_adapters(
        small_net(head=nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))), "c2", 2, head="head"
    )
    a, b = (layer.weight for layer in private(model, "head"))
    expected = b.detach().clone(), a.detach().clone()
    state = resadapt.adapter_state_dict(model) | {"head.head.0.weight": b, "head.head.1.weight": a}
    resadapt.load_adapter_state_dict(model, state)
    assert torch.equal(a, expected[0])
    assert torch.equal(b, expected[1])


def test_a_failed_load_keeps_gradients(path: Path) -> None:
    resadapt.save_adapters(resadapt.inject_adapters(small_net(), "c2", 2, head="head"), path)
    rewritten(path, lambda m, t: m["set"].update(blueprints={}))
    model = small_net(head=nn.Linear(4, 5)).eval()
    model(X).sum().backward()
    with pytest.raises(resadapt.AdapterKeyError):
        resadapt.load_adapters(model, path)
    assert model.conv.weight.grad is not None


def test_how_adapters_start_and_drop_out_need_not_be_shared(path: Path) -> None:
    model = resadapt.inject_adapters(small_net(), "c2", 2, head="head", init="normal", dropout=0.5)
    assert (
        resadapt.list_adapters(model)[0].sites
        == resadapt.list_adapters(resadapt.inject_adapters(small_net(), "c2", 2))[0].sites
    )
    resadapt.save_adapters(model, path)
    assert resadapt.read_adapter_info(path).set.options == {}
    for options in ({}, {"init": "identity"}, {"dropout": 0.0}, {"init": "normal", "dropout": 0.9}):
        other = resadapt.inject_adapters(small_net(), "c2", 2, head="head", **options)
        resadapt.load_adapters(other, path)
        assert torch.equal(other.eval()(X), model.eval()(X))
        assert other.c2.resadapt.default.dropout.p == options.get("dropout", 0.1), (
            "the live set keeps its own"
        )
        assert resadapt.verify_adapters(other, path, rebuild=small_net).ok
    assert resadapt.load_adapters(small_net(), path).c2.resadapt.default.dropout.p == 0.5


@pytest.mark.parametrize("inside", ["0.resadapt", "0.resadapt.other", "0.resadapt.other.up"])
def test_a_site_inside_another_sets_adapter(inside: str, path: Path) -> None:
    resadapt.save_adapters(trained_tiny(), path, probe=X)

    def change(manifest: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        manifest["set"]["sites"][0].update(name=inside, owner=inside)
        for group in (manifest["tensors"], tensors):
            for key in [key for key in group if key.startswith("adapters.0.")]:
                group[key.replace("adapters.0.", f"adapters.{inside}.")] = group.pop(key)

    rewritten(path, change)
    model = resadapt.inject_adapters(tiny(), "0", 2, name="other")
    before = picture(model)
    with pytest.raises(resadapt.AdapterFileError, match=f"has no module '{inside}'"):
        resadapt.load_adapters(model, path)
    assert picture(model) == before
    with pytest.raises(resadapt.InjectionError, match="matches no module"):
        resadapt.inject_adapters(model, inside, 2, name="third")


def test_loading_fails_before_gradients_are_gone(path: Path) -> None:
    """Whatever is wrong with the tensors, gradients that wait for their step are still there."""
    resadapt.save_adapters(resadapt.inject_adapters(small_net(), "c2", 2), path)
    data, tensors = decode(path.read_bytes(), path)
    key = "adapters.c2.up.weight"
    tensors[key] = torch.full(tensors[key].shape, 2**60 + 1)  # no number of float32
    data["tensors"][key] = TensorRecord.of(tensors[key]).to_json()
    path.write_bytes(encode(data, tensors, "pt"))
    for model in (small_net(), resadapt.inject_adapters(small_net(), "bn", 2, name="other")):
        model.eval()(X).sum().backward()
        gradients = [(p, p.grad) for p in model.parameters()]
        before = picture(model)
        with pytest.raises(resadapt.AdapterKeyError, match="would lose precision"):
            resadapt.load_adapters(model, path)
        assert picture(model) == before
        assert all(p.grad is gradient for p, gradient in gradients)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("where", ["adapters.layer4.up.weight", "head.fc.weight"])
def test_quantized_tensors_of_a_set_are_told(where: str, suffix: str, tmp_path: Path) -> None:
    model: Any = resadapt.inject_adapters(small_resnet(), "layer4", 4, head="fc").eval()
    module = private(model, "fc") if "head" in where else model.layer4[1].resadapt.default.up
    quantized = torch.quantize_per_tensor(module.weight.detach(), 0.1, 0, torch.qint8)
    module.weight = nn.Parameter(quantized, requires_grad=False)
    with pytest.raises(
        resadapt.AdapterKeyError,
        match=rf"'{re.escape(where)}' is Parameter \(qint8, strided\).*Save the set before "
        r"quantizing, or leave the sets out: quantize_\(model, config, filter_fn=",
    ):
        resadapt.adapter_state_dict(model)
    target = tmp_path / f"adapters.{suffix}"
    with pytest.raises(resadapt.AdapterError):
        resadapt.save_adapters(model, target)
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_head_is_told_at_the_injection() -> None:
    model: Any = small_resnet()
    quantized = torch.quantize_per_tensor(model.fc.weight.detach(), 0.1, 0, torch.qint8)
    model.fc.weight = nn.Parameter(quantized, requires_grad=False)
    before = picture(model)
    with pytest.raises(resadapt.InjectionError, match=r"head: 'fc\.weight' is Parameter \(qint8"):
        resadapt.inject_adapters(model, "layer4", 4, head="fc")
    with pytest.raises(resadapt.InjectionError, match=r"head: 'fc\.weight' is Parameter \(qint8"):
        resadapt.inject_adapters(small_resnet(), "layer4", 4, head={"fc": model.fc})
    assert picture(model) == before
