"""Files in repositories of the Hugging Face Hub: from a cache laid out as huggingface_hub does it,
and from a server on this machine that answers as the Hub does.
"""

from __future__ import annotations

import hashlib
import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from support import images, small_net
from torch import nn

import resadapt

OLD, NEW = "1" * 40, "2" * 40


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return resadapt.inject_adapters(small_net(), "c2", 2, head="head").eval()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, without network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put(
    cache: Path, model: nn.Module, revision: str, *refs: str, file: str = "adapters.safetensors"
) -> Path:
    """Lays out a file in the cache under a revision."""
    repository = cache / "models--user--name"
    content = repository / "content.pt" if file.endswith(".pt") else repository / "content"
    repository.mkdir(parents=True, exist_ok=True)
    resadapt.save_adapters(model, content, metadata={"revision": revision})
    blob = repository / "blobs" / hashlib.sha256(content.read_bytes()).hexdigest()
    blob.parent.mkdir(exist_ok=True)
    content.rename(blob)
    snapshot = repository / "snapshots" / revision / file
    snapshot.parent.mkdir(parents=True, exist_ok=True)
    snapshot.symlink_to(os.path.relpath(blob, snapshot.parent))
    for ref in refs:
        (repository / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / ref).write_text(revision)
    return snapshot


def revision_of(address: object) -> Any:
    return resadapt.read_adapter_info(address).metadata["revision"]  # type: ignore[arg-type]


def test_a_file_in_the_cache_needs_no_network(cache: Path, model: nn.Module) -> None:
    put(cache, model, OLD, "v1", "feature/x")
    put(cache, model, OLD, file="night/set.pt")
    put(cache, model, NEW, "main", file="adapters.pt")
    for address, revision in (
        ("hf://user/name", NEW),
        ("hf://user/name/", NEW),
        (Path("hf://user/name"), NEW),
        (b"hf://user/name@main", NEW),
        ("hf://user/name@v1", OLD),
        ("hf://user/name@feature%2Fx", OLD),
        (f"hf://user/name@{OLD}", OLD),
        (f"hf://user/name@{OLD}/night/set.pt", OLD),
        ("hf://user/name@v1/adapters.safetensors", OLD),
    ):
        assert revision_of(address) == revision
    loaded = resadapt.load_adapters(small_net(), "hf://user/name").eval()
    assert torch.equal(loaded(images()), model(images()))
    assert resadapt.verify_adapters(model, "hf://user/name@v1").ok


def test_what_is_not_there_is_said(cache: Path, model: nn.Module) -> None:
    put(cache, model, OLD, "v1")
    for address in ("hf://user/name", "hf://user/name@v1/other.pt", "hf://user/no", "hf://a--b/c"):
        with pytest.raises(
            resadapt.AdapterFileError,
            match=rf"^{address}: is not in the cache, and cannot be .*Check the address.*OFFLINE",
        ) as caught:
            resadapt.load_adapters(small_net(), address)
        assert isinstance(caught.value.__cause__, Exception)


def test_the_environment_says_where_and_that_there_is_no_network(
    cache: Path, model: nn.Module
) -> None:
    put(cache, model, OLD, "main")
    code = "import resadapt; print(resadapt.read_adapter_info('hf://user/name').metadata)"
    environment = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == f"{{'revision': '{OLD}'}}\n", done.stderr


@pytest.fixture
def hub(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with files of the repository user/name, which a server gives as the Hub does."""
    folder = tmp_path / "repository"
    folder.mkdir()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            repository, _, file = self.path[1:].partition("/resolve/main/")
            path = folder / file
            if repository != "user/name" or not path.is_file():
                missing = "EntryNotFound" if repository == "user/name" else "RepoNotFound"
                self.send_response(404)
                self.send_header("X-Error-Code", missing)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            data = path.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", hashlib.sha1(data).hexdigest())
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield folder
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_file_is_downloaded_once(hub: Path, model: nn.Module) -> None:
    with pytest.raises(resadapt.AdapterFileError, match=r"no file adapters\.safetensors or adap"):
        resadapt.read_adapter_info("hf://user/name")
    with pytest.raises(resadapt.AdapterFileError, match=r"cannot be downloaded .*NotFound"):
        resadapt.read_adapter_info("hf://user/other")
    resadapt.save_adapters(model, hub / "adapters.pt", metadata={"revision": 1})
    assert revision_of("hf://user/name") == 1
    resadapt.save_adapters(model, hub / "adapters.pt", metadata={"revision": 2})
    assert revision_of("hf://user/name") == 1, "cached first"
    path = huggingface_hub.hf_hub_download("user/name", "adapters.pt")  # as the docs tell
    assert revision_of(path) == revision_of("hf://user/name") == 2


def test_a_card_is_one_of_the_hub(model: nn.Module, tmp_path: Path) -> None:
    resadapt.save_adapters(model, tmp_path, metadata={"base_model": "timm/resnet18.a1_in1k"})
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "resadapt"
    assert card.data.base_model == "timm/resnet18.a1_in1k"
    assert card.text.startswith("\n# Adapters for SmallNet\n")
