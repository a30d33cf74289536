"""The model card of a directory to publish: what it says, what a save keeps, what breaks it."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from support import small_net
from torch import nn

import resadapt
from resadapt.proof.card import write_card
from resadapt.proof.report import Check, report_of

BEGIN, END = "<!-- resadapt begin -->", "<!-- resadapt end -->"

MARKDOWN = MarkdownIt("commonmark").enable("table")
MODEL = resadapt.inject_adapters(small_net(), "c2", 2)


@pytest.fixture
def model() -> nn.Module:
    return resadapt.inject_adapters(small_net(), "c2", 2, head="head")


def parts(text: str) -> tuple[Any, list[Any]]:
    """A card's YAML head, and the blocks of its Markdown."""
    before, head, body = text.split("---\n", 2)
    assert before == ""
    return yaml.safe_load(head), MARKDOWN.parse(body)


def test_a_card_says_what_is_in_the_file_and_what_was_compared(
    model: nn.Module, tmp_path: Path
) -> None:
    metadata = {"base_model": "user/net", "f1": 0.5}
    report = resadapt.save_adapters(model, f"{tmp_path}/my-adapter/", metadata=metadata)
    assert report.path == tmp_path / "my-adapter" / "adapters.safetensors"
    card = (report.path.parent / "README.md").read_text()
    head, blocks = parts(card)
    tags = ["resadapt", "adapter"]
    assert head == {"library_name": "resadapt", "tags": tags, "base_model": "user/net"}
    for check in report.checks:
        assert f"| {check.name} | {check.outcome} | {check.detail} |" in card
    data = report.path.read_bytes()
    for row in (
        f"file | adapters.safetensors, {len(data):,} bytes",
        f"SHA-256 | {hashlib.sha256(data).hexdigest()}",
        "backbone | support.SmallNet, 150 parameters, frozen",
        "base model | user/net",
        "family | pooled",
        "head | head",
        "adapter parameters | 22",
        "head parameters | 10",
        r"c2 | \[N, 4, \*, \*\] | 2",
    ):
        assert f"| {row} |\n" in card
    shown = [json.loads(block.content) for block in blocks if block.info == "json"]
    assert shown == [metadata]
    assert str(tmp_path) not in card, "a card is published: no paths of this machine"


def test_only_what_is_known_is_said(model: nn.Module, tmp_path: Path) -> None:
    metadata = {"base_model": "my net, of May\n---"}
    resadapt.save_adapters(model, tmp_path, metadata=metadata, verify=False)
    card = (tmp_path / "README.md").read_text()
    assert parts(card)[0].keys() == {"library_name", "tags"}, "not a model's id on the Hub"
    assert "| base model | my net, of May --- |" in card
    assert "saved with `verify=False`: nothing was compared" in card
    assert "passed" not in card
    metadata = {"log": "x" * 20_000, "base_model": "mine " * 4_000}
    resadapt.save_adapters(model, tmp_path, metadata=metadata)
    card = (tmp_path / "README.md").read_text()
    assert "Too long to show" in card
    assert len(card) < 5_000


def test_a_save_changes_only_the_text_between_the_marks(model: nn.Module, tmp_path: Path) -> None:
    resadapt.save_adapters(model, tmp_path)
    card = tmp_path / "README.md"
    fresh = card.read_bytes()
    assert b"| base model | not given in the metadata |" in fresh
    resadapt.save_adapters(model, tmp_path)
    assert card.read_bytes() == fresh, "same content, same bytes"
    start, end = fresh.index(BEGIN.encode()), fresh.index(END.encode()) + len(END)
    before, after = b"---\r\nlicense: mit\r\n---\r\n# Mine \xff\r\n", b"\r\nThanks.\r\n" + fresh
    card.write_bytes(before + b"%s old %s" % (BEGIN.encode(), END.encode()) + after)
    resadapt.save_adapters(model, tmp_path)
    assert card.read_bytes() == before + fresh[start:end] + after
    for mine in (b"", b"# Mine\n", f"{END} {BEGIN} no end".encode()):
        card.write_bytes(mine)
        resadapt.save_adapters(model, tmp_path)
        assert card.read_bytes() == mine


def test_a_card_that_cannot_be_written(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter file is in place before the card is written, and the old card stays."""
    resadapt.save_adapters(model, tmp_path, metadata={"epoch": 1})
    card = (tmp_path / "README.md").read_bytes()

    real_replace = os.replace

    def no_card(source: Path, target: Path) -> None:
        if target.name == "README.md":
            raise OSError(28, "No space left on device")
        real_replace(source, target)

    monkeypatch.setattr(os, "replace", no_card)
    with pytest.raises(
        resadapt.AdapterFileError, match=r"adapters\.safetensors was saved, but not its .*No space"
    ):
        resadapt.save_adapters(model, tmp_path, metadata={"epoch": 2})
    assert resadapt.read_adapter_info(tmp_path).metadata == {"epoch": 2}
    assert (tmp_path / "README.md").read_bytes() == card
    assert len(list(tmp_path.iterdir())) == 2


nasty = st.text(max_size=30) | st.sampled_from(
    [
        "\n---\nevil: true\n---\n",
        "\n```\n# evil\n```python\n",
        "````\n~~~\n",
        "| a | b |\n\n| --- |",
        "<script>alert(1)</script>",
        f"{END}\n# evil\n{BEGIN}",
        "`` ` `` \\",
        "![x](http://evil) [y]: z",
        "\u2028# evil\x85---\r\r```",
        "\ud800 \x00 \u202e *_$x$_* &lt; #",
    ]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | nasty,
    lambda each: st.lists(each, max_size=3) | st.dictionaries(nasty, each, max_size=3),
    max_leaves=6,
)


@settings(max_examples=30, deadline=None)
@given(
    metadata=st.dictionaries(nasty | st.just("base_model"), values, min_size=1, max_size=4),
    name=nasty,
    detail=nasty,
)
def test_no_text_from_outside_breaks_a_card(
    metadata: dict[str, Any], name: str, detail: str
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "README.md"
        benign, card = (
            _card(path, *given) for given in (({"a": 1}, "fc", "equal"), (metadata, name, detail))
        )
        (_, blocks), (head, found) = parts(benign), parts(card)
        assert head.keys() <= {"library_name", "tags", "base_model"}
        if "base_model" in head:
            assert head["base_model"] == metadata["base_model"]
        assert [block.type for block in found] == [block.type for block in blocks]
        cells = ["".join(part.content for part in block.children or ()) for block in found]
        for text in (name, detail):  # shown as it is
            assert "".join(each if each.isprintable() else " " for each in text).strip() in cells
        inline = {part.type for block in found for part in block.children or ()}
        assert inline <= {"text", "code_inline", "text_special"}, "no links, pictures or HTML"
        shown = next(block for block in found if block.info == "json").content
        assert json.loads(shown) == metadata
        # The next save finds the marks.
        path.write_text(card)
        again = _card(path, {"a": 1}, "fc", "equal", new=False)
        assert again.partition(BEGIN)[2] == benign.partition(BEGIN)[2]


def _card(path: Path, metadata: Any, name: str, detail: str, *, new: bool = True) -> str:
    if new:
        path.unlink(missing_ok=True)
    spec: Any = MODEL._resadapt.sets["default"].spec
    spec = replace(spec, sites=(replace(spec.sites[0], name=name),), head=(name or "head",))
    report = report_of(path, [Check("tensors", "passed", detail)], detail)
    write_card(path, MODEL, spec, report, metadata, b"data")
    return path.read_text()
