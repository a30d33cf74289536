"""The commands, in this process: what they print, write and return."""

from __future__ import annotations

import argparse
import doctest
import io
import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import resadapt
from resadapt.cli.adapted import AdaptedModel
from resadapt.cli.main import main
from resadapt.cli.output import write
from resadapt.files.container import decode

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "command_line.md"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process; returns its status, output and errors."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = int(str(stop.code))
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module that builds small backbones."""
    (tmp_path / "small_nets.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "def build(classes=2, seed=0):\n"
        "    torch.manual_seed(seed)\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),\n"
        "        nn.Conv2d(8, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),\n"
        "        nn.Linear(8, classes))\n"
        "def number():\n"
        "    return 3\n"
        "def branching():\n"
        "    model = build()\n"
        "    model[2].register_forward_hook(lambda *a: a[2] if a[2].sum() > 0 else -a[2])\n"
        "    return model\n"
        "def loud():\n"
        "    print('building')\n"
        "    return build()\n"
        "def leaving():\n"
        "    raise SystemExit(0)\n"
        "def broken():\n"
        "    raise RuntimeError('no\\nweights')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def trained(**options: Any) -> nn.Module:
    """An injected small backbone, with adapters that do something."""
    from small_nets import build  # type: ignore[import-not-found]

    if options.get("family") != "series":
        options["bottleneck"] = 2
    model = resadapt.inject_adapters(build(), ["0", "3"], **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in resadapt.trainable_parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.slow
def test_the_commands_of_the_page_print_what_it_shows(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    module, script = re.findall(
        r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL
    )
    Path("nets.py").write_text(module)
    exec(compile(script, str(PAGE), "exec"), {})
    commands = re.findall(
        r"^\$ resadapt (.*)\n((?:(?!\$ |```).*\n)*)", PAGE.read_text(), re.MULTILINE
    )
    assert len(commands) == 8
    checker, flags = doctest.OutputChecker(), doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    for command, shown in commands:
        status, out, err = run(*command.split())
        assert (status, err) == (int("diff day.safetensors night" in command), ""), command
        assert checker.check_output(shown, out, flags), f"{command}\n{out}"


def test_inspect_prints_every_part_of_a_file(run: Run, folder: Path) -> None:
    model = trained(family="lora", norm="affine", head="6", name="tags")
    resadapt.save_adapters(model, "a.pt", metadata={"note": "\x1b[2J", "long": "x" * 5000})
    status, out, _ = run("inspect", "a.pt")
    assert status == 0
    assert len(out) < 3000
    for part in (
        "tags",
        "lora, alpha=None",
        "bottleneck 2",
        "6  Linear  18 values",
        "1  33 values",
    ):
        assert part in out
    assert "\x1b" not in out
    assert r"\u001b[2J" in out
    status, out, _ = run("inspect", "a.pt", "--json")
    shown = json.loads(out)
    assert shown["set"]["name"] == "tags"
    assert shown["metadata"] == {"note": "\x1b[2J", "long": "x" * 5000}
    assert shown["backbone"]["class"] == "Sequential"
    assert shown["values"]["adapters.0"] == sum(
        tensor.numel()
        for name, tensor in resadapt.adapter_state_dict(model).items()
        if name.startswith("adapters.0.")
    )


def test_verify_builds_the_backbone_and_tells_a_wrong_one(run: Run, folder: Path) -> None:
    model = trained(head="6")
    x = torch.randn(2, 3, 8, 8)
    resadapt.save_adapters(model, "a.pt")
    resadapt.save_adapters(model, "given.pt", probe=x)
    torch.save(x, "probe.pt")
    torch.save(model.state_dict(), "injected.pt")
    from small_nets import build

    torch.save(build().state_dict(), "weights.pt")
    verify = ("verify", "a.pt", "--model", "small_nets:build")
    assert run(*verify)[0] == 0
    status, out, err = run("verify", "a.pt", "--model", "small_nets:loud", "--json")
    assert status == 0
    assert "building" in err
    assert json.loads(out)["ok"] is True
    assert json.loads(out)["checks"][6]["outcome"] == "passed"
    other = (*verify, "--model-args", '{"seed": 1}')
    status, out, _ = run(*other)
    assert status == 1
    assert "'0.weight' has other values" in out
    assert run(*other, "--json")[0] == 1
    assert run(*other, "--weights", "weights.pt")[0] == 0
    status, _, err = run(*other, "--weights", "injected.pt")
    assert status == 1
    assert "do not fit small_nets:build" in err
    given = ("verify", "given.pt", "--model", "small_nets:build")
    assert run(*given)[0] == 1, "the recorded outputs were not compared"
    assert run(*given, "--probe", "probe.pt")[0] == 0


def test_torchvision_and_timm_models_are_named(run: Run, folder: Path) -> None:
    from torchvision.models import squeezenet1_1

    torch.manual_seed(0)
    backbone = squeezenet1_1(num_classes=2)
    torch.save(backbone.state_dict(), "weights.pt")
    resadapt.save_adapters(resadapt.inject_adapters(backbone, "features.3", 4), "a.pt")
    model = ("--model", "torchvision:squeezenet1_1", "--model-args", '{"num_classes": 2}')
    assert run("verify", "a.pt", *model, "--weights", "weights.pt")[0] == 0
    assert run("verify", "a.pt", *model)[0] == 1, "random weights"
    status, _, err = run("verify", "a.pt", "--model", "torchvision:resnet19")
    assert status == 1
    assert "Unknown model resnet19" in err

    import timm

    torch.manual_seed(0)
    backbone = timm.create_model("test_resnet", num_classes=2)
    torch.save(backbone.state_dict(), "weights.pt")
    resadapt.save_adapters(resadapt.inject_adapters(backbone, "layer2", 4), "a.pt")
    model = ("--model", "timm:test_resnet", "--model-args", '{"num_classes": 2}')
    assert run("verify", "a.pt", *model, "--weights", "weights.pt")[0] == 0
    status, _, err = run("verify", "a.pt", "--model", "timm:resnet19")
    assert status == 1
    assert "Unknown model (resnet19)" in err


def test_diff_tells_what_differs(run: Run, folder: Path) -> None:
    model = trained(name="one", head="6")
    resadapt.save_adapters(model, "a.pt", metadata={"f1": 0.5, "kept": 1, "in": [1], "x": ""})
    assert run("diff", "a.pt", "a.pt") == (0, "", "")
    with torch.no_grad():
        model[0].resadapt.one.up.weight[0, 0] += 0.25
        model[3].resadapt.one.up.bias[0] += 0.5
    later = {"in": [True], "f1": True, "kept": 1, "new": [], "x": "x" * 5000}
    resadapt.save_adapters(model, "b.pt", metadata=later)
    assert "x" * 5000 in run("diff", "a.pt", "b.pt", "--tensors")[1]
    status, out, err = run("diff", "a.pt", "b.pt")
    assert len(out) < 1500
    assert (status, err) == (1, "")
    tensors = [line for line in out.splitlines() if line.startswith("tensors")]
    assert [line.split()[1:6] for line in tensors] == [
        ["adapters.3.up.bias:", "differs", "by", "up", "to"],
        ["adapters.0.up.weight:", "differs", "by", "up", "to"],
    ]
    assert [line.split()[6] for line in tensors] == ["0.5", "0.25"]
    assert "metadata  f1: 0.5 -> True" in out
    assert "metadata  in: [1] -> [True]" in out
    assert "metadata  new: nothing -> []" in out
    assert "kept" not in out
    assert "set  " not in out
    assert "backbone" not in out


def test_diff_compares_sets_and_backbones(run: Run, folder: Path) -> None:
    from small_nets import build

    resadapt.save_adapters(trained(head="6"), "a.pt")
    other = build(seed=1)
    other[3] = nn.Conv2d(8, 8, 3, padding=1, stride=2)
    other[2] = nn.Sigmoid()
    resadapt.save_adapters(resadapt.inject_adapters(other, ["0", "5"], 3), "b.pt")
    status, out, _ = run("diff", "a.pt", "b.pt")
    assert status == 1
    for line in (
        "site '0', bottleneck: 2 -> 3",
        "site '3': only in A",
        "site '5': only in B",
        "head: ('6',) -> ()",
        "module '3', stride: [1, 1] -> [2, 2]",
        "module '2', type: 'ReLU' -> 'Sigmoid'",
        "tensor '6.bias': only in B",
        "adapters.0.up.weight: [8, 2] torch.float32 -> [8, 3] torch.float32",
    ):
        assert line in out, line
    few, all_of_it = out, run("diff", "a.pt", "b.pt", "--tensors")[1]
    assert "more (--tensors lists them)" in few
    assert len(all_of_it.splitlines()) > len(few.splitlines())
    assert run("diff", "a.pt", "missing.pt")[0] == 2


def test_convert_keeps_every_bit_and_never_overwrites(run: Run, folder: Path) -> None:
    resadapt.save_adapters(trained(head="6"), "a.pt", metadata={"f1": 0.5})
    assert run("convert", "a.pt", "a.safetensors")[0] == 0
    assert run("convert", "a.safetensors", "b.pt")[0] == 0
    contents = [decode(Path(name).read_bytes(), Path(name)) for name in ("a.pt", "a.safetensors")]
    assert contents[0][0] == contents[1][0]
    assert all(torch.equal(tensor, contents[1][1][key]) for key, tensor in contents[0][1].items())
    assert Path("a.pt").read_bytes() == Path("b.pt").read_bytes()
    before = Path("a.safetensors").read_bytes()
    resadapt.save_adapters(trained(), "c.pt")
    status, _, err = run("convert", "c.pt", "a.safetensors")
    assert status == 1
    assert "--force" in err
    assert Path("a.safetensors").read_bytes() == before
    assert run("convert", "c.pt", "a.safetensors", "--force")[0] == 0
    assert run("diff", "c.pt", "a.safetensors")[0] == 0
    Path("link.pt").symlink_to("blob")
    assert run("convert", "a.safetensors", "link.pt")[0] == 0
    assert Path("blob").read_bytes() == Path("c.pt").read_bytes()
    assert run("convert", "c.pt", "c.zip")[0] == 1
    assert run("convert", "c.pt", "nowhere/c.pt")[0] == 1


@pytest.mark.parametrize("out", ["net.pt", "net.safetensors"])
def test_fold_writes_a_state_dict_of_the_backbone(run: Run, folder: Path, out: str) -> None:
    from small_nets import build

    model = trained(family="series", head="6")
    resadapt.save_adapters(model, "a.pt")
    status, _, err = run("fold", "a.pt", "--model", "small_nets:build", "--out", out)
    assert (status, err) == (0, "")
    if out == "net.pt":
        state = torch.load(out, weights_only=True)
    else:
        from safetensors.torch import load_file

        state = load_file(out)
    folded, x = build(), torch.randn(2, 3, 8, 8)
    folded.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(folded.eval()(x), model.eval()(x))
    resadapt.save_adapters(trained(), "pooled.pt")
    before = Path(out).read_bytes()
    command = ("fold", "pooled.pt", "--model", "small_nets:build", "--out", out, "--force")
    status, _, err = run(*command)
    assert status == 1
    assert "not linear" in err
    assert Path(out).read_bytes() == before


def test_export_writes_a_program_and_refuses_a_wrong_one(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained(head="6").eval()
    resadapt.save_adapters(model, "a.pt")
    export = ("export", "a.pt", "--model", "small_nets:build", "--out", "net.pt2")
    status, _, err = run(*export, "--input", "1x3x8x8", "--dynamic-batch")
    assert (status, err) == (0, "")
    x = torch.randn(5, 3, 8, 8)
    program = torch.export.load("net.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(program(x), model(x))
    status, _, err = run(*export, "--input", "1x3x8x8")
    assert "--force" in err
    half = (*export, "--input", "2x3x8x8", "--dtype", "bfloat16", "--force")
    assert run(*half)[::2] == (0, "")
    program = torch.export.load("net.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(
            program(x[:2].bfloat16()).float(), model(x[:2]), atol=0.05, rtol=0.05
        )
    written = Path("net.pt2").read_bytes()
    # The copy that is exported is changed after the comparisons of the library.
    copied = resadapt.cli.export.inference_copy

    def changed(*given: Any, **options: Any) -> nn.Module:
        stock = copied(*given, **options)
        with torch.no_grad():
            stock[-1].weight.add_(1)
        return stock

    monkeypatch.setattr("resadapt.cli.export.inference_copy", changed)
    status, _, err = run(*export, "--input", "2x3x8x8", "--force")
    assert status == 1
    assert "differ from the adapted model's" in err
    assert Path("net.pt2").read_bytes() == written


class Returns(nn.Module):
    """A model that returns an output for any input."""

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output


@pytest.mark.parametrize(
    ("expected", "found", "message"),
    [
        ([1.0, -2.0], [1.0, -2.1], "differ from the adapted model's by 0.05 of"),
        ([1.0, 2.0], [1.0, math.nan], "differ"),
        ([1.0, -math.inf], [1.0, math.inf], "by inf of"),
        ([1.0, -math.inf], [1.0, -math.inf], ""),
        ([math.inf], [math.inf], "no finite values"),
        ([1, 2], [1, 3], "by 0.5 of"),
        ([1, 2], [1, 2], ""),
        ([1.0 + 1.0j], [1.0 + 2.0j], "differ"),
        ([1.0], [[1.0]], "by inf of"),
        ([], [], "no values"),
    ],
)
def test_outputs_of_every_kind_are_compared_before_a_file_is_written(
    expected: Any, found: Any, message: str
) -> None:
    adapted = AdaptedModel(Returns(torch.tensor(expected)), torch.zeros(1, 3))
    compare = partial(adapted.compare, lambda x: torch.tensor(found), [1], torch.float32)
    if not message:
        compare()
        return
    with pytest.raises(resadapt.AdapterError, match=message):
        compare()


def test_a_program_that_may_have_lost_the_set_gives_a_warning(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from small_nets import build

    model = trained()
    resadapt.save_adapters(model, "a.pt")
    monkeypatch.setattr(
        "resadapt.cli.export.inference_copy", lambda *_, dtype, **__: build().to(dtype).eval()
    )
    command = ("export", "a.pt", *BUILD, "--out", "net.pt2", "--input", "2x3x8x8")
    status, _, err = run(*command, "--dtype", "bfloat16")
    assert status == 0
    assert "warning: The set changes the outputs by" in err


def test_a_file_that_another_process_wrote_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    args = argparse.Namespace(out="n.pt", force=False)
    target = tmp_path / "n.pt"
    with pytest.raises(resadapt.AdapterError, match="exists"):
        write(args, target, b"ours", lambda _: target.touch())
    assert [path.name for path in tmp_path.iterdir()] == ["n.pt"]
    assert target.read_bytes() == b""


def test_a_terminal_without_unicode_shows_escapes(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resadapt.save_adapters(trained(), "a.pt", metadata={"größe": 1})
    shown = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr("sys.stdout", shown)
    assert main(["inspect", "a.pt"]) == 0
    shown.seek(0)
    assert r"gr\xf6\xdfe: 1" in shown.read()


BUILD = ("--model", "small_nets:build")
BRANCHING = ("--model", "small_nets:branching")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("inspect", "missing.pt"), 1, "No such file"),
        (("inspect", "."), 1, "the directory has neither"),
        (("convert", "a.pt", "folder.pt"), 1, "is a directory"),
        (("inspect", "small_nets.py"), 1, "not an adapter file"),
        (("inspect", "cut.pt"), 1, "damaged"),
        (("inspect", "changed.pt"), 1, "changed or damaged"),
        (("verify", "changed.pt", *BUILD), 1, "changed or damaged"),
        (("diff", "a.pt", "changed.pt"), 2, "changed or damaged"),
        (("convert", "changed.pt", "b.pt"), 1, "changed or damaged"),
        (("fold", "changed.pt", *BUILD, "--out", "n.pt"), 1, "changed or damaged"),
        (("export", "cut.pt", *BUILD, "--out", "n.pt2", "--input", "1x3x8x8"), 1, "damaged"),
        (("verify", "a.pt", "--model", "resnet18"), 1, "give torchvision:NAME"),
        (("verify", "a.pt", "--model", "nets.py:build"), 1, "such as nets:build"),
        (("verify", "a.pt", "--model", "no_such:build"), 1, "No module named 'no_such'"),
        (("verify", "a.pt", "--model", "small_nets:no"), 1, "has no attribute 'no'"),
        (("verify", "a.pt", "--model", "small_nets:number"), 1, "returned int"),
        (("verify", "a.pt", "--model", "small_nets:broken"), 1, "RuntimeError: no weights"),
        (("verify", "a.pt", "--model", "small_nets:leaving"), 1, "SystemExit: 0"),
        (("verify", "a.pt", *BUILD, "--model-args", "{"), 1, "Give a JSON object"),
        (("verify", "a.pt", *BUILD, "--model-args", "[1]"), 1, "Give a JSON object"),
        (("verify", "a.pt", *BUILD, "--model-args", '{"no": 1}'), 1, "unexpected keyword"),
        (("verify", "a.pt", *BUILD, "--weights", "DEFAULT"), 1, "only for models of torchvision"),
        (("verify", "a.pt", *BUILD, "--weights", "missing.pt"), 1, "cannot be read"),
        (("verify", "a.pt", *BUILD, "--weights", "small_nets.py"), 1, "cannot be read"),
        (
            ("verify", "a.pt", *BUILD, "--weights", "nested.pt"),
            1,
            "dict with 'model', 'step' is not",
        ),
        (("verify", "a.pt", *BUILD, "--weights", "wrapped.pt"), 1, "begin with 'module.'"),
        (("verify", "a.pt", *BUILD, "--weights", "whole.pt"), 1, "nothing in it is executed"),
        (("verify", "a.pt", *BUILD, "--weights", "."), 1, "not a regular file"),
        (("verify", "a.pt", *BUILD, "--probe", "missing.pt"), 1, "cannot be read"),
        (("fold", "a.pt", *BUILD, "--out", "n.onnx"), 1, "ends in .pt or .pth or .safetensors"),
        (("export", "a.pt", *BUILD, "--out", "n.pt", "--input", "1x3x8x8"), 1, "ends in .onnx"),
        (("export", "a.pt", *BUILD, "--out", "n.pt2", "--input", "1x4x8x8"), 1, "3 channels, but"),
        (("export", "a.pt", *BUILD, "--out", "n.pt2", "--input", "1xx"), 2, "such as 1x3x224x224"),
        (("export", "a.pt", *BUILD, "--out", "n.pt2", "--input", "0x3x8x8"), 2, "sizes above 0"),
        (("export", "a.pt", *BUILD, "--out", "a.pt2", "--input", "1x3x9999x9999"), 1, "at most"),
        (
            ("export", "a.pt", *BRANCHING, "--out", "n.pt2", "--input", "1x3x8x8"),
            *(1, "cannot be exported: GuardOnDataDependentSymNode"),
        ),
        (("fold", "a.pt", *BUILD, "--out", "a.pt", "--force"), 1, "is the file to read"),
        (("convert", "as", "as/adapters.pt", "--force"), 1, "is the file to read"),
        (("families", "none"), 1, "Choose one of 'bottleneck'"),
        ((), 2, "required"),
        (("nothing",), 2, "invalid choice"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(
    run: Run, folder: Path, arguments: tuple[str, ...], status: int, message: str
) -> None:
    resadapt.save_adapters(trained(), "a.pt")
    data = Path("a.pt").read_bytes()
    Path("cut.pt").write_bytes(data[:1000])
    Path("folder.pt").mkdir()
    Path("as").mkdir()
    Path("as/adapters.pt").write_bytes(data)
    Path("changed.pt").write_bytes(data[:500] + bytes([data[500] ^ 1]) + data[501:])
    torch.save({"model": {"0.weight": torch.ones(1)}, "step": torch.tensor(1)}, "nested.pt")
    from small_nets import build

    wrapped = {f"module.{name}": tensor for name, tensor in build().state_dict().items()}
    torch.save(wrapped, "wrapped.pt")
    torch.save(build(), "whole.pt")
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    found, _, err = run(*arguments)
    assert found == status
    assert message in err
    assert len(err.splitlines()) == 1
    after = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert after == before
