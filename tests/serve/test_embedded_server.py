"""The server's end when images aren't finished in time, its log, and its addresses. The rest is in test_cli_serve."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
from contextlib import closing
from pathlib import Path
from queue import Queue

import pytest

from excise.errors import UsageError
from excise.serve.batch_engine import BatchEngine
from excise.serve.listener import Tls, address, listen
from excise.serve.log_lines import JsonLines
from tests.serve.fake_runtime import EDIT, PATIENCE, SERVED, FakeRuntime

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")


def test_what_is_not_finished_within_the_drain_is_told_so() -> None:
    from excise.serve.embedded_server import EmbeddedServer
    from excise.serve.http_app import create_app
    from excise.serve.http_settings import ServerSettings

    runtime, ready, said, answers = FakeRuntime(), threading.Event(), Queue[str](), []
    settings = ServerSettings(default_steps=5)
    with (
        BatchEngine({EDIT: runtime, None: runtime}, SERVED) as engine,
        closing(listen("127.0.0.1", 0)) as listener,
    ):
        url = address(listener, None)
        server = EmbeddedServer(
            create_app(engine, settings), engine, settings, drain_timeout=0.01, say=said.put, ready=ready.set
        )

        def client() -> None:
            assert ready.wait(PATIENCE)
            runtime.go(settings.warm_up_steps)
            for _ in range(settings.warm_up_steps):
                runtime.at_step()
            asking = threading.Thread(
                target=lambda: answers.append(httpx.post(f"{url}/v1/images/generations", json={"prompt": "a"}))
            )
            asking.start()
            runtime.at_step()
            os.kill(os.getpid(), signal.SIGTERM)
            said.get(timeout=PATIENCE)
            while engine.drain(0) or not engine._closed:  # until the time is over
                pass
            runtime.go()
            asking.join(PATIENCE)

        outside = threading.Thread(target=client)
        outside.start()
        server.run_until_signal(listener)
        outside.join(PATIENCE)
    assert server.unfinished == 1
    assert [answer.status_code for answer in answers] == [503]
    assert runtime.decoded == [0]  # the warm-up alone


def test_a_log_line_is_one_json_object() -> None:
    lines = JsonLines()
    record = logging.LogRecord("excise.serve", logging.WARNING, __file__, 1, "a %s\nfailed", ("batch",), None)
    assert json.loads(lines.format(record))["message"] == "a batch\nfailed"
    assert "\n" not in lines.format(record)
    try:
        raise RuntimeError("why")
    except RuntimeError:
        record.exc_info = sys.exc_info()
    line = json.loads(lines.format(record))
    assert line["traceback"].endswith("RuntimeError: why")
    assert line["level"] == "warning"
    record.name, record.msg, record.args = "excise.access", '{"status": 200}', ()
    assert lines.format(record) == '{"status": 200}'


def test_an_answer_does_not_wait_for_the_clients_acknowledgement_of_its_headers() -> None:
    with (
        closing(listen("127.0.0.1", 0)) as listener,
        closing(socket.create_connection(listener.getsockname())),
        closing(listener.accept()[0]) as connection,
    ):
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


def test_addresses(tmp_path: Path) -> None:
    with closing(listen("localhost", 0)) as listener:
        assert address(listener, Tls(tmp_path, tmp_path)).startswith("https://")
        port = listener.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port} is in use"):
            listen(listener.getsockname()[0], port)
    if socket.has_ipv6:
        try:
            six = listen("::1", 0)
        except UsageError:
            pytest.skip("this machine has no IPv6 address")
        with closing(six):
            assert address(six, None) == f"http://[::1]:{six.getsockname()[1]}"
