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
