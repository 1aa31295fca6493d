"""The embedded server on a diffusers model's export: start, overhead, batching, load, clients that leave, and one image
beside Optimum's pipeline and diffusers' own.

    python bench/serving.py [--model DIR] [--onnx DIR] [--parts NAME ...] [--steps N] [--threads N] [--repeat N]
                            [--seconds N] [--minutes N] [--clients N]

*start*       a process from its start until ``/readyz`` says 200 (one image is made before that), and its resident
              memory then; beside it a process that opens the same folder as Optimum's pipeline and makes that image.
*overhead*    an image by HTTP against the same image by the runtime in a process of its own, alternating.
*throughput*  images a second of ``--clients`` that each ask again at once, over those of one such client.
*load*        requests at random instants (Poisson), at 70 % of that throughput: latencies, from the instant at which
              each was due.
*leave*       ``--clients`` for ``--minutes``, of whose requests a third is broken off at a random instant: no other
              may be lost, and afterwards nothing may be left in the engine.
*image*       one image by this runtime, Optimum's pipeline on the same folder, and diffusers' pipeline on PyTorch, in
              processes of their own, taking turns.

MODEL is the bundled one by default, and exported once to a temporary folder unless ``--onnx`` names its export. All
have as many CPU threads. One JSON document on stdout, progress on stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

PARTS = ("start", "overhead", "throughput", "load", "leave", "image")
PROMPT = "a red apple"
#: Beyond any latency here: a request that takes longer is lost.
PATIENCE = 600.0
IMAGES = "/v1/images/generations"


class Server:
    """A process of ``excise serve run``; ``ready_seconds`` is from its start until it is ready."""

    def __init__(self, folder: Path | str, threads: int, *options: str) -> None:
        started = time.perf_counter()
        command = [sys.executable, "-m", "excise", "serve", "run", str(folder), "--port", "0", "--with-base"]
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115 – as long as the server
        self.process = subprocess.Popen(
            [*command, "--threads", str(threads), *options], stderr=self._log, stdout=subprocess.DEVNULL
        )
        self.url = self._address()
        while httpx.get(f"{self.url}/readyz").status_code != 200:
            time.sleep(0.005)
        self.ready_seconds = time.perf_counter() - started

    def _address(self) -> str:
        while self.process.poll() is None:
            for word in Path(self._log.name).read_text().split():
                if word.startswith("http://"):
                    return word
            time.sleep(0.005)
        raise SystemExit(f"the server ended: {Path(self._log.name).read_text()}")

    def load(self) -> dict[str, float]:
        """The engine's counters, from ``/metrics``."""
        lines = httpx.get(f"{self.url}/metrics", timeout=PATIENCE).text.splitlines()
        return {
            line.split()[0]: float(line.split()[1])
            for line in lines
            if line.startswith(("excise_queue", "excise_u", "excise_images_running"))
        }

    def stop(self) -> int:
        """Its exit status after SIGTERM."""
        self.process.terminate()
        status = self.process.wait(PATIENCE)
        self._log.close()
        return status


@contextlib.contextmanager
def serving(folder: Path | str, threads: int, *options: str) -> Iterator[Server]:
    server = Server(folder, threads, *options)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()


class Worker:
    """A process that makes images one after the other: what it runs is the first argument of ``work``."""

    def __init__(self, kind: str, folder: Path, threads: int) -> None:
        started = time.perf_counter()
        command = [sys.executable, __file__, "--worker", kind, str(folder), str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.seconds(2)
        self.ready_seconds = time.perf_counter() - started

    def seconds(self, steps: int, seed: int = 0) -> float:
        """Of one image."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(steps, seed, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(PATIENCE)


def work(kind: str, folder: Path, threads: int) -> None:
    """Read lines of steps and seed, make that image, and write the seconds that it took."""
    if kind == "excise":
        from excise.serve.onnx_runtime import OnnxRuntime
        from excise.serve.runtime import Request

        runtime = OnnxRuntime(folder, threads=threads)

        def image(steps: int, seed: int) -> None:
            runtime.generate([Request(PROMPT, seed=seed)], num_inference_steps=steps)
    else:
        import torch
        from diffusers.utils import logging

        logging.disable_progress_bar()
        torch.set_num_threads(threads)
        if kind == "optimum":
            from onnxruntime import SessionOptions
            from optimum.onnxruntime import ORTStableDiffusionPipeline

            options = SessionOptions()
            options.intra_op_num_threads, options.log_severity_level = threads, 3
            pipeline = ORTStableDiffusionPipeline.from_pretrained(folder, session_options=options)
        else:
            from diffusers import StableDiffusionPipeline

            pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)

        def image(steps: int, seed: int) -> None:
            generator = torch.Generator().manual_seed(seed)
            pipeline(PROMPT, num_inference_steps=steps, generator=generator, output_type="np")

    for line in sys.stdin:
        steps, seed = map(int, line.split())
        started = time.perf_counter()
        image(steps, seed)
        print(time.perf_counter() - started, flush=True)


def resident(process: int) -> float:
    """The resident memory of a process, in MB."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmRSS"))


def cpu_seconds(process: int) -> float:
    """What a process has computed so far: on a busy machine, more telling than the time on the clock."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and number of figures."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return {"median": middle, "lower_quartile": low, "upper_quartile": high, "n": len(values)}


def start(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, dict[str, list[float]]] = {}

    def note(name: str, seconds: float, process: int) -> None:
        figures = found.setdefault(name, {"seconds": [], "cpu_seconds": [], "resident_mb": []})
        figures["seconds"].append(seconds)
        figures["cpu_seconds"].append(cpu_seconds(process))
        figures["resident_mb"].append(resident(process))

    for _ in range(options.repeat):
        for name, served in (("server, bundled model", "demo"), ("server", folder)):
            with serving(served, options.threads) as server:
                note(name, server.ready_seconds, server.process.pid)
        worker = Worker("optimum", folder, options.threads)
        note("Optimum's pipeline", worker.ready_seconds, worker.process.pid)
        worker.stop()
    return {name: {key: summary(values) for key, values in figures.items()} for name, figures in found.items()}


def overhead(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    times: dict[str, list[float]] = {"server": [], "runtime": []}
    worker = Worker("excise", folder, options.threads)
    with serving(folder, options.threads) as server, httpx.Client(base_url=server.url, timeout=PATIENCE) as client:
        for number in range(options.repeat):
            for name in sorted(times, reverse=number % 2 == 0):
                if name == "runtime":
                    times[name].append(worker.seconds(options.steps, number))
                    continue
                began = time.perf_counter()
                client.post(IMAGES, json=asked(options.steps, number)).raise_for_status()
                times[name].append(time.perf_counter() - began)
    worker.stop()
    ratios = [a / b - 1 for a, b in zip(times["server"], times["runtime"], strict=True)]
    return {**{name: summary(values) for name, values in times.items()}, "relative_overhead": summary(ratios)}


def asked(steps: int, seed: int) -> dict[str, Any]:
    return {"prompt": PROMPT, "num_inference_steps": steps, "seed": seed}


async def closed_loop(url: str, clients: int, seconds: float, steps: int) -> float:
    """Images a second of clients that ask again as soon as they have theirs."""
    finished: list[float] = []
    began = time.perf_counter()

    async def client(http: httpx.AsyncClient, number: int) -> None:
        while time.perf_counter() - began < seconds:
            (await http.post(IMAGES, json=asked(steps, number))).raise_for_status()
            finished.append(time.perf_counter())

    async with session(url) as http:
        await asyncio.gather(*(client(http, number) for number in range(clients)))
    return len(finished) / (max(finished) - began)


def session(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=httpx.Limits(max_connections=None))


def throughput(server: Server, options: argparse.Namespace) -> dict[str, float]:
    alone = asyncio.run(closed_loop(server.url, 1, options.seconds, options.steps))
    before = server.load()
    together = asyncio.run(closed_loop(server.url, options.clients, options.seconds, options.steps))
    after = server.load()
    images, calls = (after[name] - before[name] for name in ("excise_unet_images_total", "excise_unet_calls_total"))
    return {
        "clients": options.clients,
        "images_per_second_of_one": alone,
        "images_per_second_of_all": together,
        "ratio": together / alone,
        "mean_batch": images / calls,
    }


async def open_loop(url: str, rate: float, seconds: float, steps: int) -> dict[str, Any]:
    """Latencies in seconds of requests at random instants, each from when it was due."""
    chance, due, instants = random.Random(0), 0.0, []
    while (due := due + chance.expovariate(rate)) < seconds:
        instants.append(due)
    began = time.perf_counter()

    async def client(http: httpx.AsyncClient, due: float, seed: int) -> tuple[int, float]:
        await asyncio.sleep(due - (time.perf_counter() - began))
        response = await http.post(IMAGES, json=asked(steps, seed))
        return response.status_code, time.perf_counter() - began - due

    async with session(url) as http:
        answers = await asyncio.gather(*(client(http, due, seed) for seed, due in enumerate(instants)))
    latencies = sorted(latency for status, latency in answers if status == 200)
    percentile = {f"p{p}": latencies[min(len(latencies) - 1, int(len(latencies) * p / 100))] for p in (50, 95, 99)}
    refused = sum(status == 429 for status, _ in answers)
    return {
        "rate": rate,
        "requests": len(answers),
        "refused": refused,
        "failed": len(answers) - len(latencies) - refused,
        **percentile,
    }


async def leaving(url: str, clients: int, seconds: float, steps: int) -> dict[str, int]:
    """Outcomes of requests of which a third is broken off: an image, refused as the queue was full, left, or lost."""
    outcomes = dict.fromkeys(("image", "refused", "left", "lost"), 0)
    began = time.perf_counter()

    async def client(http: httpx.AsyncClient, number: int) -> None:
        chance = random.Random(number)
        while time.perf_counter() - began < seconds:
            leaves = chance.random() < 1 / 3
            patience = chance.expovariate(0.5) if leaves else PATIENCE
            request = http.post(IMAGES, json=asked(chance.choice((steps, 2 * steps)), chance.randrange(1000)))
            try:
                response = await asyncio.wait_for(request, patience)
            except TimeoutError:
                outcomes["left" if leaves else "lost"] += 1
            except httpx.HTTPError:
                outcomes["lost"] += 1
            else:
                outcomes[{200: "image", 429: "refused"}.get(response.status_code, "lost")] += 1

    async with session(url) as http:
        await asyncio.gather(*(client(http, number) for number in range(clients)))
    return outcomes


def leave(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    seconds = 60 * options.minutes
    outcomes: dict[str, Any] = dict(asyncio.run(leaving(server.url, options.clients, seconds, options.steps)))
    until = time.perf_counter() + PATIENCE
    left = {"excise_queue_waiting": 1.0}
    while any(left.values()) and time.perf_counter() < until:
        time.sleep(0.1)  # what the last ones left is noticed between two steps
        left = {name: server.load()[name] for name in ("excise_queue_waiting", "excise_images_running")}
    return {"minutes": options.minutes, **outcomes, "left_in_the_engine": sum(left.values())}


def image(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    places = {"excise": folder, "optimum": folder, "diffusers": options.model}
    workers = {kind: Worker(kind, place, options.threads) for kind, place in places.items()}
    times: dict[str, list[float]] = {kind: [] for kind in workers}
    for number in range(options.repeat):
        for kind in list(workers)[:: 1 if number % 2 == 0 else -1]:
            times[kind].append(workers[kind].seconds(options.steps, number))
    for worker in workers.values():
        worker.stop()
    ratios = {
        f"{kind}_over_excise": summary([a / b for a, b in zip(times[kind], times["excise"], strict=True)])
        for kind in ("optimum", "diffusers")
    }
    return {"seconds": {kind: summary(values) for kind, values in times.items()}, **ratios}


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The document that is printed."""
    document: dict[str, Any] = {
        "cpu": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": options.threads,
        "steps": options.steps,
        "versions": {
            name: importlib.metadata.version(name) for name in ("onnxruntime", "optimum", "diffusers", "torch")
        },
    }
    for name, part in (("start", start), ("overhead", overhead), ("image", image)):
        if name in options.parts:
            say(name)
            document[name] = part(folder, options)
    if {"throughput", "load", "leave"} & set(options.parts):
        with serving(folder, options.threads, "--queue", "256", "--max-steps", str(2 * options.steps)) as server:
            if {"throughput", "load"} & set(options.parts):
                say("throughput")
                document["throughput"] = throughput(server, options)
            if "load" in options.parts:
                say("load")
                rate = 0.7 * document["throughput"]["images_per_second_of_all"]
                document["load"] = asyncio.run(open_loop(server.url, rate, options.seconds, options.steps))
            if "leave" in options.parts:
                say("leave")
                document["leave"] = leave(server, options)
            document["exit_status"] = server.stop()
    return document


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
        return
    from excise.demo import MODEL

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--model", type=Path, default=MODEL, help="a diffusers folder (the bundled model)")
    parser.add_argument("--onnx", type=Path, help="its export, as excise export writes it")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (all)")
    parser.add_argument("--steps", type=int, default=25, metavar="N", help="denoising steps of an image (25)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="(all cores)")
    parser.add_argument("--repeat", type=int, default=10, metavar="N", help="of start, overhead and image (10)")
    parser.add_argument("--seconds", type=float, default=60, metavar="N", help="of throughput and load, each (60)")
    parser.add_argument("--minutes", type=float, default=10, metavar="N", help="of leave (10)")
    parser.add_argument("--clients", type=int, default=16, metavar="N", help="of throughput and leave (16)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = options.onnx
        if folder is None:
            say("export")
            folder = Path(place, "onnx")
            command = [sys.executable, "-m", "excise", "export", str(options.model), "--out", str(folder)]
            subprocess.run(command, check=True, stdout=sys.stderr)
        print(json.dumps(measure(folder, options), indent=2))


if __name__ == "__main__":
    main()
