"""The page in a real browser: opened from disk, with and without scripts, light, dark and printed."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from excise.eval.evaluation_comparison import compare, comparison_page
from excise.eval.evaluation_report import write_evaluation
from tests.eval.evaluations import LOUD, checks, make_evaluation

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
#: The first veiled image.
VEIL = "details.flagged summary"


@dataclass
class Visit:
    """One opened page, and all that it asked for and complained of."""

    page: Page
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    @property
    def images(self) -> list[str]:
        return [address for address in self.requests if "/images/" in address]

    def loud(self) -> int:
        """How many pixels of the erased concept's images have the colour that only flagged ones have."""
        with Image.open(io.BytesIO(self.page.locator(".cases").first.screenshot())) as shot:
            pixels = np.asarray(shot.convert("RGB")).astype(int)
        return int((np.abs(pixels - LOUD).max(-1) < 12).sum())


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright isn't installed: no page is opened")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: no page is opened")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a report") / "with #1 odd name"
    folder.mkdir()
    evaluation = make_evaluation(folder, cases=4)
    return write_evaluation(folder, evaluation, checks(evaluation))["report.html"]


def visit(browser: Browser, path: Path, **options: Any) -> Visit:
    made = Visit(browser.new_page(viewport={"width": 1000, "height": 800}, **options))
    made.page.on("request", lambda r: made.requests.append(r.url) if not r.url.startswith("data:") else None)
    made.page.on("console", lambda message: made.complaints.append(message.text))
    made.page.on("pageerror", lambda error: made.complaints.append(str(error)))
    made.page.on("requestfailed", lambda request: made.complaints.append(f"failed: {request.url[:80]}"))
    made.page.goto(path.as_uri())
    return made


@pytest.mark.parametrize("scripts", [True, False])
def test_flagged_images_are_veiled_until_clicked(browser: Browser, report: Path, scripts: bool) -> None:
    made = visit(browser, report, java_script_enabled=scripts)
    assert made.requests == [report.as_uri()]
    assert made.loud() == 0
    # To take the picture, all of them were in view: they were still not fetched.
    assert made.images == []
    made.page.locator(VEIL).first.click()
    made.page.locator("details.flagged a").first.wait_for(state="visible")
    made.page.wait_for_timeout(200)
    assert len(made.images) == 1
    assert made.images[0].startswith(report.parent.as_uri())
    assert made.loud() > 500
    made.page.locator(VEIL).first.click()
    assert made.loud() == 0
    assert made.complaints == []
    made.page.close()


def test_the_keyboard_shows_them_too(browser: Browser, report: Path) -> None:
    made = visit(browser, report)
    made.page.locator(VEIL).first.focus()
    made.page.keyboard.press("Enter")
    made.page.wait_for_timeout(200)
    assert len(made.images) == 1
    assert made.page.locator("details.flagged a").first.is_visible()
    made.page.close()


def test_print_never_shows_them(browser: Browser, report: Path) -> None:
    made = visit(browser, report, color_scheme="dark")
    made.page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    made.page.wait_for_timeout(500)
    assert made.loud() > 500
    made.page.emulate_media(media="print")
    assert made.loud() == 0
    # On paper, the page is light whatever the screen is.
    assert made.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    veils = made.page.locator("details.flagged summary img")
    assert all(veils.nth(n).is_visible() for n in range(veils.count()))
    assert len(made.page.pdf()) > 1000
    made.page.close()


@pytest.mark.parametrize(("scheme", "ground"), [("light", "rgb(255, 255, 255)"), ("dark", "rgb(20, 21, 23)")])
def test_both_schemes(browser: Browser, report: Path, scheme: Any, ground: str) -> None:
    made = visit(browser, report, color_scheme=scheme)
    assert made.page.evaluate("getComputedStyle(document.body).backgroundColor") == ground
    ink = made.page.evaluate("getComputedStyle(document.body).color")
    # The plots are in the page's ink, not in matplotlib's.
    assert made.page.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill") == ink
    made.page.close()


def test_a_narrow_screen_scrolls_only_its_tables(browser: Browser, report: Path) -> None:
    made = visit(browser, report)
    made.page.set_viewport_size({"width": 360, "height": 700})
    assert made.page.evaluate("document.documentElement.scrollWidth") <= 360
    made.page.close()


def test_plots_and_images_have_names(browser: Browser, report: Path) -> None:
    made = visit(browser, report)
    tree = made.page.locator("main").aria_snapshot()
    for title in ("Counts", "parts.RECE by class", "clip_score.kept against fid.kept"):
        assert f'img "{title}' in tree
    assert "alert('gun')" in tree
    # What is veiled has no picture to a reader either, only a button that says whose it is.
    assert "Flagged: show case 0003, base" in tree
    made.page.close()


def test_the_comparison_opens_too(browser: Browser, tmp_path: Path) -> None:
    evaluation = make_evaluation(tmp_path, cases=4)
    path = tmp_path / "comparison.html"
    path.write_text(comparison_page(compare(evaluation, evaluation), ("a", "<script>alert(1)</script>")))
    made = visit(browser, path)
    assert made.requests == [path.as_uri()]
    assert made.complaints == []
    assert made.page.locator("tbody tr").count() > 40
    made.page.close()
