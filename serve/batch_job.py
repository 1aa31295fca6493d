"""A request from its submission to its image: what the batching engine knows of it."""

from __future__ import annotations

import logging
from concurrent.futures import Future

from excise.errors import DeadlineExceeded, ExciseError
from excise.serve.engine import Image, ImageRequest, OnJobStep
from excise.serve.serving_runtime import ServingRuntime

_log = logging.getLogger(__name__)


class BatchJob:
    """One image that is waiting for a batch or in one. ``submitted`` is in seconds of the engine's clock."""

    def __init__(
        self, request: ImageRequest, runtime: ServingRuntime, submitted: float, on_step: OnJobStep | None
    ) -> None:
        self.request, self.runtime, self.submitted = request, runtime, submitted
        self.future: Future[Image] = Future()
        #: A batch that it was in failed, perhaps because of it: it isn't put beside others again.
        self.alone = False
        self._on_step = on_step

    def cancel(self) -> None:
        """Nobody waits for it any more: what isn't denoised yet won't be. Of a finished job it does nothing."""
        self.future.cancel()

    def fits(self, other: BatchJob) -> bool:
        """Whether both can be rows of one batch: the UNet takes one timestep for all of its rows."""
        if self is other:
            return True
        steps = self.request.num_inference_steps
        same = self.runtime is other.runtime and steps == other.request.num_inference_steps
        return same and not self.alone and not other.alone

    def over(self, now: float) -> bool:
        """Whether nobody waits for the image any more, or it would come too late."""
        deadline = self.request.deadline
        return self.future.cancelled() or (deadline is not None and now >= self.submitted + deadline)

    def too_late(self, progress: str) -> DeadlineExceeded:
        """The error of a job whose deadline passed; ``progress`` is how far it was."""
        return DeadlineExceeded(
            f"the image wasn't ready {self.request.deadline or 0:g} s after it was asked for ({progress}): give it "
            "more time, or ask for fewer steps"
        )

    def report(self, done: int, total: int) -> None:
        """Tell whoever asked for it how far it is; an error there is logged and the image is made all the same."""
        if self._on_step is None:
            return
        try:
            self._on_step(done, total)
        except Exception:
            self._on_step = None
            _log.exception("a request's progress can't be reported, and isn't any more")

    def finish(self, outcome: Image | ExciseError) -> None:
        """Hand the image or the error over, unless the job was cancelled. To be called once."""
        # a future that is still pending can be cancelled at any instant; from here on it can't
        if not self.future.set_running_or_notify_cancel():
            return
        if isinstance(outcome, ExciseError):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)
