"""The batching engine: who is batched with whom, who leaves, and that an image is the same as alone.

The order of events is the test's: a fake runtime stops before every step until it is let go on. Nothing sleeps.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from excise.editfile import Edit
from excise.errors import ArtefactError, DeadlineExceeded, Draining, PromptTooLong, QueueFull, UsageError
from excise.serve.batch_engine import BatchEngine
from excise.serve.batch_job import BatchJob
from excise.serve.engine import Engine, Failures, ImageRequest, Job, Load, OnJobStep
from excise.serve.onnx_runtime import OnnxRuntime
from excise.serve.runtime import Request
from excise.serve.schedulers import scheduler_from_config
from tests.serve.fake_runtime import EDIT, PATIENCE, SERVED, FakeRuntime

STEPS = 3


class Clock:
    """Goes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def runtime() -> FakeRuntime:
    return FakeRuntime()


@pytest.fixture
def engine(runtime: FakeRuntime, clock: Clock) -> Iterator[BatchEngine]:
    with BatchEngine({EDIT: runtime, None: runtime}, SERVED, max_batch=3, max_waiting=4, clock=clock) as engine:
        yield engine
        runtime.go(1000)  # whatever a failing test left at a step


def ask(
    engine: BatchEngine,
    seed: int,
    *,
    steps: int = STEPS,
    deadline: float | None = None,
    on_step: OnJobStep | None = None,
) -> BatchJob:
    return engine.submit(ImageRequest(Request("a gun", seed=seed), steps, 5.0, deadline), on_step=on_step)


def seed_of(job: Job) -> int:
    return int(job.future.result(PATIENCE).flat[0])


def test_who_waits_is_batched_oldest_first(engine: BatchEngine, runtime: FakeRuntime) -> None:
    jobs = [ask(engine, 0)]
    assert runtime.at_step() == [0]
    jobs += [ask(engine, seed) for seed in (1, 2, 3, 4)]
    assert engine.load == Load(waiting=4, running=1, steps=0, batched=0, seconds=0.0)
    runtime.go(1000)
    assert [seed_of(job) for job in jobs] == [0, 1, 2, 3, 4]
    assert runtime.batches == [[0], [1, 2, 3], [4]]
    assert engine.drain(PATIENCE)
    assert engine.load == Load(waiting=0, running=0, steps=9, batched=15, seconds=0.0)


def test_other_steps_are_another_batch_and_nobody_starves(engine: BatchEngine, runtime: FakeRuntime) -> None:
    first = ask(engine, 0, steps=1)
    runtime.at_step()
    jobs = [ask(engine, 1, steps=5), ask(engine, 2), ask(engine, 3, steps=5), ask(engine, 4)]
    runtime.go()
    assert seed_of(first) == 0
    assert runtime.at_step() == [1, 3]  # the oldest decides, 2 and 4 wait
    late = ask(engine, 5, steps=5)
    runtime.go(1000)
    assert [seed_of(job) for job in (*jobs, late)] == [1, 2, 3, 4, 5]
    assert runtime.batches == [[0], [1, 3], [2, 4], [5]]  # 5 would have fitted 1 and 3, but came when they had begun


def test_another_runtime_is_another_batch() -> None:
    one, other = FakeRuntime(), FakeRuntime(stops=False)
    with BatchEngine({EDIT: one, None: other}, SERVED) as engine:
        jobs = [engine.submit(ImageRequest(Request("", seed=0, edit=EDIT), 1, 5.0))]
        one.at_step()
        for seed, edit in ((1, None), (2, EDIT), (3, None), (4, EDIT)):
            jobs.append(engine.submit(ImageRequest(Request("", seed=seed, edit=edit), 1, 5.0)))
        one.go(2)
        assert [seed_of(job) for job in jobs] == [0, 1, 2, 3, 4]
    assert one.batches == [[0], [2, 4]]
    assert other.batches == [[1, 3]]


def test_cancelled_while_waiting_is_never_started_and_frees_its_place(
    engine: BatchEngine, runtime: FakeRuntime
) -> None:
    first = ask(engine, 0)
    runtime.at_step()
    jobs = [ask(engine, seed) for seed in (1, 2, 3, 4)]
    with pytest.raises(QueueFull):
        ask(engine, 5)
    jobs[1].cancel()
    jobs[1].cancel()
    with pytest.raises(CancelledError):
        jobs[1].future.result(0)
    assert engine.load.waiting == 3
    jobs.append(ask(engine, 6))
    runtime.go(1000)
    assert [seed_of(job) for job in (first, jobs[0], *jobs[2:])] == [0, 1, 3, 4, 6]
    assert runtime.batches == [[0], [1, 3, 4], [6]]
    jobs[0].cancel()  # finished: nothing happens
    assert seed_of(jobs[0]) == 1


def test_cancelled_while_running_leaves_between_two_steps(engine: BatchEngine, runtime: FakeRuntime) -> None:
    ask(engine, 0, steps=1)
    runtime.at_step()
    jobs = [ask(engine, seed) for seed in (1, 2, 3)]
    runtime.go()
    assert runtime.at_step() == [1, 2, 3]
    jobs[1].cancel()
    assert engine.load.running == 3  # it still is in the UNet
    runtime.go()
    assert runtime.at_step() == [1, 3]
    assert engine.load.running == 2
    runtime.go(1000)
    assert [seed_of(jobs[0]), seed_of(jobs[2])] == [1, 3]
    assert runtime.steps == [[0], [1, 2, 3], [1, 3], [1, 3]]
    assert runtime.decoded == [0, 1, 3]
    assert engine.drain(PATIENCE)
    assert (engine.load.steps, engine.load.batched) == (4, 8)


def test_a_batch_that_nobody_waits_for_stops_at_once(engine: BatchEngine, runtime: FakeRuntime) -> None:
    job = ask(engine, 1, steps=1000)
    runtime.at_step()
    job.cancel()
    other = ask(engine, 2)
    runtime.go(1000)
    assert seed_of(other) == 2
    assert runtime.steps == [[1], [2], [2], [2]]
    assert runtime.decoded == [2]


def test_waiters_of_a_cancelled_job_are_woken(engine: BatchEngine, runtime: FakeRuntime) -> None:
    first = ask(engine, 0)
    runtime.at_step()
    waiting, running = ask(engine, 1), first
    waiting.cancel()
    running.cancel()
    runtime.go()
    done, left = wait([waiting.future, running.future], PATIENCE)
    assert len(done) == 2
    assert not left


def test_an_awaiting_task_that_is_cancelled_cancels_the_job(engine: BatchEngine, runtime: FakeRuntime) -> None:
    job = ask(engine, 1, steps=1000)
    runtime.at_step()

    async def client() -> None:
        task = asyncio.ensure_future(asyncio.wrap_future(job.future))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(client())
    runtime.go(1000)
    assert engine.drain(PATIENCE)
    assert runtime.steps == [[1]]


def test_deadlines_of_the_running_and_of_the_waiting(engine: BatchEngine, runtime: FakeRuntime, clock: Clock) -> None:
    ask(engine, 0, steps=1)
    runtime.at_step()
    jobs = [ask(engine, 1, deadline=5.0), ask(engine, 2, deadline=50.0), ask(engine, 3, steps=9, deadline=5.0)]
    runtime.go()
    assert runtime.at_step() == [1, 2]
    clock.now += 5.0
    runtime.go()
    assert runtime.at_step() == [2]
    with pytest.raises(DeadlineExceeded, match=r"wasn't ready 5 s after .* \(1 of 3 steps were done\): give it more"):
        jobs[0].future.result(0)
    with pytest.raises(DeadlineExceeded, match="it waited for a batch"):
        jobs[2].future.result(0)  # at once, not when its turn comes
    runtime.go(1000)
    assert seed_of(jobs[1]) == 2
    assert runtime.batches == [[0], [1, 2]]


def test_a_full_queue_says_when_to_come_back(engine: BatchEngine, runtime: FakeRuntime, clock: Clock) -> None:
    def slow() -> None:
        clock.now += 2.0

    runtime.on_call = slow
    ask(engine, 0, steps=10)
    runtime.at_step()
    for seed in range(1, 5):
        ask(engine, seed)
    with pytest.raises(QueueFull, match="4 requests are waiting already: try again in 1 s") as unknown:
        ask(engine, 9)
    assert unknown.value.retry_after == 1.0  # nothing is measured yet
    for _ in range(4):
        runtime.go()
        runtime.at_step()
    with pytest.raises(QueueFull) as known:
        ask(engine, 9)
    assert known.value.retry_after == pytest.approx(6 * 2.0)
    assert engine.load.seconds == 8.0
    runtime.go(1000)


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (ImageRequest(Request("a b c d e"), 3, 5.0), PromptTooLong, "too long"),
        (ImageRequest(Request("a", "a b c d e"), 3, 5.0), PromptTooLong, "too long"),
        (ImageRequest(Request("a", seed=-1), 3, 5.0), UsageError, "seed=-1: give an integer"),
        (ImageRequest(Request("a", seed=2**63), 3, 5.0), UsageError, "seed="),
        (ImageRequest(Request("a", index=-1), 3, 5.0), UsageError, "index=-1"),
        (ImageRequest(Request("a"), 3, float("nan")), UsageError, "guidance_scale=nan"),
        (ImageRequest(Request("a"), 3, 10**400), UsageError, "guidance_scale=inf"),
        (ImageRequest(Request("a"), 3, 1e38), UsageError, "guidance_scale=1e\\+38: give at most 1000"),
        (ImageRequest(Request("a"), 0, 5.0), UsageError, "0 inference steps: this model takes 1 to 1000"),
        (ImageRequest(Request("a"), 1001, 5.0), UsageError, "1001 inference steps"),
        (ImageRequest(Request("a"), True, 5.0), UsageError, "True inference steps"),
        (ImageRequest(Request("a", edit="none"), 3, 5.0), UsageError, "edit='none' isn't served: choose one of gun,"),
        (ImageRequest(Request("a"), 3, 5.0, deadline=0.0), UsageError, "deadline=0: give a positive"),
        (ImageRequest(Request("a"), 3, 5.0, deadline=float("nan")), UsageError, "deadline=nan"),
    ],
)
def test_the_queue_takes_only_what_can_be_made(
    engine: BatchEngine, request_: ImageRequest, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        engine.submit(request_)
    assert engine.load == Load(0, 0, 0, 0, 0.0)
    assert engine.drain(0)


def test_a_base_that_is_not_served_cannot_be_reached(runtime: FakeRuntime) -> None:
    with BatchEngine({EDIT: runtime}, SERVED) as engine, pytest.raises(UsageError, match="no edit is named: choose"):
        engine.submit(ImageRequest(Request("a"), 3, 5.0))


@pytest.mark.parametrize("options", [{"max_batch": 0}, {"max_waiting": 0}, {"batch_delay": -1.0}])
def test_options_that_cannot_be_used(runtime: FakeRuntime, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(options))}="):
        BatchEngine({None: runtime}, SERVED, **options)


@pytest.mark.parametrize("error", [ArtefactError("the UNet failed"), RuntimeError("out\nof memory")])
def test_a_poisonous_request_fails_alone(
    engine: BatchEngine, runtime: FakeRuntime, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    ask(engine, 0, steps=1)
    runtime.at_step()
    seen: list[tuple[int, int]] = []
    jobs = [ask(engine, 1, on_step=lambda *at: seen.append(at)), ask(engine, 2), ask(engine, 3), ask(engine, 4)]
    runtime.poison[2] = error
    runtime.go(1000)
    assert [seed_of(jobs[n]) for n in (0, 2, 3)] == [1, 3, 4]
    with pytest.raises(ArtefactError, match=r"the UNet failed|the model failed with RuntimeError: out of memory"):
        jobs[1].future.result(PATIENCE)
    assert runtime.batches == [[0], [1, 2, 3], [1], [2], [3], [4]]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert "a batch of 3 failed, each of them is tried alone" in caplog.text
    runtime.poison.clear()
    assert seed_of(ask(engine, 2)) == 2  # it lives on


def test_a_lone_request_that_fails_is_not_tried_again(engine: BatchEngine, runtime: FakeRuntime) -> None:
    runtime.poison[1] = ArtefactError("the UNet failed")
    runtime.go(1000)
    with pytest.raises(ArtefactError, match="the UNet failed"):
        ask(engine, 1).future.result(PATIENCE)
    assert runtime.batches == [[1]]
    assert engine.drain(PATIENCE)
    assert engine.load == Load(0, 0, 0, 0, 0.0, Failures(model_error=1))


def test_images_that_are_not_made_are_counted_once_by_their_reason(
    engine: BatchEngine, runtime: FakeRuntime, clock: Clock
) -> None:
    ask(engine, 0, steps=1)
    runtime.at_step()
    running = [ask(engine, 1), ask(engine, 2, deadline=5.0), ask(engine, 3)]
    runtime.go()
    assert runtime.at_step() == [1, 2, 3]
    assert engine.load.failed == Failures(), "an image that was made is no failure"
    ask(engine, 4, deadline=5.0)  # while it waits
    waiting = ask(engine, 5)
    running[0].cancel()
    waiting.cancel()
    clock.now += 6.0
    runtime.go()
    assert runtime.at_step() == [3]
    runtime.poison[3] = ArtefactError("the UNet failed")
    runtime.go(1000)
    # a batch that fails is no failure of those that can be made alone
    assert engine.drain(PATIENCE)
    assert engine.load.failed == Failures(model_error=1, deadline=2, cancelled=2)
    running[2].cancel()  # finished: nothing happens
    with pytest.raises(Draining):
        ask(engine, 6)  # refused, not taken
    assert engine.load.failed == Failures(model_error=1, deadline=2, cancelled=2)


def test_a_batch_that_fails_counts_only_those_that_fail_alone(engine: BatchEngine, runtime: FakeRuntime) -> None:
    ask(engine, 0, steps=1)
    runtime.at_step()
    for seed in (1, 2, 3):
        ask(engine, seed)
    runtime.poison[2] = RuntimeError("out of memory")
    runtime.go(1000)
    assert engine.drain(PATIENCE)
    assert engine.load.failed == Failures(model_error=1)


def test_what_a_closed_engine_leaves_is_counted(engine: BatchEngine, runtime: FakeRuntime) -> None:
    jobs = [ask(engine, 1)]
    runtime.at_step()
    jobs += [ask(engine, seed) for seed in (2, 3)]
    jobs[1].cancel()
    closing = threading.Thread(target=engine.close)
    closing.start()
    runtime.go(1000)
    closing.join(PATIENCE)
    assert engine.load.failed == Failures(cancelled=1, stopped=2)


def test_images_that_are_missing_are_an_error_and_nobody_waits_for_ever(
    engine: BatchEngine, runtime: FakeRuntime
) -> None:
    ask(engine, 0, steps=1)
    runtime.at_step()
    jobs = [ask(engine, 1), ask(engine, 2)]
    runtime.wrong_count = 1
    runtime.go(1000)
    for job in jobs:
        with pytest.raises(ArtefactError, match="the model failed with ValueError"):
            job.future.result(PATIENCE)
    assert engine.drain(PATIENCE)


def test_progress_is_told_to_each_and_its_errors_harm_nobody(
    engine: BatchEngine, runtime: FakeRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    ask(engine, 0, steps=1)
    runtime.at_step()
    seen: list[tuple[int, int, int]] = []

    def broken(done: int, total: int) -> None:
        raise RuntimeError("the loop is closed")

    jobs = [ask(engine, 1, on_step=broken), ask(engine, 2, on_step=lambda done, total: seen.append((2, done, total)))]
    runtime.go(1000)
    assert [seed_of(job) for job in jobs] == [1, 2]
    assert seen == [(2, 1, 3), (2, 2, 3), (2, 3, 3)]
    assert caplog.text.count("progress can't be reported") == 1


def test_drain_finishes_what_was_taken_and_takes_no_more(engine: BatchEngine, runtime: FakeRuntime) -> None:
    running = ask(engine, 1)
    runtime.at_step()
    waiting = ask(engine, 2)
    assert not engine.drain(0)
    with pytest.raises(Draining, match="shutting down"):
        ask(engine, 3)
    runtime.go(1000)
    assert engine.drain(PATIENCE)
    assert running.future.done()
    assert waiting.future.done()
    assert engine.drain(0)


def test_close_stops_after_the_step_and_tells_everybody(engine: BatchEngine, runtime: FakeRuntime) -> None:
    jobs = [ask(engine, 1)]
    runtime.at_step()
    jobs.append(ask(engine, 2))
    closing = threading.Thread(target=engine.close)
    closing.start()
    while True:  # until close has said so: then nothing more is taken
        try:
            ask(engine, 3, steps=7).cancel()
        except Draining:
            break
        except QueueFull:
            continue
    runtime.go()
    closing.join(PATIENCE)
    assert not closing.is_alive()
    for job in jobs:
        with pytest.raises(Draining, match="stopped before the image was finished"):
            job.future.result(0)
    assert runtime.steps == [[1]]
    engine.close()
    assert engine.drain(0)


def test_a_delay_lets_a_batch_fill_up_and_no_longer(runtime: FakeRuntime, clock: Clock) -> None:
    served: dict[str | None, Any] = {None: runtime}
    with BatchEngine(served, SERVED, max_batch=2, batch_delay=1e6, clock=clock) as engine:
        jobs = [ask(engine, seed) for seed in (1, 2, 3)]
        runtime.go(1000)
        assert [seed_of(job) for job in jobs[:2]] == [1, 2]  # full: it began at once
        assert not jobs[2].future.done()
        assert engine.load.waiting == 1
        assert engine.drain(PATIENCE)  # nobody else can come
        assert seed_of(jobs[2]) == 3
    assert runtime.batches == [[1, 2], [3]]


def test_clients_at_random_lose_nothing() -> None:
    runtime, outcomes, per_client, clients = FakeRuntime(stops=False), [], 60, 6
    runtime.poison[13] = RuntimeError("poison")
    lock = threading.Lock()
    with BatchEngine({None: runtime}, SERVED, max_batch=4, max_waiting=16) as engine:

        def client(number: int) -> None:
            chance, jobs = random.Random(number), []
            for _ in range(per_client):
                seed = chance.randrange(16)
                try:
                    job = ask(engine, seed, steps=chance.choice((1, 2, 5)), deadline=chance.choice((None, 60.0)))
                except QueueFull:
                    with lock:
                        outcomes.append("full")
                    continue
                if chance.random() < 0.4:
                    job.cancel()
                jobs.append((seed, job))
            for seed, job in jobs:
                try:
                    outcome = "image" if seed_of(job) == seed else "another's"
                except CancelledError:
                    outcome = "cancelled"
                except ArtefactError:
                    outcome = "failed" if seed == 13 else "failed for another"
                with lock:
                    outcomes.append(outcome)

        threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert engine.drain(PATIENCE)
        load = engine.load
    assert len(outcomes) == clients * per_client
    assert set(outcomes) <= {"image", "cancelled", "failed", "full"}
    assert outcomes.count("image") > 0
    assert (load.waiting, load.running) == (0, 0)
    assert (load.steps, load.batched) == (len(runtime.steps), sum(map(len, runtime.steps)))


class Recorded:
    """A runtime whose final latents are kept, by the image that is made of them."""

    def __init__(self, runtime: OnnxRuntime) -> None:
        self._runtime = runtime
        self.latents: dict[bytes, Any] = {}
        self.batches: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def start(self, requests: Sequence[Request], **settings: Any) -> Any:
        self.batches.append(len(requests))
        return self._runtime.start(requests, **settings)

    def decode(self, latents: Any) -> Any:
        images = self._runtime.decode(latents)
        self.latents |= {image.tobytes(): latent for image, latent in zip(images, latents, strict=True)}
        return images


PNDM = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "steps_offset": 1, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("scheduler", ["as exported", "PNDM"])
def test_an_image_is_the_same_as_alone(
    exported: Path, edits: tuple[Edit, Edit], tmp_path: Path, scheduler: str
) -> None:
    """Other prompts, seeds, scales and edits beside it, and a neighbour that leaves half-way."""
    from excise.export.bank import add_bank

    folder = Path(shutil.copytree(exported, tmp_path / "bank"))
    (folder / "unet" / "model.onnx").unlink()
    add_bank(exported / "unet" / "model.onnx", folder / "unet" / "model.onnx", edits, with_base=True)
    runtime = OnnxRuntime(folder, threads=1)
    if scheduler == "PNDM":
        runtime.scheduler = scheduler_from_config(PNDM)
    recorded: Any = Recorded(runtime)
    ids: tuple[str | None, ...] = (None, *(edit.id for edit in edits))
    asked = [
        ImageRequest(Request(prompt, negative, seed=seed, edit=ids[seed % 3]), 6, scale)
        for seed, (prompt, negative, scale) in enumerate(
            [("a gun", "", 5.0), ("a red apple", "a gun", 7.5), ("", "", 1.0), ("a cat", "", 3.0), ("a gun", "", 5.0)]
        )
    ]
    with BatchEngine(dict.fromkeys(ids, recorded), SERVED, max_batch=8) as engine:
        begun, go = threading.Event(), threading.Event()

        def hold(done: int, total: int) -> None:
            begun.set()
            assert go.wait(PATIENCE)

        jobs: list[BatchJob] = []

        def leave(done: int, total: int) -> None:
            if done == 2:
                jobs[3].cancel()

        first = engine.submit(ImageRequest(Request("", edit=ids[0]), 1, 5.0), on_step=hold)
        assert begun.wait(PATIENCE)
        jobs += [engine.submit(request, on_step=leave if n == 0 else None) for n, request in enumerate(asked)]
        go.set()
        images = {n: job.future.result(PATIENCE) for n, job in enumerate(jobs) if n != 3}
        with pytest.raises(CancelledError):
            jobs[3].future.result(PATIENCE)
        first.future.result(PATIENCE)
        steps = engine.load
    calls = 6 + (scheduler == "PNDM")
    assert recorded.batches == [1, 5]
    assert steps.batched == 1 + 5 * 2 + 4 * (calls - 2)
    for number, image in images.items():
        alone = runtime.start(
            [asked[number].request], num_inference_steps=6, guidance_scale=asked[number].guidance_scale
        ).run()
        found = recorded.latents[image.tobytes()]
        assert np.abs(found - alone[0]).max() <= 1e-4, number
        assert np.abs(image.astype(int) - runtime.decode(alone)[0]).max() <= 1
    assert np.abs(images[0].astype(int) - images[4]).max() > 1  # the comparison could have failed


def test_it_is_an_engine(engine: BatchEngine) -> None:
    promised: Engine = engine
    assert promised.served is SERVED
