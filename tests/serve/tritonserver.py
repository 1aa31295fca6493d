"""A real tritonserver to test against: that of the wheel nvidia-pytriton, which carries the Python backend alone.

It wants NumPy 1, and so an environment of its own, which is made once in the user's cache folder (about a minute and
half a gigabyte). Where that can't be done, the tests that ask for it are skipped, and say why.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parent.parent.parent
ROOMS = ("edit", "serve", "export", "eval", "demo")

#: excise's own dependencies, in the versions of constraints.txt but for NumPy: 2 leaves the backend's outputs empty.
NEEDED = ("onnxruntime", "click", "pillow", "pydantic", "safetensors", "tokenizers", "tqdm")
REQUIREMENTS = (
    "nvidia-pytriton==0.7.0",
    "numpy<2",
    *(line for line in (ROOT / "constraints.txt").read_text().split() if line.partition("==")[0] in NEEDED),
)

#: Puts the checked-out excise on the path of every interpreter of that environment; PYTHONPATH doesn't reach a model.
_PTH = "import os, sys; sys.path[:0] = filter(None, [os.environ.get('EXCISE_TEST_LINKS')])\n"


def environment() -> Path:
    """The virtual environment with tritonserver; skips the test where it can't be had."""
    if sys.platform != "linux" or sys.version_info[:2] != (3, 11):
        pytest.skip("tritonserver's wheel is tested on Linux with Python 3.11")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "excise"
    name = hashlib.sha256("\n".join(REQUIREMENTS).encode()).hexdigest()[:12]
    folder = base / f"tritonserver-{name}"
    base.mkdir(parents=True, exist_ok=True)
    with (base / f"tritonserver-{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "installed").is_file():
            _install(folder)
    return folder


def _install(folder: Path) -> None:
    steps = (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *REQUIREMENTS],
    )
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
            pytest.skip(f"no tritonserver: its environment can't be installed ({reason})")
    site = _site(folder)
    (site / "excise-test.pth").write_text(_PTH)
    (folder / "installed").touch()


def _site(folder: Path) -> Path:
    return folder / "lib" / "python3.11" / "site-packages"


@dataclass(frozen=True)
class Triton:
    """A running server with the repository ``models``, from which it loads what it is told to."""

    models: Path
    log: Path
    process: subprocess.Popen[bytes]
    http: str
    grpc: str
    metrics: str

    def post(self, path: str, document: object = None) -> httpx.Response:
        """Answer of Triton's HTTP interface."""
        return httpx.post(f"http://{self.http}{path}", json=document or {}, timeout=120)

    def get(self, path: str) -> httpx.Response:
        """Answer of Triton's HTTP interface."""
        return httpx.get(f"http://{self.http}{path}", timeout=60)

    def load(self, model: str) -> str | None:
        """Why a model can't be loaded; None once it is ready."""
        answer = self.post(f"/v2/repository/models/{model}/load")
        return None if answer.is_success else str(answer.json()["error"])

    def metric(self, name: str, **labels: str) -> float | None:
        """A value of its metrics; None where there is none with these labels."""
        for line in httpx.get(f"http://{self.metrics}/metrics", timeout=60).text.splitlines():
            if line.startswith(f"{name}{{") and all(f'{key}="{value}"' in line for key, value in labels.items()):
                return float(line.rpartition(" ")[2])
        return None

    def stop(self, by: signal.Signals = signal.SIGINT) -> int:
        """Tell it to end, and wait; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(by)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def said(self) -> str:
        """Its log."""
        return self.log.read_text(errors="replace")


@contextmanager
def running(folder: Path, *options: str) -> Iterator[Triton]:
    """A server in ``folder``, an empty one, with no model loaded; ``options`` are tritonserver's."""
    venv = environment()
    triton = _site(venv) / "pytriton" / "tritonserver"
    models, backend, links = folder / "models", folder / "backends" / "python", folder / "links" / "excise"
    for new in (models, backend, links):
        new.mkdir(parents=True)
    for file in (
        *(triton / "backends" / "python").iterdir(),
        triton / "python_backend_stubs" / "3.11" / "triton_python_backend_stub",
    ):
        if file.is_file():
            (backend / file.name).symlink_to(file)
    for file in (ROOT / "core").glob("*.py"):
        (links / file.name).symlink_to(file)
    for room in ROOMS:
        (links / room).symlink_to(ROOT / room)
    info = links.parent / "excise-0.dist-info"  # excise asks for its own version
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: excise\nVersion: {version('excise')}\n")
    http, grpc, metrics = (f"127.0.0.1:{port}" for port in _free_ports(3))
    command = [str(triton / "bin" / "tritonserver"), f"--model-repository={models}"]
    command += [f"--backend-directory={backend.parent}", f"--cache-directory={triton / 'caches'}"]
    command += ["--model-control-mode=explicit", "--strict-readiness=true", "--allow-gpu-metrics=false"]
    for interface, address in (("http", http), ("grpc", grpc), ("metrics", metrics)):
        host, port = address.split(":")
        command += [f"--{interface}-address={host}", f"--{interface}-port={port}"]
    variables = {
        **os.environ,
        "PATH": f"{venv / 'bin'}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": str(_site(venv) / "nvidia_pytriton.libs"),
        "EXCISE_TEST_LINKS": str(links.parent),
    }
    log = folder / "triton.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*command, *options], stdout=stream, stderr=subprocess.STDOUT, env=variables, cwd=folder
        )
    server = Triton(models, log, process, http, grpc, metrics)
    try:
        _wait(server)
        yield server
    finally:
        server.stop()


def _wait(server: Triton) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            if server.get("/v2/health/ready").is_success:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise RuntimeError(f"tritonserver didn't start: {server.said()[-2000:]}")


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()
