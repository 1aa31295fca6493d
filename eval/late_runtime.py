"""A runtime whose model is loaded when its first image is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from excise.eval.runtime_spec import RuntimeSpec
from excise.serve.runtime import Request, Runtime


@dataclass
class LateRuntime:
    """A runtime that is opened for its first image: a run that has all of them needs no model."""

    spec: RuntimeSpec
    open: Callable[[RuntimeSpec], Runtime]
    say: Callable[[str], None] = lambda message: None
    name: str = field(init=False)
    _runtime: Runtime | None = None

    def __post_init__(self) -> None:
        self.name = self.spec.name

    @property
    def opened(self) -> Runtime:
        """The runtime, loaded."""
        if self._runtime is None:
            self.say(f"loading {self.name}: {self.spec}")
            self._runtime = self.open(self.spec)
        return self._runtime

    def generate(self, requests: Sequence[Request], **options: Any) -> npt.NDArray[np.uint8]:
        """As the runtime."""
        return self.opened.generate(requests, **options)

    def close(self) -> None:
        """Let its memory go; the next image opens it again."""
        self._runtime = None
