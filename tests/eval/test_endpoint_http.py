"""Retries where they help, one clear line where they don't, and nothing sent where it wasn't meant to go."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from excise.errors import ArtefactError, ExciseError, UsageError
from excise.eval.endpoint_http import Endpoint
from tests.eval.fake_endpoint import Answer, Asked, fake_endpoint


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def in_turn(*answers: Answer) -> Callable[[Asked], Answer]:
    """Each answer once, the last one from then on."""
    left = list(answers)
    return lambda _: left.pop(0) if len(left) > 1 else left[0]


def post(url: str, **options: Any) -> tuple[dict[str, Any], list[float]]:
    pauses: list[float] = []
    with Endpoint(url, sleep=pauses.append, **options).session() as session:
        return session.post("/path", {"prompt": "ä"}), pauses


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again(status: int) -> None:
    with fake_endpoint(in_turn(Answer(status=status), Answer(status=status), Answer({"done": 1}))) as server:
        assert post(server.url) == ({"done": 1}, [0.5, 1.0])
    assert [(one.method, one.path, one.body) for one in server.asked] == [("POST", "/path", {"prompt": "ä"})] * 3


def test_the_server_says_how_long_to_wait_within_bounds() -> None:
    answers = [Answer(status=429, headers={"retry-after": text}) for text in ("7", "9999", "Fri, 1 Jan 2100", "-1")]
    with fake_endpoint(in_turn(*answers, Answer({}))) as server:
        assert post(server.url)[1] == [7, 30, 2, 4]


def test_it_gives_up_with_the_servers_own_reason() -> None:
    body = {"error": {"message": "CUDA out of\nmemory " + "x" * 300}}
    with (
        fake_endpoint(in_turn(Answer(body, 500))) as server,
        pytest.raises(ArtefactError, match=r"/path answered 500 .*: CUDA out of memory x*… \(3 tries\)$") as caught,
    ):
        post(server.url, retries=2)
    assert len(server.asked) == 3
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (Answer({"error": "no such size"}, 400), UsageError, "answered 400 Bad Request: no such size"),
        (Answer({"detail": [{"msg": "too long"}]}, 422), UsageError, "answered 422 .*too long"),
        (Answer(status=404), UsageError, "answered 404 Not Found"),
        (Answer(status=401), UsageError, "answered 401 Unauthorized: name the variable that holds its key"),
        (
            Answer(status=307, headers={"location": "https://elsewhere.example/"}),
            UsageError,
            "is redirected to https://elsewhere.example/: name that address",
        ),
        (
            Answer(b"<html><title>Log\n in</title>", headers={"content-type": "text/html; charset=utf-8"}),
            ArtefactError,
            r"answered text/html \(Log in\) instead of JSON",
        ),
        (Answer(b"\xff\xfe\x00"), ArtefactError, "answered application/octet-stream instead of JSON"),
        (Answer([1]), ArtefactError, "answered a JSON list, not an object"),
        (Answer(b"[" * 100_000), ArtefactError, "instead of JSON"),
    ],
)
def test_what_no_further_try_would_change(answer: Answer, kind: type[ExciseError], message: str) -> None:
    with fake_endpoint(in_turn(answer)) as server, pytest.raises(kind, match=message):
        post(server.url)
    assert len(server.asked) == 1


def test_nobody_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UsageError, match=r"can't be reached \(.*refused; 2 tries\): start the server"):
            post(url, retries=1)


def test_no_answer_in_time() -> None:
    def slow(_: Asked) -> Answer:
        time.sleep(0.3)
        return Answer({})

    with (
        fake_endpoint(slow) as server,
        pytest.raises(ArtefactError, match=r"did not answer within 0.05 s \(2 tries\).*timeout=SECONDS"),
    ):
        post(server.url, timeout=0.05, retries=1)
    assert len(server.asked) == 2


def test_a_connection_that_breaks_off() -> None:
    with fake_endpoint(in_turn(Answer({"a": "b" * 999}, cut=True), Answer({"done": 1}))) as server:
        assert post(server.url)[0] == {"done": 1}
    with (
        fake_endpoint(in_turn(Answer({"a": "b" * 999}, cut=True))) as server,
        pytest.raises(ArtefactError, match=r"broke off \(.*; one try\)"),
    ):
        post(server.url, retries=0)


def test_a_key_is_sent_only_where_its_variable_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "TEST_KEY"):
        monkeypatch.setenv(name, "secret-of-the-test")
    with fake_endpoint(in_turn(Answer({}))) as server:
        post(server.url)
        post(server.url, key_env="TEST_KEY")
    assert "authorization" not in server.asked[0].headers
    assert server.asked[1].headers["authorization"] == "Bearer secret-of-the-test"
    assert "secret" not in repr(Endpoint("http://host", key_env="TEST_KEY"))
    monkeypatch.setenv("TEST_KEY", "")
    with pytest.raises(UsageError, match="key_env=TEST_KEY: there is no such environment variable"):
        Endpoint("http://host", key_env="TEST_KEY")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("file:///etc/passwd", "isn't an address"),
        ("localhost:8000", "isn't an address"),
        ("http://", "isn't an address"),
        ("http://host:99999", "isn't an address"),
        ("http://[::1", "isn't an address"),
        ("https://me:word@host", "the address of host holds a password"),
        ("https://host/?a=b", "has a query or fragment"),
    ],
)
def test_addresses(url: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        Endpoint(url)
    assert "word@" not in str(caught.value)


def test_get_of_what_is_not_there() -> None:
    with fake_endpoint(lambda asked: Answer({"a": 1}) if asked.path == "/there" else Answer(status=404)) as server:
        with Endpoint(server.url + "/").session() as session:
            assert session.get("/there") == {"a": 1}
            assert session.get("/none") is None
        assert [one.path for one in server.asked] == ["/there", "/none"]
