"""ONNX: exported with torch's exporter, run by onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from roundtrip import (
    save_and_reload,
    small_backbone,
    small_images,
    three_steps,
    with_strong_adapters,
)
from torch import Tensor

import resadapt
from resadapt.cli.main import main

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

X = small_images()


def exported(model: Any, file: Path) -> Callable[[Tensor], Tensor]:
    """What onnxruntime makes of a model, for any number of images."""
    torch.onnx.export(
        model,
        (X,),
        file,
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},),
        verbose=False,
    )
    onnx.checker.check_model(file)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return lambda x: torch.from_numpy(session.run(None, {given.name: x.numpy()})[0])


@pytest.mark.parametrize("copied", [True, False], ids=["inference copy", "injected model"])
def test_an_exported_model_computes_the_same(copied: bool, path: Path) -> None:
    model = resadapt.inject_adapters(small_backbone(), "layer*", 8, head="fc")
    three_steps(model, X)
    save_and_reload(model, small_backbone, path, X)
    with_strong_adapters(model)
    run = exported(
        resadapt.inference_copy(model) if copied else model, path.with_name("model.onnx")
    )
    more = torch.cat([X, X + 1, X - 1])
    with torch.no_grad():
        expected = model(more)
    torch.testing.assert_close(run(more), expected, atol=1e-4, rtol=1e-4)
    with resadapt.adapters_disabled(model), torch.no_grad():
        assert not torch.allclose(run(more), model(more), atol=1e-2), (
            "the adapters are in the exported model"
        )
    assert torch.equal(model(more), expected), "exporting leaves the model as it was"


NETS = """
import torch
from torch import nn

class OwnKernels(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.kernels = nn.Conv2d(3, 8, 3), nn.Linear(3, 4 * 8 * 9)
    def forward(self, x):
        kernels = self.kernels(x.mean((2, 3))).view(-1, 4, 8, 3, 3)
        pairs = zip(self.conv(x), kernels)
        return torch.cat([nn.functional.conv2d(each[None], kernel) for each, kernel in pairs])

def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 3))

def own_kernels():
    torch.manual_seed(0)
    return OwnKernels().eval()
"""


def test_the_command_writes_what_it_has_compared_for_other_batches(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(path.parent)
    monkeypatch.syspath_prepend(path.parent)
    Path("onnx_nets.py").write_text(NETS)
    import onnx_nets  # type: ignore[import-not-found]

    model = with_strong_adapters(resadapt.inject_adapters(onnx_nets.plain(), "3", 2)).eval()
    resadapt.save_adapters(model, "plain.pt")
    resadapt.save_adapters(
        resadapt.inject_adapters(onnx_nets.own_kernels(), "conv", 2), "own_kernels.pt"
    )
    x = torch.randn(5, 3, 8, 8)

    def export(name: str, *more: str) -> int:
        source = ("export", f"{name}.pt", "--model", f"onnx_nets:{name}")
        return main([*source, "--out", f"{name}.onnx", "--input", "2x3x8x8", *more])

    assert export("plain", "--dynamic-batch") == 0
    session = onnxruntime.InferenceSession("plain.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(x), atol=1e-4, rtol=1e-4)
    # The exporter keeps the batch without an error, and ONNX Runtime has no such convolution.
    assert export("own_kernels", "--dynamic-batch") == 1
    assert export("own_kernels", "--dtype", "bfloat16") == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert all("cannot be run, so it was not compared and not written" in each for each in errors)
    assert not Path("own_kernels.onnx").exists()
