"""``excise serve``: a real process that serves, drains and ends as it says, and one line for what can't be served."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue

import pytest

from excise.cli import cli, main
from excise.cli_serve import serve
from excise.demo.bundled_onnx import bundled

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")

PATIENCE = 60.0
KEY = "0123456789abcdef-demo"
PROGRAM = (
    "import sys; from excise import cli; from excise.cli_serve import serve; cli.cli.add_command(serve); "
    "sys.exit(cli.main())"
)
IMAGES = "/v1/images/generations"


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.commands, "serve", serve)
    monkeypatch.delenv("EXCISE_API_KEYS", raising=False)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's cache that holds the bundled model already."""
    folder = tmp_path_factory.mktemp("cache")
    bundled(folder / "excise" / "demo")
    return folder


class Server:
    """A process of ``excise serve run demo``, its stderr line by line."""

    def __init__(self, cache: Path, *options: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "serve", "run", "demo", "--port", "0", "--threads", "1", *options],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "XDG_CACHE_HOME": str(cache), **environment},
        )
        self.lines: list[str] = []
        self._read: Queue[str | None] = Queue()
        self._reader = threading.Thread(target=self._follow)
        self._reader.start()
        self.url = self.line(r" on (https?://\S+) with edit ").group(1)

    def _follow(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stream:
            for line in stream:
                self._read.put(line.rstrip("\n"))
        self._read.put(None)

    def line(self, pattern: str) -> re.Match[str]:
        """The next line of stderr with this in it."""
        while (line := self._read.get(timeout=PATIENCE)) is not None:
            self.lines.append(line)
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"no line with {pattern}: {self.lines}")

    def wait(self) -> int:
        """The exit status, once it ended by itself."""
        status = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        while (line := self._read.get_nowait()) is not None:
            self.lines.append(line)
        return status

    def signal(self) -> None:
        self.process.send_signal(signal.SIGTERM)


@contextmanager
def started(cache: Path, *options: str, **environment: str) -> Iterator[Server]:
    server = Server(cache, *options, **environment)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait(PATIENCE)
        server._reader.join(PATIENCE)


class Asking(threading.Thread):
    """A client that waits for its image."""

    def __init__(self, client: httpx.Client, steps: int) -> None:  # type: ignore[name-defined]
        super().__init__()
        self._client, self._steps, self.response = client, steps, None
        self.start()

    def run(self) -> None:
        self.response = self._client.post(IMAGES, json={"prompt": "a cat", "num_inference_steps": self._steps})


def until_running(client: httpx.Client) -> None:  # type: ignore[name-defined]
    """Wait until an image is being denoised."""
    for _ in range(int(PATIENCE / 0.02)):
        if "excise_images_running 1.0" in client.get("/metrics").text:
            return
        time.sleep(0.02)
    raise AssertionError("no image is being made")


def test_one_image_and_a_drain_that_loses_nothing(cache: Path) -> None:
    with started(cache) as server, httpx.Client(base_url=server.url, timeout=PATIENCE) as client:
        assert "127.0.0.1" in server.url
        assert server.lines[-1].startswith("excise: demo on http://127.0.0.1:")
        assert "with edit weapons" in server.lines[-1]
        assert server.line("requests may choose").string.endswith(": gun, base")
        asked = {"prompt": "a red apple", "seed": 3, "num_inference_steps": 4}
        first, second = (client.post(IMAGES, json=asked) for _ in range(2))
        assert first.status_code == 200, first.text
        assert first.json()["data"] == second.json()["data"]
        assert client.post(IMAGES, json={**asked, "edit": "base"}).status_code == 200
        assert client.get("/readyz").status_code == 200
        assert "text/html" in client.get("/").headers["content-type"]
        last = Asking(client, 40)
        until_running(client)
        server.signal()
        server.line("SIGTERM: finishing 1 images within 30 s, taking no more")
        refused = httpx.post(server.url + IMAGES, json=asked, timeout=PATIENCE)
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        last.join(PATIENCE)
        assert last.response is not None
        assert last.response.status_code == 200
        assert server.wait() == 0
    assert server.lines[-1] == "excise: ended; everything that was taken was finished"
    assert "Traceback" not in "".join(server.lines)
    assert "red apple" not in "".join(server.lines)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_keys_tls_and_a_second_signal(cache: Path, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*made, *subject], check=True, capture_output=True)
    options = ["--tls-cert", str(certificate), "--tls-key", str(key), "--name", "small"]
    headers = {"authorization": f"Bearer {KEY}"}
    with started(cache, *options, EXCISE_API_KEYS=f"{KEY}, {KEY}2") as server:
        assert server.url.startswith("https://")
        assert server.lines[-1].startswith("excise: small on ")
        import ssl

        context = ssl.create_default_context(cafile=str(certificate))
        with httpx.Client(base_url=server.url, timeout=PATIENCE, verify=context) as client:
            assert client.get("/v1/models").status_code == 401
            client.headers.update(headers)
            assert client.get("/v1/models").json()["data"][0]["id"] == "small"
            last = Asking(client, 100)
            until_running(client)
            server.signal()
            server.line("SIGTERM: finishing 1 images")
            server.signal()
            last.join(PATIENCE)
            assert last.response is not None
            assert last.response.status_code == 503
            assert server.wait() == 1
    assert "excise: SIGTERM again: ending at once" in server.lines
    assert server.lines[-1] == "excise: ended; 1 images weren't finished"
    assert "Traceback" not in "".join(server.lines)


def test_a_policy_says_what_a_key_may_choose(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_text(f"# one a line\n{KEY} studio\n{KEY}2\n{KEY}3 guest\n")
    (tmp_path / "tenants.yaml").write_text("format: 1\ndefault: [weapons]\ntenants:\n  studio: [gun, weapons]\n")
    options = ["--api-key-file", str(tmp_path / "keys.txt"), "--policy", str(tmp_path / "tenants.yaml")]
    with started(cache, *options) as server, httpx.Client(base_url=server.url, timeout=PATIENCE) as client:
        warning = "warning: --policy doesn't list tenant 'guest' of the API keys: it may choose weapons"
        assert f"excise: {warning}" in server.lines
        assert client.get("/v1/models").status_code == 401
        for key, names in ((KEY, ["demo", "demo@gun", "demo@weapons"]), (f"{KEY}2", ["demo", "demo@weapons"])):
            client.headers["authorization"] = f"Bearer {key}"
            assert [one["id"] for one in client.get("/v1/models").json()["data"]] == names
            asked = {"prompt": "a red apple", "seed": 3, "num_inference_steps": 1}
            assert client.post(IMAGES, json=asked).json()["edit"] == (names[1].partition("@")[2])
            refused = client.post(IMAGES, json={**asked, "edit": "base"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "edit_not_allowed")
        server.signal()
        assert server.wait() == 0
    assert KEY not in "".join(server.lines)


def test_what_cannot_be_served_is_one_line(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    for name, text in (
        *(("empty", "# none\n"), ("short", "abc\n"), ("pem", "no certificate"), ("audit", "")),
        *(("cats.json", '{"default": ["cats"]}'), ("nobody.json", '{"tenants": {"studio": ["gun"]}}')),
    ):
        (tmp_path / name).write_text(text)
    pem, run = str(tmp_path / "pem"), ["serve", "run", "--port", "0"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cases: dict[str, list[str]] = {
            f"127.0.0.1 port {port} is in use: stop what": ["serve", "run", str(tmp_path / "none"), "--port", port],
            "doesn't exist": [*run, str(tmp_path / "none")],
            "has no excise.json": [*run, str(tmp_path)],
            "192.0.2.1 port 0 can't be listened to": [*run, "demo", "--host", "192.0.2.1"],
            "no.such.host.invalid port 0 can't be": [*run, "demo", "--host", "no.such.host.invalid"],
            "--tls-cert and --tls-key: give both": [*run, "demo", "--tls-cert", pem],
            "TLS can't use ": [*run, "demo", "--tls-cert", pem, "--tls-key", pem],
            "holds no key: write one a line": [*run, "demo", "--api-key-file", str(tmp_path / "empty")],
            "an API key has 3 characters": [*run, "demo", "--api-key-file", str(tmp_path / "short")],
            "--api-key-file": [*run, "demo", "--api-key-file", str(tmp_path / "none")],
            "none.json doesn't exist": [*run, "demo", "--policy", str(tmp_path / "none.json")],
            "the policy names edit 'cats', which": [*run, "demo", "--policy", str(tmp_path / "cats.json")],
            "--policy: no client may choose any edit: give": [*run, "demo", "--policy", str(tmp_path / "nobody.json")],
            "--deadline: Input should be greater than 0": [*run, "demo", "--deadline", "-1"],
            "--edit-name gun=": [*run, "demo", "--edit-name", "gun"],
            "default edit 'cat': choose one of weapons, gun, base": [*run, "demo", "--default-edit", "cat"],
            "batch_delay=-1.0: give": [*run, "demo", "--batch-delay", "-1"],
            "is not a file": [*run, "demo", "--edit", str(tmp_path / "none.safetensors")],
        }
        for message, arguments in cases.items():
            assert main(arguments) == 2, message
            errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("excise: error: ")]
            assert len(errors) == 1, message
            assert message in errors[0]


def test_all_commands_are_listed_and_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--help"]) == 0
    listed = capsys.readouterr().out
    for name in ("run", "build", "promote", "rollback", "status", "check"):
        assert re.search(rf"^  {name} ", listed, re.MULTILINE)
    assert main(["serve", "run", "--help"]) == 0
    assert "excise serve run demo" in capsys.readouterr().out
    assert main(["serve", "walk"]) == 2


def test_a_server_imports_no_torch() -> None:
    code = (
        "import sys, excise.cli_serve\n"
        "assert not {'fastapi', 'uvicorn', 'onnxruntime'} & set(sys.modules)\n"
        "import excise.serve.embedded_server, excise.serve.http_app, excise.serve.open_engine\n"
        "assert not {'torch', 'diffusers', 'transformers', 'onnx', 'scipy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE)
