"""The page in Chromium, through Playwright: pip install playwright, and a Chromium of the system's or Playwright's own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

pytestmark = pytest.mark.slow
WIDE, NARROW = (1200, 900), (390, 844)
STAR = "(() => { const t = document.getElementById('figure-accuracy').data.at(-1); return [t.x[0], t.y[0]]; })()"
COLUMNS = "document.getElementById('figure-shares').data.map((t) => Array.from(t.y)).flat()"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as started:
        try:
            opened = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright.Error as why:
            pytest.skip(f"needs Chromium: apt-get install chromium ({str(why).splitlines()[0]})")
        yield opened
        opened.close()


@pytest.fixture
def opened(browser, page, request) -> Iterator[Any]:
    """The page in a window of some size and colours, and what it asked for or complained of."""
    (width, height), colours = getattr(request, "param", (WIDE, "light"))
    tab = browser.new_page(viewport={"width": width, "height": height}, color_scheme=colours)
    tab.seen = []
    tab.on("console", lambda message: tab.seen.append(message.text))
    tab.on("pageerror", lambda error: tab.seen.append(str(error)))
    tab.on("dialog", lambda dialog: (tab.seen.append(dialog.message), dialog.dismiss()))
    tab.on("request", lambda asked: tab.seen.append(asked.url))
    tab.goto(page.as_uri())
    tab.wait_for_selector("html[data-drawn]")
    tab.seen = [text for text in tab.seen if not text.startswith((page.as_uri(), "data:", "blob:"))]
    yield tab
    tab.close()


def test_the_slider_moves_the_point_and_the_columns_and_a_button_brings_them_back(opened):
    before = opened.evaluate(STAR), opened.evaluate(COLUMNS)
    opened.fill("#t", "0")
    assert opened.evaluate(STAR)[0] == pytest.approx(0.3)  # all leave at exit 0
    assert opened.evaluate(COLUMNS) == pytest.approx([0.5, 0, 0, 0.5, 0, 0])
    assert opened.text_content("#said").startswith("T = 0.00: cost 0.300")
    assert opened.text_content("#typed").endswith("--threshold 0")
    opened.click("#own")
    assert (opened.evaluate(STAR), opened.evaluate(COLUMNS)) == before
    assert opened.seen == []


@pytest.mark.parametrize("opened", [(WIDE, "light"), (WIDE, "dark"), (NARROW, "light")], indirect=True, ids=str)
def test_every_figure_is_drawn_inside_of_the_window(opened, tmp_path):
    assert opened.evaluate("document.documentElement.scrollWidth") <= opened.viewport_size["width"]
    for figure in opened.query_selector_all(".figure"):
        assert figure.query_selector("svg.main-svg")
        box = figure.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= opened.viewport_size["width"]
    opened.screenshot(path=tmp_path / "page.png", full_page=True)
    assert opened.seen == []


@pytest.mark.parametrize("opened", [(WIDE, "light"), (WIDE, "dark")], indirect=True, ids=str)
def test_words_of_a_figure_have_the_colour_of_the_page(opened):
    own = opened.evaluate("getComputedStyle(document.body).color")
    drawn = opened.evaluate("getComputedStyle(document.querySelector('.xtick text')).fill")
    assert drawn == own


def test_it_prints_whatever_the_screens_colours_are(opened):
    opened.emulate_media(color_scheme="dark")
    assert len(opened.pdf(format="A4")) > 20_000
    assert opened.seen == []
