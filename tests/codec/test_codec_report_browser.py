"""The report page in a real browser: nothing is missing, nothing goes out, and it fits a phone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import report_folders as folders
from av1partition.data.blocks import BlockSet
from av1partition.evaluation.html_report import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
# Where a browser must be there, its absence is a failure: .ci/run says so.
NEEDED = os.environ.get("RESADAPT_NEED_BROWSER") == "1"
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, with an empty profile."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if not found:
        said = f"none of {', '.join(BROWSERS)} is installed; apt-get install chromium"
        (pytest.fail if NEEDED else pytest.skip)(said)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=found, args=FLAGS)
        yield running
        running.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, all_blocks: dict[str, BlockSet]) -> str:
    """The page of a results folder, with names that break out where something is not escaped."""
    folder = tmp_path_factory.mktemp("results")
    folders.results(folder, all_blocks)
    folders.ablation(
        folder / "ablation",
        "<script>document.title = 'taken over'</script>",
        "a-name-without-any-blank-" * 6,
    )
    return write_report(folder).as_uri()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_in_a_browser(size: dict[str, int], scheme: str, browser: Any, report: str) -> None:
    page = browser.new_page(viewport=size, color_scheme=scheme)
    told: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("requestfailed", lambda request: told.append(request.url))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(report)
    assert "taken over" not in page.title()
    images = page.evaluate(
        "[...document.images].map(image => [image.complete, image.naturalWidth])"
    )
    assert len(images) == 8
    assert all(complete and width > 0 for complete, width in images)
    plots = page.evaluate(
        "[...document.querySelectorAll('svg')].map(plot => plot.getBoundingClientRect().height)"
    )
    assert min(plots) > 100
    assert page.evaluate("document.documentElement.scrollWidth") == size["width"]
    links = page.query_selector_all("nav a")
    assert len(links) == 7
    for link in links:
        link.click()
        heading = page.query_selector(link.get_attribute("href"))
        assert heading.inner_text() == link.inner_text()
        box = heading.bounding_box()
        assert heading.is_visible()
        assert -1 <= box["y"] < size["height"]
    dark = page.evaluate(
        "getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g)[0] < 128"
    )
    assert dark == (scheme == "dark")
    # The ink of the plots is the ink of the text, or it could not be seen in one of the schemes.
    ink = page.evaluate(
        "[getComputedStyle(document.querySelector('svg text')).fill, "
        "getComputedStyle(document.body).color]"
    )
    assert ink[0] == ink[1]
    assert [url for url in requests if not url.startswith("data:")] == [report]
    assert told == []
    page.close()
