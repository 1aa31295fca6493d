"""The report: complete, parsed back, self-contained, and safe with hostile prompts."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from excise.errors import OutputError
from excise.eval import grids
from excise.eval.protocol import PromptSeeds
from excise.eval.report import FILES, as_json, html, table, write_report
from excise.eval.results import ROLES, Results
from excise.eval.verdict import decide

Judged = Callable[..., Results]
CONTEXT = {"edit": "3f2a", "manifest sha256": "00ff", "sizes": [1, 2]}


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture
def results(judged: Judged) -> Results:
    return judged(torch=(19, 0), onnx=(19, 1))


def test_three_files_are_written(tmp_path: Path, results: Results) -> None:
    paths = write_report(tmp_path / "new" / "out", results, decide(results), CONTEXT)
    assert tuple(paths) == FILES
    assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == sorted(FILES)
    assert json.loads(paths["report.json"].read_text()) == as_json(results, decide(results), CONTEXT)
    with Image.open(paths["grid.png"]) as grid:
        assert grid.mode == "RGB"


def test_nothing_is_replaced(tmp_path: Path, results: Results) -> None:
    (tmp_path / "grid.png").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        write_report(tmp_path, results, decide(results), CONTEXT)
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


def test_json_is_complete(results: Results) -> None:
    report = as_json(results, decide(results), CONTEXT)
    assert report["passed"] is True
    assert report["context"] == CONTEXT
    assert {"python", "numpy", "scipy"} <= set(report["versions"])
    assert list(report["runtimes"]) == list(ROLES)
    assert report["runtimes"]["base torch"]["detections"].keys() >= {"successes", "n", "low", "high", "method"}
    assert all({"measured", "threshold", "passed", "sentence"} <= check.keys() for check in report["checks"])
    assert len(report["images"]) == 40
    for role in ROLES:
        seen = [image["runtimes"][role]["success"] for image in report["images"] if image["erased"]]
        assert sum(seen) == report["runtimes"][role]["detections"]["successes"]


def test_json_is_the_same_twice(judged: Judged) -> None:
    def without_times(results: Results) -> str:
        report = as_json(results, decide(results), CONTEXT)
        for runtime in report["runtimes"].values():
            del runtime["seconds_per_image"]
        return json.dumps(report)

    assert without_times(judged()) == without_times(judged())


def test_page_fetches_nothing(results: Results) -> None:
    source = html(results, decide(results), CONTEXT)
    page = Page(source)
    assert not {"script", "link", "iframe", "object", "embed", "a"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "action"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert "http://" not in source
    assert "https://" not in source
    assert "url(" not in source
    assert "@import" not in source


def test_page_shows_the_images(results: Results) -> None:
    images = [attributes for tag, attributes in Page(html(results, decide(results), CONTEXT)).tags if tag == "img"]
    # Two erased prompts with a strip a runtime, two kept ones with a tile a runtime.
    assert len(images) == 2 * 3 + 2 * 3
    assert all(image["alt"] for image in images)
    first = images[0]["src"]
    assert first is not None
    with Image.open(io.BytesIO(base64.b64decode(first.split(",")[1]))) as shown:
        pixels = np.asarray(shown)
    assert pixels.shape == (8, 4 * 9 - 1, 4)
    assert np.array_equal(pixels[:, :8, :3], results.runtimes["base torch"].images[0])
    assert images[0]["width"] == "70"


def test_page_says_the_verdict_in_words(judged: Judged) -> None:
    good, bad = judged(), judged(onnx=(0, 0))
    assert "Passed: 9 of 9 checks" in Page(html(good, decide(good), CONTEXT)).text
    text = Page(html(bad, decide(bad), CONTEXT)).text
    assert "Failed: 6 of 9 checks" in text
    assert "Detections went from 20 to 20 of 20 in edited onnx" in text


def test_page_names_the_context(results: Results) -> None:
    text = Page(html(results, decide(results), CONTEXT)).text
    assert "3f2a" in text
    assert "00ff" in text


def test_a_hostile_prompt_is_text(results: Results) -> None:
    hostile = "\"><script>alert('gun')</script>{{ 7 * 7 }}"
    protocol = dataclasses.replace(results.protocol, erased=(PromptSeeds(hostile, "gun", tuple(range(20))),))
    source = html(dataclasses.replace(results, protocol=protocol), decide(results), {hostile: hostile})
    page = Page(source)
    assert "<script" not in source
    assert "script" not in {tag for tag, _ in page.tags}
    assert hostile in page.text
    assert any(hostile in (attributes.get("alt") or "") for tag, attributes in page.tags if tag == "img")


def test_table_is_plain_text(judged: Judged) -> None:
    good, bad = judged(), judged(onnx=(0, 0))
    lines = table(good, decide(good)).splitlines()
    assert lines[0].split() == ["base", "torch", "edited", "torch", "edited", "onnx"]
    assert lines[-1] == "PASSED: 9 of 9 checks"
    assert any("20/20 (100.0%)" in line and "0/20 (0.0%)" in line for line in lines)
    assert any(line.startswith("FID (features of grey)") for line in lines)
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", table(good, decide(good)))
    assert table(bad, decide(bad)).splitlines()[-1] == "FAILED: 6 of 9 checks"


def test_small_images_are_enlarged_and_large_ones_reduced() -> None:
    small = np.arange(64 * 64 * 3, dtype=np.uint8).reshape(1, 64, 64, 3)
    assert np.array_equal(grids.reduced(small), small)
    assert grids.enlarged(small[0]).shape == (128, 128, 3)
    assert np.array_equal(grids.enlarged(small[0])[::2, 1::2], small[0])
    assert grids.reduced(np.zeros((2, 256, 512, 3), np.uint8)).shape == (2, 64, 128, 3)


def test_no_torch_is_imported() -> None:
    modules = ("statistics", "verdict", "protocol", "results", "report", "grids")
    code = f"import sys, {', '.join(f'excise.eval.{module}' for module in modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
