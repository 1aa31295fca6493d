"""The image API as a runtime: what is sent, what is read, and what is refused."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from excise.errors import ArtefactError, UsageError
from excise.eval.endpoint_http import Endpoint
from excise.eval.endpoint_openai import OpenAIRuntime
from excise.serve.runtime import Request
from tests.eval.fake_endpoint import Answer, Asked, fake_endpoint

REQUESTS = [Request(f"a cat {seed}", negative_prompt="a dog" if seed else "", seed=seed) for seed in range(7)]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def pixels(seed: int, width: int = 6) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (4, width, 3), np.uint8)


def encoded(image: npt.NDArray[np.uint8], kind: str = "png", **options: Any) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return {"created": 0, "data": [{"b64_json": base64.b64encode(buffer.getvalue()).decode()}]}


def painted(asked: Asked) -> Answer:
    return Answer(encoded(pixels(asked.body["seed"])))


def generate(answer: Callable[[Asked], Answer], **options: Any) -> tuple[npt.NDArray[np.uint8], list[Asked]]:
    with fake_endpoint(answer) as server:
        runtime = OpenAIRuntime(Endpoint(server.url, retries=0), name="server", **options)
        return runtime.generate(REQUESTS, num_inference_steps=20, guidance_scale=5.5), server.asked


@pytest.mark.parametrize("concurrency", [1, 4])
def test_images_come_in_the_order_of_the_requests(concurrency: int) -> None:
    images, asked = generate(painted, concurrency=concurrency)
    assert np.array_equal(images, np.stack([pixels(seed) for seed in range(7)]))
    sent = sorted(asked, key=lambda one: one.body["seed"])
    assert {(one.method, one.path) for one in sent} == {("POST", "/v1/images/generations")}
    assert sent[3].body == {
        "prompt": "a cat 3",
        "negative_prompt": "a dog",
        "n": 1,
        "response_format": "b64_json",
        "seed": 3,
        "num_inference_steps": 20,
        "guidance_scale": 5.5,
    }


def test_model_and_size_are_sent_where_they_are_named() -> None:
    _, asked = generate(painted, model="sd-safe", size=(6, 4))
    assert (asked[0].body["model"], asked[0].body["size"]) == ("sd-safe", "6x4")


def test_a_requests_own_size_is_sent_and_wanted_back() -> None:
    sized = [Request("a cat", seed=seed, height=4, width=10) for seed in (1, 2)]

    def answer(asked: Asked) -> Answer:
        width, _ = map(int, asked.body.get("size", "6x4").split("x"))
        return Answer(encoded(pixels(asked.body["seed"], width)))

    with fake_endpoint(answer) as server:
        runtime = OpenAIRuntime(Endpoint(server.url, retries=0), name="server", size=(6, 4))
        assert runtime.generate(REQUESTS[:1]).shape == (1, 4, 6, 3)
        assert np.array_equal(runtime.generate(sized), np.stack([pixels(seed, 10) for seed in (1, 2)]))
        assert runtime.generate(REQUESTS[:1]).shape == (1, 4, 6, 3)
        assert [one.body["size"] for one in server.asked] == ["6x4", "10x4", "10x4", "6x4"]
        with pytest.raises(UsageError, match="one call can't give images of"):
            runtime.generate([sized[0], REQUESTS[0]])
    with fake_endpoint(painted) as server:
        runtime = OpenAIRuntime(Endpoint(server.url, retries=0), name="server")
        with pytest.raises(ArtefactError, match="an image of 6 × 4 pixels where 10 × 4 was expected: a server makes"):
            runtime.generate(sized)
        # It isn't taken for the server's own size.
        assert runtime.generate(REQUESTS[:1]).shape == (1, 4, 6, 3)


def test_other_formats_are_read() -> None:
    kinds: dict[int, tuple[str, dict[str, Any]]] = {0: ("webp", {"lossless": True}), 1: ("jpeg", {"quality": 100})}

    def answer(asked: Asked) -> Answer:
        kind, options = kinds.get(asked.body["seed"], ("png", {}))
        level = np.full((4, 6, 3), 100 + asked.body["seed"], np.uint8)
        return Answer(encoded(level, kind, **options))

    images, _ = generate(answer)
    assert [int(image[0, 0, 0]) for image in images] == [100 + seed for seed in range(7)]


def test_progress_counts_to_the_end() -> None:
    seen: list[tuple[int, int]] = []
    with fake_endpoint(painted) as server:
        runtime = OpenAIRuntime(Endpoint(server.url), name="server", concurrency=3)
        runtime.generate(REQUESTS, progress=lambda done, total: seen.append((done, total)))
        assert runtime.generate([]).shape == (0, 4, 6, 3)
    assert seen == [(done, 7) for done in range(1, 8)]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"data": [{"url": "https://elsewhere.example/a.png"}]}, "answered an image's address, where one"),
        ({"data": []}, "answered data, where one"),
        ({}, "answered an empty object, where one"),
        ({"data": [{"b64_json": "no base64!"}]}, "no whole PNG, WebP or JPEG image"),
        ({"data": [{"b64_json": base64.b64encode(b"<svg/>").decode()}]}, "no whole PNG, WebP or JPEG image"),
        ({"data": [{"b64_json": encoded(pixels(0))["data"][0]["b64_json"][:80]}]}, "no whole PNG, WebP or JPEG"),
        ({"data": encoded(pixels(0))["data"] * 2}, "answered data, where one"),
        (b"<html>", "instead of JSON"),
    ],
)
def test_answers_that_are_no_image(body: object, message: str) -> None:
    with pytest.raises(ArtefactError, match=message):
        generate(lambda _: Answer(body))


def test_an_image_of_another_size_is_refused() -> None:
    def answer(asked: Asked) -> Answer:
        return Answer(encoded(pixels(0, width=8 if asked.body["seed"] == 5 else 6)))

    with pytest.raises(ArtefactError, match="gave an image of 8 × 4 pixels where 6 × 4 was expected"):
        generate(answer)
    with pytest.raises(ArtefactError, match="gave an image of 6 × 4 pixels where 512 × 512 was expected"):
        generate(painted, size=(512, 512))


@pytest.mark.parametrize(
    ("request_", "scale", "message"),
    [
        (Request("a", index=1), 7.5, "neither an index nor an edit"),
        (Request("a", edit="ab"), 7.5, "neither an index nor an edit"),
        (Request("a", seed=-1), 7.5, "seed=-1"),
        (Request("a"), float("nan"), "guidance_scale=nan"),
    ],
)
def test_what_can_not_be_asked_for_is_not_sent(request_: Request, scale: float, message: str) -> None:
    with fake_endpoint(painted) as server:
        with pytest.raises(UsageError, match=message):
            OpenAIRuntime(Endpoint(server.url), name="server").generate([request_], guidance_scale=scale)
        assert server.asked == []


def test_a_failure_ends_what_has_not_begun() -> None:
    """With one request at a time, those behind the failing one are never sent."""

    def answer(asked: Asked) -> Answer:
        return Answer({"error": "refused"}, 400) if asked.body["seed"] == 2 else painted(asked)

    with fake_endpoint(answer) as server:
        with pytest.raises(UsageError, match="answered 400 Bad Request: refused"):
            OpenAIRuntime(Endpoint(server.url), name="server").generate(REQUESTS)
        assert len(server.asked) <= 4  # the pool may have begun the next one before it heard
