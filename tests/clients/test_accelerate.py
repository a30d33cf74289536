"""Accelerate: prepared models, mixed precision, its checkpoints, and offloading."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from roundtrip import LABELS, assert_same_outputs, save_and_reload, small_backbone, small_images
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import resadapt

accelerate = pytest.importorskip("accelerate")

X = small_images()


@pytest.fixture(autouse=True)
def _one_accelerator_a_test() -> Iterator[None]:
    """Its state is one of the process."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def prepared(precision: str) -> tuple[Any, Any, Any, Any]:
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    model = resadapt.inject_adapters(small_backbone(), "layer*", 8, head="fc", dropout=0.0)
    optimizer = torch.optim.AdamW(resadapt.parameter_groups(model, 1e-2))
    data = DataLoader(TensorDataset(X.repeat(3, 1, 1, 1), LABELS.repeat(3)), batch_size=len(X))
    return accelerator, *accelerator.prepare(model, optimizer, data)


def epoch(accelerator: Any, model: Any, optimizer: Any, data: Any) -> None:
    """Three steps."""
    model.train()
    for images, labels in data:
        optimizer.zero_grad()
        accelerator.backward(nn.functional.cross_entropy(model(images), labels))
        optimizer.step()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_prepared_model_comes_back_bit_for_bit(precision: str, path: Path) -> None:
    accelerator, model, optimizer, data = prepared(precision)
    before = resadapt.adapter_state_dict(model)
    epoch(accelerator, model, optimizer, data)
    assert not any(
        torch.equal(value, before[key]) for key, value in resadapt.adapter_state_dict(model).items()
    )
    plain = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    save_and_reload(plain, small_backbone, path, X)


def test_mixed_precision_that_is_left_on_is_named_in_the_report(path: Path) -> None:
    accelerator, model, optimizer, data = prepared("bf16")
    epoch(accelerator, model, optimizer, data)
    with pytest.raises(
        resadapt.VerificationError,
        match=r"outputs +failed .* was the forward of 'the model' changed",
    ):
        resadapt.save_adapters(accelerator.unwrap_model(model), path, rebuild=small_backbone)

    # In the middle of training, whose precision is to stay, the built backbone runs in it too.
    def rebuild_with_autocast() -> Any:
        built = small_backbone()
        built.forward = accelerate.utils.convert_outputs_to_fp32(
            torch.autocast("cpu", torch.bfloat16)(built.forward)
        )
        return built

    assert (
        resadapt.save_adapters(model, path, rebuild=rebuild_with_autocast)["outputs"].outcome
        == "passed"
    )
    epoch(accelerator, model, optimizer, data)


def test_its_checkpoints_resume_and_end_in_a_verified_file(path: Path) -> None:
    accelerator, model, optimizer, data = prepared("no")
    epoch(accelerator, model, optimizer, data)
    accelerator.save_state(path.parent / "half")
    epoch(accelerator, model, optimizer, data)
    whole = resadapt.adapter_state_dict(model)
    accelerator.load_state(path.parent / "half")
    assert resadapt.check_backbone(model).ok
    assert not any(
        torch.equal(value, whole[key]) for key, value in resadapt.adapter_state_dict(model).items()
    )
    epoch(accelerator, model, optimizer, data)
    assert all(
        torch.equal(value, whole[key]) for key, value in resadapt.adapter_state_dict(model).items()
    )
    save_and_reload(accelerator.unwrap_model(model), small_backbone, path, X)


CALLS: list[Callable[[Any, Path], object]] = [
    lambda model, path: resadapt.save_adapters(model, path),
    lambda model, path: resadapt.save_adapters(model, path, rebuild=small_backbone, verify=False),
    lambda model, path: resadapt.load_adapters(model, path.with_name("saved.pt")),
    lambda model, path: resadapt.verify_adapters(model, path.with_name("saved.pt")),
    lambda model, path: resadapt.adapter_state_dict(model),
    lambda model, path: resadapt.accept_backbone(model),
    lambda model, path: resadapt.inference_copy(model),
    lambda model, path: resadapt.inject_adapters(model, "layer4", 4, name="other"),
]


@pytest.mark.parametrize("call", CALLS)
def test_an_offloaded_model_is_refused_by_name(
    call: Callable[[Any, Path], object], path: Path
) -> None:
    model = resadapt.inject_adapters(small_backbone(), "layer*", 8, head="fc")
    resadapt.save_adapters(model, path.with_name("saved.pt"))
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(resadapt.AdapterError, match=r"offload"):
        call(model, path)
    assert not path.exists()


def test_an_offloaded_model_runs_and_is_itself_again_when_brought_back(path: Path) -> None:
    model = resadapt.inject_adapters(small_backbone(), "layer*", 8, head="fc").eval()
    before = model(X)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert torch.equal(model(X), before)
    assert not resadapt.check_backbone(model).ok
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(model(X), before)
    resadapt.set_active_adapters(model, None)
    assert_same_outputs(model, small_backbone(), X)
    resadapt.set_active_adapters(model, "default")
    save_and_reload(model, small_backbone, path, X)


def test_an_offloaded_backbone_is_not_injected_into(path: Path) -> None:
    backbone = accelerate.cpu_offload(small_backbone(), execution_device="cpu")
    with pytest.raises(
        resadapt.InjectionError, match=r"'conv1\.weight' has no values yet.* undo (its )?offloading"
    ):
        resadapt.inject_adapters(backbone)
