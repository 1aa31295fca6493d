"""OpenAI's image API, through its official client and by hand."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from excise.errors import ArtefactError, DeadlineExceeded, QueueFull, UsageError
from excise.eval.endpoint_http import Endpoint
from excise.eval.endpoint_openai import OpenAIRuntime
from excise.serve.engine import ImageRequest
from excise.serve.http_app import create_app
from excise.serve.http_settings import ServerSettings
from excise.serve.runtime import Request
from tests.serve.fake_engine import SHAPE, STYLE, WEAPONS, FakeEngine, image_of
from tests.serve.http_serving import client_of, serving

PATH = "/v1/images/generations"


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="module")
def url(engine: FakeEngine) -> Iterator[str]:
    with serving(engine) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url) as client:
        yield client


def pixels(encoded: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))


def made(prompt: str, seed: int, steps: int, scale: float, edit: str | None = WEAPONS, negative: str = "") -> Any:
    return image_of(ImageRequest(Request(prompt, negative, seed, edit=edit), steps, scale))


def ask(body: dict[str, Any], settings: ServerSettings | None = None, engine: FakeEngine | None = None) -> Any:
    """One answer to one request of an application of its own."""

    async def asked() -> Any:
        async with client_of(create_app(engine or FakeEngine(), settings)) as client:
            return await client.post(PATH, json=body)

    return asyncio.run(asked())


def test_official_client(url: str) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        answer = client.images.generate(
            prompt="a cat",
            model="tiny@style",
            n=2,
            size="24x16",
            response_format="b64_json",
            extra_body={"seed": 7, "num_inference_steps": 3, "guidance_scale": 2.5, "negative_prompt": "blue"},
        )
        assert [one.id for one in client.models.list().data] == ["tiny", "tiny@weapons", "tiny@style", "tiny@base"]
        assert client.models.retrieve("tiny@style").id == "tiny@style"
        with pytest.raises(openai.NotFoundError) as refused:
            client.images.generate(prompt="a cat", model="dall-e-3")
    assert refused.value.code == "model_not_found"
    assert "tiny@weapons" in str(refused.value)
    for place, one in enumerate(answer.data):
        np.testing.assert_array_equal(pixels(one.b64_json), made("a cat", 7 + place, 3, 2.5, STYLE, "blue"))
        assert one.seed == 7 + place
    assert (answer.edit, answer.edit_id, answer.size) == ("style", STYLE, "24x16")


def test_official_client_streams(url: str) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        events = list(
            client.images.generate(prompt="a cat", stream=True, extra_body={"seed": 1, "num_inference_steps": 3})
        )
    assert [one.type for one in events] == ["image_generation.progress"] * 3 + ["image_generation.completed"]
    assert [one.step for one in events[:3]] == [1, 2, 3]
    np.testing.assert_array_equal(pixels(events[-1].b64_json), made("a cat", 1, 3, 7.5))


def test_own_client(url: str) -> None:
    runtime = OpenAIRuntime(Endpoint(url), name="served", model="tiny@base", size=(SHAPE[1], SHAPE[0]), concurrency=3)
    requests = [Request(f"cat {row}", "dull", seed=row) for row in range(5)]
    images = runtime.generate(requests, num_inference_steps=4, guidance_scale=3.0)
    for request, image in zip(requests, images, strict=True):
        np.testing.assert_array_equal(image, made(request.prompt, request.seed, 4, 3.0, None, "dull"))


def test_defaults_and_random_seed_can_be_repeated() -> None:
    engine = FakeEngine()
    settings = ServerSettings(default_steps=6, default_guidance_scale=4.5)
    first = ask({"prompt": "a cat"}, settings, engine).json()
    (job,) = (job.request for job in engine.jobs if job.request.request.prompt)
    assert (job.num_inference_steps, job.guidance_scale, job.request.edit) == (6, 4.5, WEAPONS)
    assert 0 <= first["seed"] < 2**53
    repeated = {name: first[name] for name in ("seed", "num_inference_steps", "guidance_scale", "edit")}
    again = ask({"prompt": "a cat", **repeated}, None, FakeEngine()).json()
    assert again["data"] == first["data"]


@pytest.mark.parametrize(
    ("body", "status", "code", "word"),
    [
        (b"{", 400, "invalid_json", "JSON"),
        (b"\xff\xfe", 400, "invalid_json", "JSON"),
        (b"[" * 100_000, 400, "invalid_json", "JSON"),
        (b"[]", 400, "invalid_value", "object"),
        ({}, 400, "invalid_value", "prompt"),
        ({"prompt": 5}, 400, "invalid_value", "prompt"),
        (rb'{"prompt": "\ud800"}', 400, "invalid_json", "JSON"),
        ({"prompt": "a" * 4001}, 400, "prompt_too_long", "4000"),
        ({"prompt": "cat " * 900}, 400, "prompt_too_long", "77"),
        ({"prompt": "a", "negative_prompt": "a" * 4001}, 400, "prompt_too_long", "negative_prompt"),
        ({"prompt": "a", "guidence_scale": 1}, 400, "unknown_parameter", "guidence_scale"),
        ({"prompt": "a", "n": 0}, 400, "invalid_value", "n"),
        ({"prompt": "a", "n": 9}, 400, "invalid_value", "8"),
        ({"prompt": "a", "n": True}, 400, "invalid_value", "n"),
        ({"prompt": "a", "size": "1024x1024"}, 400, "invalid_value", "24x16"),
        ({"prompt": "a", "size": "-1x99999999999"}, 400, "invalid_value", "24x16"),
        ({"prompt": "a", "num_inference_steps": -1}, 400, "invalid_value", "num_inference_steps"),
        ({"prompt": "a", "num_inference_steps": 10**9}, 400, "invalid_value", "100"),
        ({"prompt": "a", "num_inference_steps": "5"}, 400, "invalid_value", "num_inference_steps"),
        (b'{"prompt": "a", "guidance_scale": NaN}', 400, "invalid_value", "guidance_scale"),
        (b'{"prompt": "a", "guidance_scale": 1e999}', 400, "invalid_value", "guidance_scale"),
        ({"prompt": "a", "guidance_scale": -1}, 400, "invalid_value", "guidance_scale"),
        ({"prompt": "a", "guidance_scale": 51}, 400, "invalid_value", "50"),
        ({"prompt": "a", "seed": -1}, 400, "invalid_value", "seed"),
        ({"prompt": "a", "seed": 2**63}, 400, "invalid_value", "seed"),
        ({"prompt": "a", "seed": 2**63 - 1, "n": 2}, 400, "invalid_value", "seed"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400, None, ""),
        ({"prompt": "a", "edit": "../../etc/passwd"}, 400, "unknown_edit", "weapons"),
        ({"prompt": "a", "model": "../tiny"}, 404, "model_not_found", "tiny"),
        ({"prompt": "a", "model": "tiny@style", "edit": "weapons"}, 400, "invalid_value", "different"),
        ({"prompt": "a", "response_format": "url"}, 400, "invalid_value", "b64_json"),
        ({"prompt": "a" * (1 << 20)}, 413, "body_too_large", "1048576"),
    ],
)
def test_bad_input(
    engine: FakeEngine, client: httpx.Client, body: Any, status: int, code: str | None, word: str
) -> None:
    before = len(engine.jobs)
    given = {"content": body} if isinstance(body, bytes) else {"json": body}
    answer = client.post(PATH, headers={"content-type": "application/json"}, **given)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "code", "param"}
    assert error["type"] == "invalid_request_error"
    assert code is None or error["code"] == code
    assert word in error["message"]
    assert len(answer.content) < 1000
    assert len(engine.jobs) == before


def test_an_edit_without_a_model_and_with_the_same_model(client: httpx.Client) -> None:
    for body in ({"edit": "style"}, {"edit": "style", "model": "tiny"}, {"edit": "style", "model": "tiny@style"}):
        assert client.post(PATH, json={"prompt": "a", **body}).json()["edit_id"] == STYLE
    assert client.post(PATH, json={"prompt": "a", "edit": ""}).json()["edit_id"] == WEAPONS


def test_other_content_types_are_refused(client: httpx.Client) -> None:
    for headers in ({"content-type": "text/plain"}, {"content-encoding": "gzip"}):
        assert client.post(PATH, content=b'{"prompt": "a"}', headers=headers).status_code == 415


@pytest.mark.parametrize(
    ("error", "status", "code", "header"),
    [
        (QueueFull(9, 2.2), 429, "queue_full", "3"),
        (UsageError("seed=1: it can't be used"), 400, "invalid_value", None),
        (ArtefactError("/secret/place is broken"), 500, "internal_error", None),
    ],
)
def test_refusals_of_the_engine(error: Any, status: int, code: str, header: str | None) -> None:
    async def asked() -> Any:
        engine = FakeEngine()
        async with client_of(create_app(engine)) as client:
            await asyncio.sleep(0)
            engine.refusal = error
            first = await client.post(PATH, json={"prompt": "a"})
            engine.refusal = None
            return first, await client.post(PATH, json={"prompt": "a"})

    answer, after = asyncio.run(asked())
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.headers.get("retry-after") == header
    assert "secret" not in answer.text
    assert after.status_code == 200, "the server lives on"


def test_the_first_jobs_are_cancelled_when_a_later_one_is_refused() -> None:
    async def asked() -> tuple[Any, FakeEngine]:
        engine = FakeEngine(hold=True)
        app = create_app(engine)
        transport = httpx.ASGITransport(app)
        submit, calls = engine.submit, 0

        def limited(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise QueueFull(2, 1)
            return submit(*args, **kwargs)

        engine.submit = limited  # type: ignore[method-assign]
        async with httpx.AsyncClient(transport=transport, base_url="http://excise") as client:
            return await client.post(PATH, json={"prompt": "a", "n": 4}), engine

    answer, engine = asyncio.run(asked())
    assert answer.status_code == 429
    assert [job.cancelled for job in engine.jobs] == [True, True]


def test_one_failed_image_fails_the_request_and_cancels_the_others() -> None:
    async def asked() -> tuple[Any, FakeEngine]:
        engine = FakeEngine(hold=True)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(engine)), base_url="http://x") as client:
            answer = asyncio.create_task(client.post(PATH, json={"prompt": "a", "n": 3}))
            while len(engine.jobs) < 3:
                await asyncio.sleep(0.001)
            engine.jobs[1].future.set_exception(DeadlineExceeded("too late"))
            return await answer, engine

    answer, engine = asyncio.run(asked())
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert [job.cancelled for job in engine.jobs] == [True, False, True]


def test_errors_within_a_stream() -> None:
    async def asked() -> Any:
        engine = FakeEngine()
        engine.error = ArtefactError("/secret/place is broken")
        async with httpx.AsyncClient(transport=httpx.ASGITransport(create_app(engine)), base_url="http://x") as client:
            broken = await client.post(PATH, json={"prompt": "a", "stream": True})
            engine.error, engine.refusal = None, QueueFull(1, 1)
            return broken, await client.post(PATH, json={"prompt": "a", "stream": True})

    broken, refused = asyncio.run(asked())
    assert broken.headers["content-type"].startswith("text/event-stream")
    blocks = [block.split("\n") for block in broken.text.strip().split("\n\n")]
    assert blocks[0][0] == "event: error"
    assert json.loads(blocks[0][1].removeprefix("data: "))["error"]["code"] == "internal_error"
    assert blocks[-1] == ["data: [DONE]"]
    assert "secret" not in broken.text
    assert refused.status_code == 429, "what is known before the first event is a status"
