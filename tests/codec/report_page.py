"""A report page taken apart, and what every one must keep to."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """What a page is made of; that each element is closed, and what every page must keep to."""

    VOID = ("meta", "link", "img")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(self.source)
        assert not self.open
        self.text = " ".join(self.text.split())
        self.check()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += f"{data} "

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def check(self) -> None:
        assert "<!DOCTYPE html>" in self.source[:30]
        assert len(self.source) < 1_500_000
        assert self.all("html") == [{"lang": "en"}]
        assert len(self.all("h1")) == len(self.all("title")) == 1
        assert len(self.all("caption")) == len(self.all("table"))
        assert all(image["alt"] for image in self.all("img"))
        assert all(plot["role"] == "img" and plot["aria-label"] for plot in self.all("svg"))
        ids = [attributes["id"] for _, attributes in self.tags if "id" in attributes]
        assert len(set(ids)) == len(ids)
        for tag, attributes in self.tags:
            assert tag not in {"script", "iframe", "object", "embed", "base", "form"}
            for key, value in attributes.items():
                assert not key.startswith("on")
                if key in {"src", "href", "xlink:href", "srcset", "action"}:
                    assert value.startswith("data:") or (value[0] == "#" and value[1:] in ids), (
                        tag,
                        value[:80],
                    )
                for reference in re.findall(r"url\(([^)]*)\)", value):
                    assert reference[1:] in ids
        assert "url(" not in self.source[: self.source.index("</style>")]
        assert "@import" not in self.source
