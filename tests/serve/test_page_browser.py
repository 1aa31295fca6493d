"""The embedded server's page in a real browser."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("fastapi", reason="the extra serve isn't installed")

from excise.serve.http_settings import ServerSettings, key_digest
from excise.serve.page import page as document
from tests.serve.fake_engine import FakeEngine
from tests.serve.http_serving import serving, until

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
KEY = "a-key-of-the-operator-0123"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright isn't installed: no page is opened")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: no page is opened")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@dataclass
class Visit:
    """The opened page, where it asked, and all that it complained of."""

    page: Page
    engine: FakeEngine
    hosts: set[str] = field(default_factory=set)
    complaints: list[str] = field(default_factory=list)

    def ask(self, prompt: str) -> None:
        self.page.fill("#prompt", prompt)
        self.page.click("#make")

    def texts(self, selector: str) -> list[str]:
        return self.page.locator(selector).all_inner_texts()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Visit]]:
    import contextlib

    with contextlib.ExitStack() as stack:

        def opened(settings: ServerSettings | None = None, *, hold: bool = False, wait: bool = True) -> Visit:
            engine = FakeEngine(hold=False)
            address = stack.enter_context(serving(engine, settings, page=document()))
            # The server warms itself up with an image first.
            until(lambda: engine.jobs)
            engine.hold = hold
            context = browser.new_context(viewport={"width": 1200, "height": 800})
            stack.callback(context.close)
            visit = Visit(context.new_page(), engine)
            visit.page.on("pageerror", lambda error: visit.complaints.append(str(error)))
            visit.page.on("console", lambda line: visit.complaints.append(line.text) if line.type == "error" else None)
            visit.page.on("request", lambda one: visit.hosts.add(one.url.split("/")[2] if "//" in one.url else ""))
            visit.page.goto(address)
            if wait:
                visit.page.locator("input[name=edit]").first.wait_for()
            assert visit.hosts == {address.removeprefix("http://")}, "nothing is asked of anybody else"
            return visit

        yield opened


def images(visit: Visit, number: int) -> Any:
    frames = visit.page.locator(".frame img")
    frames.nth(number - 1).wait_for()
    assert frames.count() == number
    return frames


def test_edits_side_by_side_from_one_seed(visit: Callable[..., Visit]) -> None:
    one = visit()
    assert one.texts(".edit span") == ["weapons", "style", "base"]
    assert one.texts(".edit small")[0] == "erases gun, knife"
    one.page.fill("#seed", "7")
    one.ask("a red apple")
    images(one, 3)
    asked = [job.request for job in one.engine.jobs if job.request.request.prompt == "a red apple"]
    assert len(asked) == 3
    assert len({job.request.edit for job in asked}) == 3
    assert {(job.request.seed, job.num_inference_steps) for job in asked} == {(7, 25)}
    assert one.texts("figcaption b") == ["weapons", "style", "base"]
    assert one.texts(".round h2") == ["a red apple"]
    # a PNG of the model's own size: what was decoded is 24 × 16
    size = one.page.locator(".frame img").first.evaluate("image => [image.naturalWidth, image.naturalHeight]")
    assert size == [24, 16]
    assert one.complaints == []


def test_progress_is_live_and_stop_ends_the_denoising(visit: Callable[..., Visit]) -> None:
    one = visit(hold=True)
    for box in one.page.locator("input[name=edit]").all()[1:]:
        box.uncheck()
    before = len(one.engine.jobs)
    one.ask("a red apple")
    until(lambda: len(one.engine.jobs) == before + 1)
    job = one.engine.jobs[-1]
    job.step(5)
    one.page.get_by_text("5 of 25").wait_for()
    assert one.page.locator("progress").evaluate("bar => [bar.value, bar.max]") == [5, 25]
    one.page.click("#stop")
    one.page.get_by_text("stopped").wait_for()
    until(lambda: job.cancelled)
    assert one.page.locator("#make").is_enabled()


def test_an_error_is_shown_where_the_image_would_be(visit: Callable[..., Visit]) -> None:
    one = visit()
    one.ask("word " * 78)
    one.page.locator(".frame p").nth(2).wait_for()
    assert all("more than 77 words" in text for text in one.texts(".frame p"))
    for box in one.page.locator("input[name=edit]").all():
        box.uncheck()
    one.ask("a red apple")
    assert one.texts("#problem") == ["Choose at least one edit."]


def test_markup_in_a_prompt_is_text(visit: Callable[..., Visit]) -> None:
    one = visit()
    prompt = '<img src=x onerror="document.title=1"><b>bold</b>'
    one.ask(prompt)
    images(one, 3)
    assert one.texts(".round h2") == [prompt]
    assert one.page.title() == "excise · tiny"


def test_use_again_brings_the_settings_back(visit: Callable[..., Visit]) -> None:
    one = visit()
    one.page.fill("#seed", "11")
    one.ask("first")
    images(one, 3)
    one.page.click("#dice")
    one.ask("second")
    images(one, 6)
    one.page.locator(".round").nth(1).get_by_text("use again").click()
    assert (one.page.input_value("#prompt"), one.page.input_value("#seed")) == ("first", "11")


def test_a_server_with_keys_asks_for_one(visit: Callable[..., Visit]) -> None:
    one = visit(ServerSettings(api_key_digests=(key_digest(KEY),)), wait=False)
    one.page.get_by_text("this server needs a key").wait_for()
    one.page.fill("#key", KEY)
    one.page.press("#key", "Tab")
    one.page.locator("input[name=edit]").first.wait_for()
    one.ask("a red apple")
    images(one, 3)


@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_is_wider_than_the_window(visit: Callable[..., Visit], width: int) -> None:
    one = visit()
    one.page.set_viewport_size({"width": width, "height": 800})
    one.ask("a" * 300)
    images(one, 3)
    assert one.page.evaluate("() => document.documentElement.scrollWidth") <= width
