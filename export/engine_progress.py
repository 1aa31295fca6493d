"""Progress of an engine's build, and Ctrl-C during it.

The libraries report phases, each a number of steps of which one may hold further phases. The fraction that is done is
the nested position; phases differ in length, so it says where a build is, not how long it takes.

A ``KeyboardInterrupt`` that is raised in a callback is swallowed by the libraries, and the build goes on: Ctrl-C is
noted, the monitor asks the build to stop, and the interrupt is raised when it has.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from tqdm import tqdm


@dataclass
class _Phase:
    """Where a phase begins and how much of the whole it is, its number of steps, and how many are done."""

    start: float
    length: float
    steps: int
    done: int = 0

    @property
    def place(self) -> float:
        return self.start + self.length * min(self.done, self.steps) / self.steps


class BuildProgress:
    """The fraction of a build that is done, from 0 to 1, never falling; ``stop`` is set to have the build cancelled."""

    def __init__(self) -> None:
        self.fraction = 0.0
        self.stop = threading.Event()
        self._phases: dict[str, _Phase] = {}
        self._lock = threading.Lock()

    def phase_start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins inside the current step of ``parent``; without one it is the whole."""
        with self._lock:
            around = self._phases.get(parent or "")
            start, length = (around.place, around.length / around.steps) if around else (0.0, 1.0)
            self._phases[name] = _Phase(start, length, max(steps, 1))

    def step_complete(self, name: str, step: int) -> bool:
        """Step number ``step`` of a phase is done; whether the build is to go on."""
        with self._lock:
            if name in self._phases:
                phase = self._phases[name]
                phase.done = step + 1
                self.fraction = max(self.fraction, phase.place)
        return not self.stop.is_set()

    def phase_finish(self, name: str) -> None:
        """A phase is over, whether or not all of its steps were told."""
        with self._lock:
            if (phase := self._phases.pop(name, None)) is not None:
                self.fraction = max(self.fraction, phase.start + phase.length)


def monitor(module: Any, progress: BuildProgress, bar: tqdm[Any]) -> Any:
    """The library's own monitor that feeds ``progress`` and draws it on ``bar``, whose total is 1."""

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            progress.phase_start(name, parent, steps)

        def step_complete(self, name: str, step: int) -> bool:
            going_on = progress.step_complete(name, step)
            bar.update(progress.fraction - bar.n)
            return going_on

        def phase_finish(self, name: str) -> None:
            progress.phase_finish(name)
            bar.update(progress.fraction - bar.n)

    return Monitor()


@contextmanager
def interruptible(progress: BuildProgress) -> Iterator[None]:
    """Turn Ctrl-C in the block into ``progress.stop``, and raise ``KeyboardInterrupt`` at its end.

    Python delivers signals to the main thread alone; in another nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, frame: FrameType | None) -> None:
        progress.stop.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
    if progress.stop.is_set():
        raise KeyboardInterrupt
