"""A file is written whole or not at all: full disks, killed processes, links, leftovers."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from support import small_net, train
from torch import nn

import resadapt


@pytest.fixture
def model() -> nn.Module:
    model = resadapt.inject_adapters(small_net(), "c2", 2, head="head")
    train(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    return model


def test_wrong_bytes_on_the_way_to_the_disk(
    model: nn.Module, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resadapt.save_adapters(model, path)
    saved = path.read_bytes()
    fsync = os.fsync

    def corrupting(descriptor: int) -> None:
        fsync(descriptor)
        os.pwrite(descriptor, b"\xff\xfe", 1000)

    monkeypatch.setattr(os, "fsync", corrupting)
    with pytest.raises(resadapt.AdapterFileError, match="damaged"):
        resadapt.save_adapters(model, path)
    assert path.read_bytes() == saved


def test_bad_targets(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(resadapt.AdapterFileError, match=r"no does not exist\. Create it"):
        resadapt.save_adapters(model, tmp_path / "no" / "set.pt")
    assert not list(tmp_path.iterdir())


def test_a_full_disk(model: nn.Module, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resadapt.save_adapters(model, path)
    saved = path.read_bytes()
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:

            def full(*_: Any) -> None:
                raise OSError(28, "No space left on device")

            patch.setattr(os, name, full)
            with pytest.raises(resadapt.AdapterFileError, match=r"No space left on device.*intact"):
                resadapt.save_adapters(model, path)
        assert path.read_bytes() == saved
        assert [p.name for p in path.parent.iterdir()] == ["set.pt"]


def test_a_link_stays_a_link_and_permissions_are_ordinary(model: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.pt"
    link.symlink_to(tmp_path / "real" / "set.pt")
    resadapt.save_adapters(model, link)
    assert link.is_symlink()
    assert (tmp_path / "real" / "set.pt").is_file()
    umask = os.umask(0)
    os.umask(umask)
    assert link.stat().st_mode & 0o777 == 0o666 & ~umask


def test_kill_9_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    """Processes that save for ever are killed at thirty moments; what they leave is always a file
    that one of them wrote.
    """
    script = """
        import os, signal, sys, time
        import torch, resadapt
        from torch import nn

        torch.set_num_threads(1)  # so that forked children can go on computing
        path = sys.argv[1]
        def build():
            torch.manual_seed(0)
            return nn.Sequential(nn.Conv2d(3, 4, 3))
        def values(model):
            parameters = resadapt.trainable_parameters(model)
            return {value for p in parameters for value in p.flatten().tolist()}
        model = resadapt.inject_adapters(build(), "0", 2)
        for moment in range(30):
            read, write = os.pipe()
            child = os.fork()
            if child == 0:
                count = 0
                while True:
                    count += 1
                    with torch.no_grad():
                        for parameter in resadapt.trainable_parameters(model):
                            parameter.fill_(1000 * moment + count)
                    resadapt.save_adapters(model, path)
                    os.write(write, b"x")
            os.close(write)
            os.read(read, 1)
            time.sleep(0.0007 * moment)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            saved = 1
            while more := os.read(read, 1024):
                saved += len(more)
            os.close(read)
            found = values(resadapt.load_adapters(build(), path))
            assert len(found) == 1, "never a mixture"
            last = 1000 * moment + saved
            assert found <= {last, last + 1}, (found, moment, saved)
        print("survived")
    """
    path = tmp_path / "set.pt"
    command = [sys.executable, "-c", textwrap.dedent(script), str(path)]
    assert (
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
        == "survived\n"
    )


def test_paths_as_bytes_and_endings_in_capitals(model: nn.Module, tmp_path: Path) -> None:
    for name, start in (("a.PT", b"PK"), ("b.PTH", b"PK"), ("c.SafeTensors", b"")):
        path = os.fsencode(tmp_path / name)
        assert resadapt.save_adapters(model, path).ok
        assert (tmp_path / name).read_bytes().startswith(start)
        assert resadapt.read_adapter_info(path).path == tmp_path / name
        assert resadapt.verify_adapters(model, path).ok
        assert resadapt.load_adapters(small_net(), path)
    assert (tmp_path / "c.SafeTensors").read_bytes()[8:9] == b"{"


def test_a_file_that_a_killed_save_left_behind_is_removed_by_the_next(
    model: nn.Module, tmp_path: Path
) -> None:
    killer = """
        import os, signal, sys, resadapt
        from resadapt.proof import verify
        from torch import nn
        verify.read_adapter_file = lambda path: os.kill(os.getpid(), signal.SIGKILL)
        model = resadapt.inject_adapters(nn.Sequential(nn.Conv2d(3, 4, 3)), "0", 2)
        resadapt.save_adapters(model, sys.argv[1])
    """
    target = tmp_path / "set.pt"
    (tmp_path / ".resadapt-mine.tmp").write_text("of somebody else")
    for name in ("set.pt", "other.pt"):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(killer), str(tmp_path / name)], check=False
        )
        assert done.returncode == -9
    left = set(tmp_path.iterdir())
    assert len(left) == 3
    resadapt.save_adapters(model, target)
    now = set(tmp_path.iterdir())
    assert len(now) == 3, (
        "the one for this target is gone, the other target's and the strange one are not"
    )
    assert target in now
    resadapt.save_adapters(model, tmp_path / "other.pt")
    assert set(tmp_path.iterdir()) == {
        target,
        tmp_path / "other.pt",
        tmp_path / ".resadapt-mine.tmp",
    }


def test_a_save_beside_another_one_leaves_its_temporary_file_alone(
    model: nn.Module, tmp_path: Path
) -> None:
    """Two processes save to one place at a time: the later one must not take the other's file for
    one that was left behind.
    """
    from resadapt.files.atomic import atomic_write

    target = tmp_path / "set.pt"
    with atomic_write(target, b"first") as first:
        resadapt.save_adapters(model, target)
        assert first.exists()
    assert target.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [target]
