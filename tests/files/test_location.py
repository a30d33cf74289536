"""Directories and addresses in place of paths."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from support import images, small_net
from torch import nn

import resadapt


@pytest.fixture
def model() -> nn.Module:
    return resadapt.inject_adapters(small_net(), "c2", 2, head="head").eval()


def test_a_directory_is_a_path(model: nn.Module, tmp_path: Path) -> None:
    for path in (f"{tmp_path}/new/", os.fsencode(tmp_path / "new") + b"/", tmp_path / "new"):
        assert resadapt.save_adapters(model, path).ok
        assert resadapt.verify_adapters(model, path).ok
        assert resadapt.read_adapter_info(path).path == tmp_path / "new" / "adapters.safetensors"
        loaded = resadapt.load_adapters(small_net(), path).eval()
        assert torch.equal(loaded(images()), model(images()))
        assert {each.name for each in (tmp_path / "new").iterdir()} == {
            "README.md",
            "adapters.safetensors",
        }
    resadapt.save_adapters(model, tmp_path / "file")  # no slash, no directory
    assert (tmp_path / "file").is_file()


def test_a_save_replaces_the_file_that_a_load_reads(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("resadapt.files.container.find_spec", lambda _: None)
        resadapt.save_adapters(model, tmp_path, metadata={"epoch": 1})
    resadapt.save_adapters(model, tmp_path, metadata={"epoch": 2})
    assert sorted(os.listdir(tmp_path)) == ["README.md", "adapters.pt"]
    assert resadapt.read_adapter_info(tmp_path).metadata == {"epoch": 2}


def test_links_in_a_directory_stay_links(model: nn.Module, tmp_path: Path) -> None:
    resadapt.save_adapters(model, f"{tmp_path}/real/")
    (tmp_path / "links").mkdir()
    for name in ("README.md", "adapters.safetensors"):
        (tmp_path / "links" / name).symlink_to(tmp_path / "real" / name)
    resadapt.save_adapters(model, tmp_path / "links", metadata={"epoch": 2})
    assert all(each.is_symlink() for each in (tmp_path / "links").iterdir())
    assert resadapt.read_adapter_info(tmp_path / "real").metadata == {"epoch": 2}
    assert '"epoch": 2' in (tmp_path / "real" / "README.md").read_text()


def test_a_failing_save_leaves_a_directory_as_it_was(model: nn.Module, tmp_path: Path) -> None:
    readings = iter([1.0, 2.0] * 2)
    with pytest.raises(resadapt.VerificationError):
        resadapt.save_adapters(model, f"{tmp_path}/new/", metric=lambda _: next(readings))
    assert not list(tmp_path.iterdir())
    resadapt.save_adapters(model, tmp_path)
    before = {each: each.read_bytes() for each in tmp_path.iterdir()}
    with pytest.raises(resadapt.VerificationError):
        resadapt.save_adapters(model, tmp_path, metric=lambda _: next(readings))
    assert {each: each.read_bytes() for each in tmp_path.iterdir()} == before


def test_what_cannot_be_a_directory(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "odd" / "README.md").mkdir(parents=True)
    for path, message in (
        (f"{tmp_path}/file/", r"file/: is not a directory\. Remove the slash"),
        (tmp_path / "odd", r"README\.md: is a directory"),
        (f"{tmp_path}/no/new/", r"no does not exist\. Create it first"),
        ("", r"'': is not a file path: it is empty"),
        ("hf://user/name", r"writes to local files only\. Save to a directory.*upload_folder"),
    ):
        with pytest.raises(resadapt.AdapterFileError, match=message):
            resadapt.save_adapters(model, path)
    assert sorted(os.listdir(tmp_path)) == ["file", "odd"]
    with pytest.raises(
        resadapt.AdapterFileError, match=r"neither adapters\.safetensors nor adapters\.pt\. Pass"
    ):
        resadapt.read_adapter_info(tmp_path)
    with pytest.raises(resadapt.AdapterFileError, match=r"it is empty"):
        resadapt.read_adapter_info("")


def test_addresses_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # stay offline
    for address in (
        "hf://",
        "hf://name",
        "hf://user/na me",
        "hf://user/name@",
        "hf://user/name/../../secret",
        "hf://user/name@..%2F..%2Fsecret",
        "hf://user\n/name",
    ):
        with pytest.raises(resadapt.AdapterFileError, match=r"is not an address.*Write hf://user"):
            resadapt.read_adapter_info(address)
    with pytest.raises(resadapt.AdapterFileError, match=r"install resadapt\[hub\]"):
        resadapt.load_adapters(small_net(), "hf://user/name")
