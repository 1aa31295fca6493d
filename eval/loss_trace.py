"""The losses of a search, thinned to what a file should hold."""

from __future__ import annotations

import math

from excise.errors import NumericsError


class LossTrace:
    """Means of consecutive iterations, all of one number of them but the last.

    Args:
        iterations: how many there will be at most.
        limit: the most values to keep.
    """

    def __init__(self, iterations: int, *, limit: int = 200) -> None:
        self._iterations, self._each = iterations, max(1, math.ceil(iterations / limit))
        self._means: list[float] = []
        self._count = 0
        self.last = math.nan  #: the loss of the last iteration

    def add(self, loss: float) -> None:
        """Take the next iteration's loss.

        Raises:
            NumericsError: it isn't finite.
        """
        place = self._count % self._each
        self._count += 1
        if not math.isfinite(loss):
            raise NumericsError(
                f"the loss is {loss} at iteration {self._count} of {self._iterations}: "
                "attack the model in float32 (?dtype=float32), or lower the learning rate"
            )
        self.last = loss
        if place == 0:
            self._means.append(loss)
        else:
            self._means[-1] += (loss - self._means[-1]) / (place + 1)

    @property
    def iterations(self) -> int:
        """How many losses were taken."""
        return self._count

    @property
    def values(self) -> tuple[float, ...]:
        """The means so far."""
        return tuple(self._means)
