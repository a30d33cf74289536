"""Files as bytes: a small one cannot take a large memory; the wrong kind is refused."""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import stat
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from support import small_net

import resadapt
from resadapt.files.adapter_file import read_adapter_file
from resadapt.files.atomic import atomic_write
from resadapt.files.container import _seal, decode, encode


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
    for bomb in (
        torch.ones(1).expand(10**14),
        torch.ones(2, 2).to_sparse(),
        torch.ones(2, device="meta"),
    ):
        resealed({**content, "tensors": {"adapters.c2.up.bias": bomb}}, path)
        with pytest.raises(resadapt.AdapterFileError, match=r"not a dense tensor|cannot be read"):
            read_adapter_file(path)


def test_tensors_that_share_memory(content: Any, path: Path) -> None:
    """A few megabytes may ask for gigabytes to be hashed."""
    shared = torch.ones(1000)
    resealed(
        {
            **content,
            "tensors": {**content["tensors"], **{f"probe.{i}": shared[:] for i in range(100)}},
        },
        path,
    )
    with pytest.raises(resadapt.AdapterFileError, match="share memory"):
        read_adapter_file(path)


def test_a_tensor_with_attributes(content: Any, path: Path) -> None:
    tensor = torch.ones(4)
    tensor.detach = torch.Size([1])  # type: ignore[method-assign, assignment]
    resealed({**content, "tensors": {**content["tensors"], "adapters.c2.up.bias": tensor}}, path)
    with pytest.raises(resadapt.AdapterFileError, match="which resadapt never writes"):
        resadapt.load_adapters(small_net(), path)


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    link, pipe = tmp_path / "endless.pt", tmp_path / "pipe.pt"
    link.symlink_to("/dev/zero")
    os.mkfifo(pipe)
    for path in (link, pipe):
        with pytest.raises(resadapt.AdapterFileError, match="not a regular file"):
            resadapt.read_adapter_info(path)


def test_a_pipe_with_the_name_of_a_leftover_stops_no_save(content: Any, path: Path) -> None:
    prefix = f".resadapt-{hashlib.sha256(path.name.encode()).hexdigest()[:16]}-"
    os.mkfifo(path.parent / f"{prefix}0.tmp")
    resadapt.save_adapters(resadapt.inject_adapters(small_net(), "c2", 2), path)


def test_a_new_temporary_file_that_another_process_has_locked_is_left_to_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That process takes it for a leftover, and is about to remove it."""
    held: list[Any] = []

    def token(size: int) -> str:
        name = f"{len(held):016x}"
        if len(held) < 2:
            held.append(name)
        return name

    real_open = open

    def opened(file: Any, mode: str) -> Any:
        created = real_open(file, mode)
        if len(held) == 1:
            rival = real_open(file, "rb")
            fcntl.flock(rival, fcntl.LOCK_EX)
            held[0] = rival
        return created

    monkeypatch.setattr("secrets.token_hex", token)
    monkeypatch.setattr("resadapt.files.atomic.open", opened, raising=False)
    with atomic_write(path, b"content") as temporary:
        assert temporary.name.endswith(f"{1:016x}.tmp") or temporary.name.endswith(f"{2:016x}.tmp")
    assert path.read_bytes() == b"content"
    held[0].close()


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
    text = content["manifest"].replace(
        '"example":null', f'"example":{{"list":[{",".join([str(large)] * 6)}]}}'.replace("'", '"')
    )
    text = text.replace('"probe":{"source":"generated"', '"probe":{"source":"given"')
    assert text != content["manifest"]
    resealed({**content, "manifest": text}, path)
    report = resadapt.verify_adapters(resadapt.inject_adapters(small_net(), "c2", 2), path)
    assert (
        report["outputs"].outcome == "passed"
        or "does not accept the generated input" in report["outputs"].detail
    )


def test_special_files_and_permissions_stay(tmp_path: Path) -> None:
    model = resadapt.inject_adapters(small_net(), "c2", 2)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(resadapt.AdapterFileError, match="not a regular file"):
        resadapt.save_adapters(model, tmp_path / "fifo")
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)
    path = tmp_path / "set.pt"
    resadapt.save_adapters(model, path)
    path.chmod(0o600)
    resadapt.save_adapters(model, path)
    assert path.stat().st_mode & 0o777 == 0o600
    resadapt.save_adapters(model, tmp_path / ("n" * 250 + ".pt"))


@pytest.mark.parametrize(
    "callable_",
    ["builtins bytearray", "torch.nn.parameter Parameter", "torch Size", "builtins eval"],
)
def test_a_pickle_that_makes_something_else(callable_: str, content: Any, path: Path) -> None:
    """An empty bytearray of a gigabyte stands in fifty bytes."""
    module, name = callable_.split()
    pickled = (
        b"\x80\x02}(X\x08\0\0\0manifestc"
        + f"{module}\n{name}\n".encode()
        + b"\x8a\x08"
        + (2**28).to_bytes(8, "little")
        + b"\x85Ru."
    )
    resealed(content, path)
    out = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        for member in old.infolist():
            new.writestr(
                member.filename,
                pickled if member.filename.endswith("data.pkl") else old.read(member),
            )
        new.comment = old.comment
    data = bytearray(out.getvalue())
    data[-64:] = b"0" * 64
    data[-64:] = _seal(data, len(data) - 64)
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(
        resadapt.AdapterFileError,
        match=f"GLOBAL '{callable_}' in its pickle, which resadapt never writes",
    ):
        resadapt.read_adapter_info(path)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_tensors_of_every_kind_pass(path: Path) -> None:
    """What is read in a pickle is a list, and must have all that a set's tensors can be."""
    model = small_net()
    for number, dtype in enumerate(
        (
            torch.int8,
            torch.int64,
            torch.bool,
            torch.complex64,
            torch.bfloat16,
            torch.float8_e4m3fn,
            torch.uint16,
        )
    ):
        model.register_buffer(f"kind{number}", torch.zeros(3).to(dtype))
    data = encode({}, dict(model.named_buffers()), "pt")
    _, tensors = decode(data, path)
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        n: b.dtype for n, b in model.named_buffers()
    }
