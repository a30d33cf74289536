"""Files as bytes: a small one cannot take a large memory, and content of the wrong kind is refused."""

from __future__ import annotations

import io
import os
import stat
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from support import small_net

import resadapt
from resadapt.files.adapter_file import read_adapter_file
from resadapt.files.container import _seal


def resealed(content: Any, path: Path, compression: int = zipfile.ZIP_STORED) -> None:
    buffer, out = io.BytesIO(), io.BytesIO()
    torch.save(content, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(out, "w", compression) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member), compress_type=compression)
        new.comment = b"resadapt:" + b"0" * 64
    data = bytearray(out.getvalue())
    data[-64:] = _seal(data, len(data) - 64)
    path.write_bytes(data)


@pytest.fixture
def content(path: Path) -> Any:
    resadapt.save_adapters(resadapt.inject_adapters(small_net(), "c2", 2), path)
    return torch.load(path, weights_only=True)


def test_bombs(content: Any, path: Path) -> None:
    resealed(content, path, zipfile.ZIP_DEFLATED)
    with pytest.raises(resadapt.AdapterFileError, match="compressed content"):
        resadapt.read_adapter_info(path)
    for bomb in (torch.ones(1).expand(10**14), torch.ones(2, 2).to_sparse(), torch.ones(2, device="meta")):
        resealed({**content, "tensors": {"adapters.c2.up.bias": bomb}}, path)
        with pytest.raises(resadapt.AdapterFileError, match=r"no plain tensor|cannot be read"):
            read_adapter_file(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: {**c, "tensors": {3: torch.ones(2)}},
        lambda c: {**c, "tensors": {("adapters", "c2"): torch.ones(2)}},
        lambda c: {**c, "tensors": {"adapters.c2.up.bias": 3.0}},
        lambda c: {**c, "tensors": [torch.ones(2)]},
        lambda c: {**c, "tensors": torch.ones(2)},
        lambda c: {**c, "manifest": 3},
        lambda c: {**c, "manifest": "[]"},
        lambda c: {**c, "manifest": "{"},
        lambda c: {"manifest": c["manifest"]},
        lambda c: [c],
        lambda c: torch.ones(2),
        lambda c: None,
    ],
)
def test_sealed_content_of_the_wrong_kind(change: Any, content: Any, path: Path) -> None:
    resealed(change(content), path)
    with pytest.raises(resadapt.AdapterFileError, match="sealed, but its content cannot be read"):
        resadapt.load_adapters(small_net(), path)


def test_a_form_from_a_file_has_one_budget(content: Any, path: Path) -> None:
    """Six inputs of 2^26 elements stand in a few bytes."""
    large = {"shape": [2**26], "dtype": "float32"}
    text = content["manifest"].replace('"example":null', f'"example":{{"list":[{",".join([str(large)] * 6)}]}}'.replace("'", '"'))
    text = text.replace('"probe":{"source":"generated"', '"probe":{"source":"given"')
    assert text != content["manifest"]
    resealed({**content, "manifest": text}, path)
    report = resadapt.verify_adapters(resadapt.inject_adapters(small_net(), "c2", 2), path)
    assert report["outputs"].outcome == "passed" or "does not take the input" in report["outputs"].detail


def test_special_files_and_permissions_stay(tmp_path: Path) -> None:
    model = resadapt.inject_adapters(small_net(), "c2", 2)
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
