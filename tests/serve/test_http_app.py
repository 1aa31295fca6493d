"""Around the protocols: health, keys, limits, cancellation, deadlines, records, and a client that misbehaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from excise.errors import ArtefactError, OutputError, QueueFull, UsageError
from excise.serve import http_auth
from excise.serve.audit_log import AuditLog
from excise.serve.http_app import create_app
from excise.serve.http_auth import matching
from excise.serve.http_settings import ServerSettings, key_digest
from tests.serve.fake_engine import STYLE, FakeEngine
from tests.serve.http_serving import client_of, serving, until

PATH = "/v1/images/generations"
KEY = "a key of its own".replace(" ", "-")


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="module")
def url(engine: FakeEngine) -> Iterator[str]:
    settings = ServerSettings(max_body_bytes=20_000, header_timeout=0.3, body_timeout=0.4, max_connections=20)
    with serving(engine, settings) as url:
        yield url


@contextlib.contextmanager
def connected(url: str) -> Iterator[socket.socket]:
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        yield connection


def everything(connection: socket.socket) -> bytes:
    """What is read until the server closes."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            found += part
    return found


# --- health ---------------------------------------------------------------------------------------------------------


def test_ready_after_the_first_image_and_until_it_drains() -> None:
    async def watched() -> None:
        engine = FakeEngine(hold=True)
        app = create_app(engine)
        async with client_of(app) as client:
            await asyncio.sleep(0)
            early = await client.get("/readyz")
            assert (early.status_code, early.json()["error"]["code"]) == (503, "warming_up")
            assert (await client.get("/v2/health/ready")).json() == {"error": "the first image isn't done yet"}
            assert (await client.get("/healthz")).status_code == 200
            assert [job.request.num_inference_steps for job in engine.jobs] == [2]
            engine.hold = False
            engine.jobs[0].finish()
            while not app.state.readiness.warm:
                await asyncio.sleep(0.001)
            assert (await client.get("/readyz")).status_code == 200
            assert (await client.head("/readyz")).status_code == 200
            app.state.readiness.drain()
            late = await client.get("/readyz")
            assert (late.status_code, late.headers["retry-after"]) == (503, "10")
            refused = await client.post(PATH, json={"prompt": "a"})
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "10")
            assert (await client.get("/healthz")).status_code == 200
            assert len(engine.jobs) == 1

    asyncio.run(watched())


def test_what_is_under_way_is_finished_while_it_drains() -> None:
    async def watched() -> int:
        engine = FakeEngine(hold=True)
        app = create_app(engine)
        async with client_of(app) as client:
            answer = asyncio.create_task(client.post(PATH, json={"prompt": "a"}))
            while len(engine.jobs) < 2:
                await asyncio.sleep(0.001)
            app.state.readiness.drain()
            for job in engine.jobs:
                job.finish()
            return int((await answer).status_code)

    assert asyncio.run(watched()) == 200


def test_a_model_that_fails_is_never_ready(caplog: pytest.LogCaptureFixture) -> None:
    async def watched() -> Any:
        engine = FakeEngine()
        engine.error = ArtefactError("unet is broken")
        async with client_of(create_app(engine)) as client:
            await asyncio.sleep(0.01)
            return await client.get("/readyz")

    answer = asyncio.run(watched())
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "warm_up_failed")
    assert "unet is broken" in caplog.text


def test_a_full_queue_delays_the_warm_up() -> None:
    async def watched() -> None:
        engine = FakeEngine()
        engine.refusal = QueueFull(3, 0.01)
        app = create_app(engine)
        async with client_of(app) as client:
            await asyncio.sleep(0.02)
            assert (await client.get("/readyz")).status_code == 503
            engine.refusal = None
            await asyncio.sleep(0.05)
            assert (await client.get("/readyz")).status_code == 200

    asyncio.run(watched())


# --- keys -----------------------------------------------------------------------------------------------------------


def test_keys() -> None:
    async def watched() -> None:
        settings = ServerSettings(api_key_digests=(key_digest(KEY), key_digest(KEY + "2")), open_metrics=False)
        async with client_of(create_app(FakeEngine(), settings)) as client:

            async def status(path: str, sent: str | bytes | None) -> int:
                headers = {} if sent is None else {"authorization": sent}
                return int((await client.get(path, headers=headers)).status_code)

            for sent in (f"Bearer {KEY}", f"bearer {KEY}2"):
                assert await status("/v1/models", sent) == 200
            wrong: tuple[str | bytes | None, ...]
            wrong = (None, "", KEY, f"Basic {KEY}", "Bearer", f"Bearer {KEY}3", "Bearer \u00ff".encode())
            assert set(await asyncio.gather(*(status("/v1/models", sent) for sent in wrong))) == {401}
            for path in ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"):
                assert await status(path, None) in (200, 503)
            closed = ("/metrics", "/openapi.json", "/v2", "/nothing", "/healthz/", "/v1/../healthz%2f")
            assert set(await asyncio.gather(*(status(path, None) for path in closed))) == {401}
            answer = await client.post("/v2/models/tiny/infer", content=b"x" * 100)
            assert answer.json() == {"error": answer.json()["error"]}
            assert answer.headers["www-authenticate"] == "Bearer"

    asyncio.run(watched())


def test_guessing_keys_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_auth, "WAITING", 5)

    async def watched() -> None:
        settings = ServerSettings(api_key_digests=(key_digest(KEY),))
        async with client_of(create_app(FakeEngine(), settings)) as client:
            wrong = {"authorization": "Bearer wrong"}
            started = time.monotonic()
            guesses = [asyncio.create_task(client.get("/v1/models", headers=wrong)) for _ in range(30)]
            await asyncio.sleep(0)
            right = await client.get("/v1/models", headers={"authorization": f"Bearer {KEY}"})
            assert right.status_code == 200
            assert not all(guess.done() for guess in guesses), "the right key didn't wait for the wrong ones"
            statuses = [(await guess).status_code for guess in guesses]
            assert sorted(statuses) == [401] * 5 + [429] * 25
            assert time.monotonic() - started >= http_auth.DELAY * 0.9

    asyncio.run(watched())


def test_every_key_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []

    def compare(first: str, second: str) -> bool:
        compared.append(second)
        return first == second

    monkeypatch.setattr("hmac.compare_digest", compare)
    digests = tuple(key_digest(f"{KEY}{number}") for number in range(4))
    assert matching(f"Bearer {KEY}1", digests) == digests[1]
    assert compared == list(digests)


@pytest.mark.parametrize("key", ["short", "with a space in it", "ünïcödë-but-long-enough", "line\nend-and-more-of-it"])
def test_keys_that_are_refused(key: str) -> None:
    with pytest.raises(UsageError, match="API key"):
        key_digest(key)


def test_settings_that_contradict_themselves() -> None:
    for wrong in ({"default_steps": 200}, {"deadline": 0}, {"deadline": float("nan")}, {"api_key_digests": [KEY]}):
        with pytest.raises(ValueError, match=r"default_steps|deadline|api_key_digests"):
            ServerSettings.model_validate(wrong)


# --- cancellation and deadlines -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_client_that_leaves_cancels_its_images(url: str, engine: FakeEngine, stream: bool, steps: int) -> None:
    before, engine.hold = len(engine.jobs), True
    try:
        with connected(url) as connection:
            body = json.dumps({"prompt": "a", "n": 2, "stream": stream}).encode()
            head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            connection.sendall(head.encode() + b"\r\n\r\n" + body)
            until(lambda: len(engine.jobs) == before + 2)
            for done in range(steps):
                engine.jobs[before].step(done)
        until(lambda: all(job.cancelled for job in engine.jobs[before:]))
    finally:
        engine.hold = False
    metrics = httpx.get(f"{url}/metrics").text
    assert f'excise_http_requests_total{{method="POST",route="{PATH}",status="{200 if stream else 499}"}}' in metrics
    assert 'excise_images_total{edit="weapons",outcome="client_left"}' in metrics


def test_a_client_that_leaves_within_its_body(url: str, engine: FakeEngine) -> None:
    before = len(engine.jobs)
    with connected(url) as connection:
        connection.sendall(b"POST " + PATH.encode() + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    assert httpx.get(f"{url}/healthz").status_code == 200
    assert len(engine.jobs) == before


@pytest.mark.parametrize(
    ("settings", "headers", "expected"),
    [
        ({}, {}, None),
        ({"deadline": 60}, {}, 60.0),
        ({"deadline": 60}, {"x-request-timeout": "5.5"}, 5.5),
        ({"deadline": 60}, {"x-request-timeout": "500"}, 60.0),
        ({}, {"x-request-timeout": "nan"}, "refused"),
        ({}, {"x-request-timeout": "-1"}, "refused"),
        ({}, {"x-request-timeout": "soon"}, "refused"),
    ],
)
def test_deadlines_reach_the_engine(settings: Any, headers: dict[str, str], expected: Any) -> None:
    async def watched() -> Any:
        engine = FakeEngine()
        async with client_of(create_app(engine, ServerSettings(**settings))) as client:
            answer = await client.post(PATH, json={"prompt": "a"}, headers=headers)
            if answer.status_code == 400:
                return "refused"
            return next(job.request.deadline for job in engine.jobs if job.request.request.prompt)

    assert asyncio.run(watched()) == expected


def test_an_engine_that_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("excise.serve.http_generation._GRACE", 0.05)

    async def watched() -> Any:
        engine = FakeEngine(hold=True)
        async with client_of(create_app(engine)) as client:
            answer = await client.post(PATH, json={"prompt": "a"}, headers={"x-request-timeout": "0.05"})
            return answer, next(job for job in engine.jobs if job.request.request.prompt).cancelled

    answer, cancelled = asyncio.run(watched())
    assert (answer.status_code, answer.json()["error"]["code"], cancelled) == (504, "deadline_exceeded", True)


# --- what is sent on the wire ---------------------------------------------------------------------------------------


def test_a_body_without_a_length_is_read_up_to_the_limit(url: str) -> None:
    with connected(url) as connection:
        connection.sendall(b"POST " + PATH.encode() + b" HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        sent = 0
        with contextlib.suppress(ConnectionError):
            for _ in range(3000):
                connection.sendall(b"400\r\n" + b"x" * 1024 + b"\r\n")
                sent += 1024
        answer = everything(connection)
    assert not answer or b" 413 " in answer
    assert sent < 3000 * 1024, "the server closed the connection"


def test_a_length_over_the_limit_is_refused_at_once(url: str) -> None:
    with connected(url) as connection:
        connection.sendall(b"POST " + PATH.encode() + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n")
        answer = everything(connection)
    assert b" 413 " in answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "body_too_large"


def test_a_slow_body(url: str) -> None:
    with connected(url) as connection:
        connection.sendall(b"POST " + PATH.encode() + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        answer = everything(connection)
    assert b" 408 " in answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "body_timeout"


@pytest.mark.parametrize("first", [b"", b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"])
def test_slow_headers(url: str, first: bytes) -> None:
    with connected(url) as connection:
        connection.sendall(first)
        if first:
            assert b" 200 " in connection.recv(65536)
        started = time.monotonic()
        with contextlib.suppress(ConnectionError):
            for letter in b"GET /healthz HTTP/1.1\r\nX: " + b"x" * 1000:
                connection.sendall(bytes([letter]))
                time.sleep(0.02)
                if time.monotonic() - started > 4:
                    break
        assert time.monotonic() - started < 4, "the connection was held"


def test_a_silent_connection_is_closed(url: str) -> None:
    with connected(url) as connection:
        assert everything(connection) == b""


def test_more_connections_than_allowed_are_closed(url: str) -> None:
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connected(url)) for _ in range(40)]
        closed = 0
        for connection in reversed(connections):
            # Those within the bound are closed too, once their headers are late: only at once counts.
            connection.settimeout(0.01)
            with contextlib.suppress(TimeoutError):
                try:
                    closed += connection.recv(1) == b""
                except ConnectionError:
                    closed += 1
        assert closed >= 15
    until(lambda: httpx.get(f"{url}/healthz").status_code == 200)


@pytest.mark.parametrize(
    "sent",
    [b"\x16\x03\x01\x02\x00\x01", b"GET / HTTX/1.1", b"GET /" + b"a" * 40_000, b"POST / HTTP/1.1\r\n\r\n"],
)
def test_what_is_no_http(url: str, sent: bytes) -> None:
    with connected(url) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(sent + b"\r\n\r\n")
        answer = everything(connection)
        assert not answer or json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"
    assert httpx.get(f"{url}/healthz").status_code == 200


# --- records --------------------------------------------------------------------------------------------------------


def test_logs_and_audit_without_prompts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    secret = "an unspeakable prompt"
    audit = tmp_path / "audit.jsonl"

    async def watched(settings: ServerSettings) -> list[Any]:
        engine = FakeEngine()
        async with client_of(create_app(engine, settings)) as client:
            good = await client.post(
                PATH,
                json={"prompt": secret, "negative_prompt": secret, "seed": 4, "n": 2, "edit": "style"},
                headers={"x-request-id": "mine-1", "authorization": f"Bearer {KEY}"},
            )
            wrong = await client.post(f"{PATH}?q=unspeakable", json={"prompt": secret, "seed": -1})
            engine.error = RuntimeError(f"failed at {secret}")
            failed = await client.post(PATH, json={"prompt": secret}, headers={"x-request-id": "not\tmine"})
            engine.error, engine.refusal = None, QueueFull(1, 1)
            return [good, wrong, failed, await client.post(PATH, json={"prompt": secret})]

    caplog.set_level(logging.INFO, "excise")
    good, wrong, failed, full = asyncio.run(watched(ServerSettings(audit_log=audit)))
    assert good.headers["x-request-id"] == "mine-1"
    assert "mine" not in failed.headers["x-request-id"]
    assert (wrong.status_code, failed.status_code, full.status_code) == (400, 500, 429)
    assert "unspeakable" not in failed.text
    lines = [json.loads(line) for line in audit.read_text().splitlines()]
    assert stat.S_IMODE(audit.stat().st_mode) == 0o600
    assert [(line["seed"], line["status"], line["outcome"]) for line in lines[:2]] == [
        (4, 200, "done"),
        (5, 200, "done"),
    ]
    assert [line["outcome"] for line in lines[2:]] == ["internal_error", "queue_full"]
    assert (lines[0]["request_id"], lines[0]["edit"], lines[0]["edit_id"]) == ("mine-1", "style", STYLE)
    assert (lines[0]["verdict"], lines[0]["steps"], lines[0]["protocol"]) == (None, 25, "openai")
    logs = [json.loads(record.message) for record in caplog.records if record.name.startswith("excise")]
    assert [log["status"] for log in logs if "status" in log] == [200, 400, 500, 429]
    assert any(log.get("failed") == "RuntimeError" for log in logs)
    for text in (audit.read_text(), json.dumps(logs)):
        assert "unspeakable" not in text
        assert KEY not in text

    asyncio.run(watched(ServerSettings(audit_log=audit, log_prompts=True)))
    assert json.loads(audit.read_text().splitlines()[len(lines)])["prompt"] == secret


def test_an_image_that_cannot_be_recorded_is_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OutputError("audit log audit.jsonl can't be written: No space left on device")

    async def watched() -> Any:
        settings = ServerSettings(audit_log=tmp_path / "audit.jsonl")
        async with client_of(create_app(FakeEngine(), settings)) as client:
            monkeypatch.setattr(AuditLog, "write", full)
            return await client.post(PATH, json={"prompt": "a"})

    answer = asyncio.run(watched())
    assert answer.status_code == 500
    assert "b64_json" not in answer.text


def test_the_audit_log_can_be_rotated(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.write(seed=1)
    path.rename(tmp_path / "audit.1")
    log.write(seed=2)
    log.close()
    assert json.loads(path.read_text())["seed"] == 2
    assert json.loads((tmp_path / "audit.1").read_text())["seed"] == 1
    with pytest.raises(OutputError, match="can't be written"):
        AuditLog(tmp_path / "nowhere" / "audit.jsonl")


def test_metrics() -> None:
    async def watched() -> str:
        async with client_of(create_app(FakeEngine())) as client:
            await client.post(PATH, json={"prompt": "a", "num_inference_steps": 7})
            for path in ("/nothing", "/nothing/else"):
                await client.get(path)
            await client.request("BREW", "/nothing")
            return str((await client.get("/metrics")).text)

    found = asyncio.run(watched())
    for line in (
        f'excise_http_requests_total{{method="POST",route="{PATH}",status="200"}} 1.0',
        'excise_http_requests_total{method="GET",route="unmatched",status="404"} 2.0',
        'excise_http_requests_total{method="other",route="unmatched",status="404"} 1.0',
        f'excise_http_request_seconds_count{{route="{PATH}"}} 1.0',
        'excise_images_total{edit="weapons",outcome="done"} 1.0',
        'excise_image_steps_bucket{le="10.0"} 1.0',
        "excise_queue_waiting 3.0",
        "excise_unet_calls_total 10.0",
        "excise_unet_images_total 25.0",
        "excise_unet_seconds_total 1.5",
        'excise_images_failed_total{reason="model_error"} 4.0',
        'excise_images_failed_total{reason="deadline"} 3.0',
        'excise_images_failed_total{reason="cancelled"} 2.0',
        'excise_images_failed_total{reason="stopped"} 0.0',
        "# TYPE excise_images_failed_total counter",
        "excise_ready 1.0",
    ):
        assert line in found.splitlines(), line
    assert f'edit="style",edit_id="{STYLE}"' in found


# --- pages ----------------------------------------------------------------------------------------------------------


def test_pages_load_nothing_from_elsewhere() -> None:
    async def watched() -> None:
        async with client_of(create_app(FakeEngine())) as client:
            for path in ("/", "/docs"):
                assert (await client.get(path)).headers["location"] == "/openapi.json"
            document = (await client.get("/openapi.json")).json()
            assert {PATH, "/v2/models/{model}/infer", "/readyz", "/metrics"} <= set(document["paths"])
            assert "422" not in json.dumps(document)
            assert (await client.get("/redoc")).status_code == 404
            assert (
                "access-control-allow-origin" not in (await client.get("/v1/models", headers={"origin": "a"})).headers
            )
        async with client_of(create_app(FakeEngine(), page="<!doctype html><title>page</title>")) as client:
            answer = await client.get("/")
            assert answer.headers["content-type"].startswith("text/html")
            assert "default-src 'none'" in answer.headers["content-security-policy"]

    asyncio.run(watched())


def test_other_origins_only_if_the_operator_names_them() -> None:
    async def watched() -> None:
        settings = ServerSettings(cors_origins=("https://studio.example",), api_key_digests=(key_digest(KEY),))
        async with client_of(create_app(FakeEngine(), settings)) as client:
            headers = {"origin": "https://studio.example", "access-control-request-method": "POST"}
            assert (await client.options(PATH, headers=headers)).status_code == 200
            headers["origin"] = "https://other.example"
            assert (await client.options(PATH, headers=headers)).status_code == 400
            answer = await client.get("/v1/models", headers={"origin": "https://studio.example"})
            assert answer.status_code == 401
            assert answer.headers["access-control-allow-origin"] == "https://studio.example"

    asyncio.run(watched())


@pytest.mark.parametrize(("method", "path"), [("GET", PATH), ("DELETE", "/v1/models"), ("POST", "/healthz")])
def test_other_methods(url: str, method: str, path: str) -> None:
    answer = httpx.request(method, f"{url}{path}")
    assert answer.status_code == 405
    assert answer.json()["error"]["code"] == "method_not_allowed"
    assert answer.headers["allow"]
