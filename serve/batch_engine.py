"""The embedded server's engine: requests that fit are denoised together, each image the same as alone.

One thread makes the images. When it is free it takes the request that waits longest, and with it, in their order,
those that fit: the same number of steps (the UNet takes one timestep for all rows) and the same runtime. Prompts,
seeds, guidance scales and edits of a bank differ from row to row. Nobody joins a batch that is under way, since its
timestep is another; rows leave it between two steps, when their client is gone or their deadline has passed.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType

import numpy as np

from excise.errors import ArtefactError, Draining, ExciseError, QueueFull, UsageError
from excise.serve.batch_job import BatchJob
from excise.serve.denoising import check_requests
from excise.serve.engine import Failures, Image, ImageRequest, Load, OnJobStep, Served, failure_reason
from excise.serve.serving_runtime import ServingRuntime, Steps

#: Larger scales end in overflows: the picture would be the client's mistake, and the error the server's.
LARGEST_GUIDANCE_SCALE = 1000.0
#: Weight of the newest step in the running mean of a step's seconds.
_NEWEST = 0.2
_WAITED = "it waited for a batch"

_log = logging.getLogger(__name__)


class BatchEngine:
    """An ``Engine`` on one runtime or several.

    Args:
        runtimes: which one makes a request's image, by the request's ``edit``; no other edits are taken.
        served: what they serve, as clients are told.
        max_batch: images that are denoised together, at most.
        max_waiting: requests that wait for a batch, at most; one more is ``QueueFull``.
        batch_delay: how many seconds a request waits, at most, for others to fill its batch up.
        clock: seconds that never go back.

    Raises:
        UsageError: an option can't be used.
    """

    def __init__(
        self,
        runtimes: Mapping[str | None, ServingRuntime],
        served: Served,
        *,
        max_batch: int = 8,
        max_waiting: int = 64,
        batch_delay: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for option, value in (("max_batch", max_batch), ("max_waiting", max_waiting)):
            if value < 1:
                raise UsageError(f"{option}={value}: give an integer from 1")
        if not (0 <= batch_delay < math.inf):
            raise UsageError(f"batch_delay={batch_delay}: give a number of seconds from 0")
        self._runtimes, self._served = dict(runtimes), served
        self._max_batch, self._max_waiting, self._batch_delay, self._clock = max_batch, max_waiting, batch_delay, clock
        #: Guards everything below; notified whenever something of it changes that a thread may wait for.
        self._changed = threading.Condition()
        self._waiting: deque[BatchJob] = deque()
        self._running: list[BatchJob] = []
        self._unsettled = 0  # jobs whose futures aren't finished
        self._draining = self._closed = False
        self._steps, self._batched, self._seconds = 0, 0, 0.0
        self._failed = Counter[str]()  # by the names in ``Failures``
        self._step_seconds, self._steps_left = 0.0, 0
        self._thread = threading.Thread(target=self._work, name="excise-engine", daemon=True)
        self._thread.start()

    @property
    def served(self) -> Served:
        """What it serves."""
        return self._served

    @property
    def load(self) -> Load:
        """How busy it is now; requests that were cancelled while they waited don't count."""
        with self._changed:
            waiting = sum(not job.future.cancelled() for job in self._waiting)
            failed = Failures(**self._failed)
            return Load(waiting, len(self._running), self._steps, self._batched, self._seconds, failed)

    def submit(self, request: ImageRequest, *, on_step: OnJobStep | None = None) -> BatchJob:
        """Queue one image; from any thread, returns at once.

        ``on_step`` starts from 1 again if the batch fails and the image is tried once more, by itself.

        Raises:
            QueueFull: as many are waiting as may.
            Draining: ``drain`` or ``close`` was called.
            UsageError: the prompt is too long, or a value can't be used: the queue takes only what can be made.
        """
        job = BatchJob(request, self._check(request), self._clock(), on_step)
        self._sweep()
        with self._changed:
            if self._draining:
                raise Draining("the server is shutting down and takes no more requests: ask another one")
            if len(self._waiting) >= self._max_waiting:
                raise QueueFull(len(self._waiting), self._retry_after())
            self._waiting.append(job)
            self._unsettled += 1
            self._changed.notify_all()
        return job

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more, finish what was taken; False if that isn't done after ``timeout`` seconds."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: self._unsettled == 0, timeout)

    def close(self) -> None:
        """Stop the engine's thread after the step that it is at; what is unfinished gets ``Draining``."""
        with self._changed:
            self._closed = self._draining = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> BatchEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _check(self, request: ImageRequest) -> ServingRuntime:
        """The runtime that makes the image. Raises ``UsageError`` for what can't be made."""
        asked, deadline = request.request, request.deadline
        if asked.edit not in self._runtimes:
            named = "no edit is named" if asked.edit is None else f"edit={asked.edit[:64]!r} isn't served"
            raise UsageError(f"{named}: choose one of {', '.join(edit.name for edit in self._served.edits)}")
        runtime = self._runtimes[asked.edit]
        try:
            scale = float(request.guidance_scale)
        except OverflowError:
            scale = math.inf
        check_requests([asked], scale)
        if abs(scale) > LARGEST_GUIDANCE_SCALE:
            raise UsageError(f"guidance_scale={scale:g}: give at most {LARGEST_GUIDANCE_SCALE:g}")
        if deadline is not None and not deadline > 0:
            raise UsageError(f"deadline={deadline:g}: give a positive number of seconds")
        runtime.scheduler.start(request.num_inference_steps)
        runtime.guidance.start(np.array([scale], np.float32))
        runtime.tokenizer.encode([asked.prompt, asked.negative_prompt])
        return runtime

    def _retry_after(self) -> float:
        """Seconds until places become free: when the batch that is under way is done, and another one is taken."""
        return max(1.0, self._steps_left * self._step_seconds)

    def _sweep(self) -> None:
        """Let those of the waiting go whose images nobody waits for any more."""
        now = self._clock()
        with self._changed:
            gone = [job for job in self._waiting if job.over(now)]
            for job in gone:
                self._waiting.remove(job)
        self._settle((job, job.too_late(_WAITED)) for job in gone)

    def _settle(self, outcomes: Iterable[tuple[BatchJob, Image | ExciseError]]) -> None:
        """Finish jobs that are neither waiting nor running any more. Callbacks run here, so the lock isn't held."""
        settled, failed = 0, Counter[str]()
        for job, outcome in outcomes:
            job.finish(outcome)
            settled += 1
            if (reason := failure_reason(job, outcome)) is not None:
                failed[reason] += 1
        if settled:
            with self._changed:
                self._unsettled -= settled
                self._failed += failed
                self._changed.notify_all()

    # What follows runs in the engine's thread.

    def _work(self) -> None:
        try:
            while batch := self._next():
                self._make(batch)
        finally:
            # However it ended: nobody may wait for an image that nobody makes.
            with self._changed:
                self._closed = self._draining = True
                left = [*self._running, *self._waiting]
                self._running = []
                self._waiting.clear()
            self._settle((job, _stopped()) for job in left)

    def _next(self) -> list[BatchJob]:
        """The next batch, once there is one; nothing when the engine is closed."""
        while True:
            self._sweep()
            with self._changed:
                if self._closed:
                    return []
                if not self._waiting:
                    self._changed.wait()
                    continue
                oldest = self._waiting[0]
                batch = [job for job in self._waiting if job.fits(oldest)][: self._max_batch]
                delay = oldest.submitted + self._batch_delay - self._clock()
                if delay > 0 and len(batch) < self._max_batch and not oldest.alone and not self._draining:
                    self._changed.wait(delay)
                    continue
                for job in batch:
                    self._waiting.remove(job)
                self._running = batch
                return batch

    def _make(self, batch: list[BatchJob]) -> None:
        """The images of a batch, or an error for each of its jobs; whatever happens, the engine lives on."""
        try:
            self._denoise(batch)
        except Exception as error:
            with self._changed:
                failed, self._running = self._running, []
                retried = failed if len(batch) > 1 else []
                for job in reversed(retried):
                    job.alone = True
                    self._waiting.appendleft(job)
            if retried:
                _log.warning("a batch of %d failed, each of them is tried alone", len(batch), exc_info=error)
            elif isinstance(error, ExciseError):
                _log.error("an image failed: %s", error)
                self._settle((job, error) for job in failed)
            else:
                _log.error("an image failed", exc_info=error)
                self._settle((job, _foreign(error)) for job in failed)
        with self._changed:
            self._steps_left = 0

    def _denoise(self, batch: list[BatchJob]) -> None:
        if not self._stay(None):
            return
        jobs = self._running
        denoising = jobs[0].runtime.start(
            [job.request.request for job in jobs],
            num_inference_steps=jobs[0].request.num_inference_steps,
            guidance_scale=[float(job.request.guidance_scale) for job in jobs],
        )
        while denoising.done < denoising.total:
            if not self._stay(denoising):
                return
            started = self._clock()
            denoising.step()
            self._count(denoising, self._clock() - started)
            for job in self._running:
                job.report(denoising.done, denoising.total)
        if not self._stay(denoising):
            return
        images = jobs[0].runtime.decode(denoising.latents)
        made = list(zip(self._running, images, strict=True))
        with self._changed:
            self._running = []
        self._settle(made)

    def _stay(self, denoising: Steps | None) -> bool:
        """Whether any go on, once those left whose images nobody waits for any more. Looks after the waiting, too."""
        self._sweep()
        now = self._clock()
        with self._changed:
            places = [] if self._closed else [n for n, job in enumerate(self._running) if not job.over(now)]
            staying = [self._running[place] for place in places]
            gone = [job for job in self._running if job not in staying]
            self._running, closed = staying, self._closed
        if gone:
            done = f"{denoising.done} of {denoising.total} steps were done" if denoising is not None else _WAITED
            self._settle((job, _stopped() if closed else job.too_late(done)) for job in gone)
            if denoising is not None and staying:
                denoising.keep(places)
        return bool(staying)

    def _count(self, denoising: Steps, seconds: float) -> None:
        with self._changed:
            newest = _NEWEST if self._steps else 1.0
            self._step_seconds += newest * (seconds - self._step_seconds)
            self._steps_left = denoising.total - denoising.done
            self._steps += 1
            self._batched += len(self._running)
            self._seconds += seconds


def _stopped() -> Draining:
    return Draining("the server was stopped before the image was finished: ask again")


def _foreign(error: Exception) -> ArtefactError:
    """An error that isn't excise's own, as one that is: whoever waits for the future gets no other."""
    wrapped = ArtefactError(f"the model failed with {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    wrapped.__cause__ = error
    return wrapped
