"""A canary that is run again and again while a model is served."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from excise.serve.canary import CanaryResult

#: Of a canary that broke off by an error that isn't excise's: it is no proof any more.
BROKE = "the canary broke off: {error}"


class CanaryWatch:
    """Runs a canary when it is due, in a thread of its own or where it is told to.

    ``run`` is the canary; ``interval`` the seconds from the end of one run to the next, 0 for never again;
    ``on_result`` is told each result. ``result`` is the last one.
    """

    def __init__(
        self,
        run: Callable[[], CanaryResult],
        interval: float,
        *,
        on_result: Callable[[CanaryResult], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run, self._interval, self._on_result, self._clock = run, interval, on_result, clock
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._next = clock()
        self.result: CanaryResult | None = None

    @property
    def due(self) -> bool:
        """Whether it never ran, or ran ``interval`` seconds ago."""
        return self.result is None or (self._interval > 0 and self._clock() >= self._next)

    def check(self) -> CanaryResult:
        """Run it now. An error that isn't excise's is a failure too."""
        try:
            result = self._run()
        except Exception as error:
            result = CanaryResult(False, BROKE.format(error=" ".join(repr(error).split())), None, 0.0, (), 0.0)
        self.result = result
        self._next = self._clock() + self._interval
        if self._on_result is not None:
            self._on_result(result)
        return result

    def start(self) -> None:
        """Run it by a thread whenever it is due, until ``stop``; of an interval of 0 that does nothing."""
        if self._interval > 0:
            self._thread = threading.Thread(target=self._repeat, name="excise-canary", daemon=True)
            self._thread.start()

    def stop(self, timeout: float | None = 10.0) -> None:
        """Run it no more; waits up to ``timeout`` seconds for the run that is under way."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout)

    def _repeat(self) -> None:
        while not self._stop.wait(max(self._next - self._clock(), 0.01)):
            if self.due:
                self.check()
