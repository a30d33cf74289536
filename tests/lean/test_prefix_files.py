"""Features in files: used again after a kill, and computed again where they are damaged."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from cached import BATCH, counting, data, resnet
from support import images, small_resnet
from torch.utils.data import DataLoader, TensorDataset

import resadapt
from resadapt import cache_prefix


def test_files_are_used_again_and_what_is_damaged_is_computed_again(tmp_path: Path) -> None:
    path = tmp_path / "features"
    first = cache_prefix(resnet(layers="layer4", head="fc"), data(), path, batch_size=BATCH)
    wanted = [first[i][0].clone() for i in range(11)]
    again = resnet(layers="layer4", head="fc")
    runs = counting(again, "layer2.0")
    shown: list[Any] = []
    cache = cache_prefix(
        again,
        data(),
        path,
        batch_size=BATCH,
        progress=lambda batches: shown.append(len(batches)) or batches,
    )
    assert shown == [3], "the data are compared"
    assert max(runs) == 3, "only the samples with which the plan is tried"
    shown.clear()
    assert all(torch.equal(cache[i][0], wanted[i]) for i in range(11))
    del first, cache
    raw = bytearray((path / "0.bin").read_bytes())
    raw[5 * len(raw) // 11 + 3] ^= 1  # a bit of sample 5
    (path / "0.bin").write_bytes(raw)
    cache = cache_prefix(
        again,
        data(),
        path,
        batch_size=BATCH,
        progress=lambda batches: shown.append(len(batches)) or batches,
    )
    assert shown == [2, 2], "compared up to sample 5, computed from there on"
    torch.testing.assert_close(torch.stack([cache[i][0] for i in range(11)]), torch.stack(wanted))
    (path / "0.bin").write_bytes(raw[:100])
    cache = cache_prefix(again, data(), path, batch_size=BATCH)
    assert all(torch.equal(cache[i][0], wanted[i]) for i in range(11))


def test_workers_map_the_files_themselves(tmp_path: Path) -> None:
    sizes = []
    for path in (tmp_path / "features", None):
        cache = cache_prefix(resnet(layers="layer4"), data(), path)
        sent = pickle.dumps(cache)
        sizes.append(len(sent))
        copied = pickle.loads(sent)
        assert all(torch.equal(copied[i][0], cache[i][0]) for i in range(11))
        with pytest.raises(resadapt.InjectionError, match="copy of the features has no model"):
            copied.forward(cache[0][0][None])
    assert sizes[0] + 11 * 512 * 4 < sizes[1] < 100_000, "neither the model nor features in files"


KILLED = """
import sys, torch
sys.path[:0] = {paths!r}
from cached import data, resnet
from resadapt import cache_prefix
def slow(batches):
    for number, batch in enumerate(batches):
        print(number, flush=True)
        if number == 3:
            sys.stdin.read()
        yield batch
cache_prefix(resnet(layers="layer4"), data(40), {path!r}, batch_size=4, progress=slow)
"""


def test_goes_on_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "features"
    code = KILLED.format(paths=sys.path, path=str(path))
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert any(line.strip() == "3" for line in child.stdout)
    time.sleep(0.1)
    child.send_signal(signal.SIGKILL)
    child.wait()
    shown: list[int] = []
    model = resnet(layers="layer4").eval()
    cache = cache_prefix(
        model,
        data(40),
        path,
        batch_size=4,
        progress=lambda batches: shown.append(len(batches)) or batches,
    )
    assert shown == [3, 7], "12 of 40 were there"
    for features, _labels in DataLoader(cache, 40):
        torch.testing.assert_close(cache.forward(features), model(data(40).tensors[0]))


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "features"
    cache_prefix(resnet(layers="layer4", head="fc"), data(), path)
    for model, other, error, message in (
        (
            resadapt.inject_adapters(small_resnet(1), "layer4", head="fc"),
            data(),
            resadapt.BackboneMismatchError,
            "another backbone",
        ),
        (resnet(layers="layer3", head="fc"), data(), resadapt.AdapterFileError, "calls is"),
        (
            resnet(layers="layer4", head="fc"),
            data(10),
            resadapt.AdapterFileError,
            "length is 11, but would be 10",
        ),
        (
            resnet(layers="layer4", head="fc"),
            data(seed=2),
            resadapt.AdapterFileError,
            "sample 0 of the data differs",
        ),
        (
            resnet(layers="layer4", head="fc").double(),
            data(),
            resadapt.AdapterError,
            "cannot be called with the samples",
        ),
    ):
        before = {file.name: file.read_bytes() for file in path.iterdir()}
        with pytest.raises(error, match=message):
            cache_prefix(model, other, path)
        assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    model = resnet(layers="layer4", head="fc")
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(resadapt.AdapterFileError, match="autocast is None, but would be 'bfloat16'"),
    ):
        cache_prefix(model, data(), path)
    turned = TensorDataset(data().tensors[0], data().tensors[1].flip(0))
    with pytest.raises(resadapt.AdapterFileError, match="differs from the sample"):
        cache_prefix(resnet(layers="layer4", head="fc"), turned, path)
    (path / "features.json").write_text("{")
    with pytest.raises(resadapt.AdapterFileError, match="not a manifest"):
        cache_prefix(resnet(layers="layer4", head="fc"), data(), path)
    (path / "features.json").write_text(json.dumps({"resadapt_prefix": 99}))
    with pytest.raises(resadapt.AdapterFileError, match="this version"):
        cache_prefix(resnet(layers="layer4", head="fc"), data(), path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(resadapt.AdapterFileError, match="other files"):
        cache_prefix(resnet(layers="layer4", head="fc"), data(), tmp_path / "full")
    (tmp_path / "file").write_text("")
    with pytest.raises(resadapt.AdapterFileError, match="cannot be written"):
        cache_prefix(resnet(layers="layer4", head="fc"), data(), tmp_path / "file")


FULL_DISK = """
import resource, sys
sys.path[:0] = {paths!r}
import resadapt
from cached import data, resnet
from resadapt import cache_prefix
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    cache_prefix(resnet(layers="layer4"), data(11), {path!r})
except resadapt.AdapterFileError as error:
    print(error)
"""


def test_a_full_disk_is_an_error_and_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "features"
    code = FULL_DISK.format(paths=sys.path, path=str(path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "0.bin: cannot be written: File too large" in done.stdout
    assert len(cache_prefix(resnet(layers="layer4"), data(), path)) == 11, (
        "and goes on when there is room"
    )


def test_every_sample_is_compared_with_what_is_there(tmp_path: Path) -> None:
    x, y = images(64), torch.arange(64) % 3
    cache_prefix(resnet(layers="layer4", head="fc"), TensorDataset(x, y), tmp_path, batch_size=16)
    mended = y.clone()
    mended[37] = 2
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(
        resadapt.AdapterFileError, match="sample 37 of the data differs from the sample"
    ):
        cache_prefix(
            resnet(layers="layer4", head="fc"), TensorDataset(x, mended), tmp_path, batch_size=16
        )
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_goes_on_after_a_kill_before_anything_is_described(tmp_path: Path) -> None:
    (tmp_path / "features.json.new").write_text('{"resadapt_pre')
    assert len(cache_prefix(resnet(layers="layer4", head="fc"), data(), tmp_path)) == 11


def test_a_damaged_digest_is_computed_again(tmp_path: Path) -> None:
    cache_prefix(resnet(layers="layer4"), data(), tmp_path, batch_size=4)
    for byte in (64 * 2 + 40, 64 * 3 + 4):
        raw = bytearray((tmp_path / "digests.bin").read_bytes())
        raw[byte] ^= 1
        (tmp_path / "digests.bin").write_bytes(raw)
        cache_prefix(resnet(layers="layer4"), data(), tmp_path, batch_size=4)
