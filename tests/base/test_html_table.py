"""What a notebook shows: whole HTML, with everything that the text says, and nothing as markup."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typing_extensions import override

import resadapt
from resadapt.base.html_table import html_table
from resadapt.types import SuggestedLayers

EVIL = "<script>alert('&')</script>"


class Page(HTMLParser):
    """The texts of a page, after a check that its tags are balanced."""

    def __init__(self, shown: Any) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self.styles: dict[str, str] = {}
        self.style = ""
        self.feed(shown if isinstance(shown, str) else shown._repr_html_())
        self.close()
        assert not self.open
        assert self.tags <= {"div", "table", "thead", "tbody", "tr", "th", "td"}

    @override
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.tags.add(tag)
        self.style = dict(attrs).get("style") or ""

    @override
    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    @override
    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data)
            self.styles[data] = self.style


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.body = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU())
        self.add_module(EVIL, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
        self.fc = nn.Linear(8, 2)


def adapted(**options: Any) -> nn.Module:
    return resadapt.inject_adapters(Net(), "body.0", 2, head="fc", **options)


@pytest.mark.parametrize("norm", ["frozen", "affine"])
def test_a_summary_has_the_cells_of_the_text_along_the_network(norm: str) -> None:
    model = adapted(norm=norm)
    summary = resadapt.summary(model)
    page = Page(summary)
    for line in str(summary).splitlines():
        for cell in line.replace("1 norms", "1_norms").split():
            assert cell.strip("-") in ("", *(text.replace(" ", "_") for text in page.texts)), cell
    stem = ["stem.0", "stem.1"] if norm == "affine" else []
    names = ["the model", "stem", *stem, "body", "body.0", "body.1", EVIL, "fc"]
    assert [text for text in page.texts if text in names] == names
    bold = {name for name in names if "bold" in page.styles[name]}
    assert bold == {"body.0", "fc", *(["stem.1"] if norm == "affine" else [])}
    assert "padding-left: 0.7em" in page.styles["the model"]
    assert "padding-left: 3.7em" in page.styles["body.0"]
    count = resadapt.count_parameters(model)
    assert summary.modules[0] == ("", "Net", "", count.trainable, count.frozen)


def test_reports_say_in_words_and_colours_what_was_found(tmp_path: Path) -> None:
    path = tmp_path / f"{EVIL.replace('/', '')}.pt"
    model = adapted()
    report = resadapt.save_adapters(model, path, metadata={EVIL: EVIL, "lone": "\ud800"})
    page = Page(report)
    for check in report.checks:
        assert {check.name, check.outcome, check.detail} <= set(page.texts)
    assert page.texts[0] == f"{path}: verified"
    assert page.styles["passed"] != page.styles["not checked"]

    info = Page(resadapt.read_adapter_info(path))
    assert r"\ud800" in info.texts
    assert {EVIL, f"metadata[{EVIL!r}]", "'default', family 'pooled'", "body.0", "fc"} <= set(
        info.texts
    )

    assert Page(resadapt.check_backbone(model)).texts[0] == "The backbone has not drifted."
    with torch.no_grad():
        resadapt.set_active_adapters(model, None)
        model.fc.weight.add_(1)
    drift = resadapt.check_backbone(model)
    texts = Page(drift).texts
    assert texts[0] == "The backbone has drifted in 1 tensors and modules."
    assert {"fc.weight", drift.reasons["fc.weight"]} <= set(texts)


def test_estimates_and_suggestions_have_the_cells_of_the_text() -> None:
    estimate = resadapt.estimate_training(adapted(), (2, 3, 16, 16))
    layers = resadapt.suggest_layers(
        Net(), 500, layers="body.0", flops=10**9, example_input=torch.zeros(1, 3, 16, 16)
    )
    for shown in (estimate, layers, SuggestedLayers({"x": 0}, {"x": 2}, {}, 0.5, EVIL)):
        words = " ".join(Page(shown).texts)
        for cell in str(shown).split():
            assert cell in words or cell.strip("()") in words


def test_every_text_is_escaped() -> None:
    shown = html_table([EVIL], [[EVIL], [(EVIL, '"color: red')]], title=EVIL, note=EVIL)
    assert Page(shown).texts == [EVIL] * 5
    assert "<script" not in shown
