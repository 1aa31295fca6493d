"""Whether one output of a served model is near enough to the reference's, as a pure function.

With A the reference, B what is to be served and O the unedited model, an output passes where

    ‖B − A‖ ≤ max(max_to_move ‖A − O‖, max_relative ‖A‖)

The first decides wherever the edit moved the output far; the second is what rounding takes, moved or not. An output
that the edit moved by less than that, ‖A − O‖ < max_relative ‖A‖, counts as not moved. An output that isn't finite
never passes.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from excise.errors import NumericsError, UsageError
from excise.eval.verification_measures import OUTPUTS, not_finite, shown
from excise.eval.verification_sides import Rounding
from excise.parity import deviation, parity
from excise.serve.noise_schedule import Array


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class Limits(_Frozen):
    """Tolerances of one kind of output: relative to the distance that the edit moved it, and to its own norm."""

    max_to_move: float = Field(gt=0, le=1)
    max_relative: float = Field(gt=0, le=1)


class Thresholds(_Frozen):
    """Tolerances of single components, and of the whole loop, in which guidance multiplies a component's error."""

    component: Limits
    loop: Limits


def _thresholds(component: tuple[float, float], loop: tuple[float, float]) -> Thresholds:
    of = [Limits(max_to_move=to_move, max_relative=relative) for to_move, relative in (component, loop)]
    return Thresholds(component=of[0], loop=of[1])


# What the bundled demo model measured, at most, over 9 prompts, 5 timesteps and 20 steps with guidance 7.5, against
# PyTorch in float32:
#
#                                      component                   loop
#                                  to move   relative       to move   relative
#   ONNX float32, CPU              1.6e-5     9.0e-7         2.6e-5     2.0e-5
#   ONNX float16, CPU              5.3e-3     1.3e-3         2.2e-2     1.7e-2
#   torch float16, CPU (10 steps)  7.4e-3     1.8e-3         1.7e-2     1.3e-2
#   torch bfloat16, CPU            6.4e-2     1.7e-2         1.6e-1     1.2e-1
#
# ("to move" where that decides). Of its 14 edited matrices, the one that matters least (the middle block's keys) left
# unedited costs 4.8e-3 (erased) and 1.9e-2 (neutral) to move in the denoiser, each other one 2.8e-2 or more (neutral).
# So float32 shows any single one; in half precision that one is lost in rounding, and in bfloat16 only a wrong layer
# that matters is seen. The loop multiplies a component's error, most where the edit moves it to another picture.
DEFAULTS: dict[Rounding, Thresholds] = {
    "float32": _thresholds((2e-3, 2e-5), (5e-3, 1e-3)),
    "half": _thresholds((2e-2, 4e-3), (1e-1, 5e-2)),
    "bfloat16": _thresholds((2e-1, 5e-2), (5e-1, 3e-1)),
}


def adjusted(
    thresholds: Thresholds, *, max_to_move: float | None = None, max_relative: float | None = None
) -> Thresholds:
    """Tolerances with one or both figures replaced, for components and the loop alike.

    Raises:
        UsageError: A figure that isn't above 0 and at most 1.
    """
    for name, value in (("--max-to-move", max_to_move), ("--max-relative", max_relative)):
        if value is not None and not 0 < value <= 1:
            raise UsageError(f"{name} {value}: give a number above 0, up to 1")
    given = {"max_to_move": max_to_move, "max_relative": max_relative}
    update = {name: value for name, value in given.items() if value is not None}
    return Thresholds(
        component=thresholds.component.model_copy(update=update), loop=thresholds.loop.model_copy(update=update)
    )


class Row(_Frozen):
    """One output on one group of prompts.

    Attributes:
        output, group: The output, and the prompts.
        at: The denoiser's timestep, or the step of the loop, from 1.
        max_abs: Largest |B − A|.
        relative: ‖B − A‖ / ‖A‖, Frobenius.
        cosine: Of A and B.
        moved: ‖A − O‖ / ‖A‖: how far the edit moved the output.
        to_move: ‖B − A‖ / ‖A − O‖; None where the edit doesn't move the output.
        decided_by: Whether ``to_move`` or ``relative`` decides.
        limit: The tolerance of that one.
        passed: The verdict.
        reason: Why it failed.
    """

    output: str
    group: str
    at: int | None
    max_abs: float | None = None
    relative: float | None = None
    cosine: float | None = None
    moved: float
    to_move: float | None = None
    decided_by: Literal["to_move", "relative"]
    limit: float
    passed: bool
    reason: str = ""

    @property
    def used(self) -> float:
        """The deciding figure as a share of its limit: above 1 fails; infinite if B isn't finite."""
        figure = self.to_move if self.decided_by == "to_move" else self.relative
        return float("inf") if figure is None else figure / self.limit


def judge_output(key: tuple[str, str, int | None], base: Array, a: Array, b: Array, thresholds: Thresholds) -> Row:
    """The figures and the verdict of one output, from arrays of equal shape; ``base`` and ``a`` are finite.

    Raises:
        UsageError: The shapes differ: they aren't outputs of one model.
        NumericsError: The reference is all zeros.
    """
    if not base.shape == a.shape == b.shape:
        raise UsageError(f"{shown(key)}: base, A and B give {base.shape}, {a.shape} and {b.shape}: other models")
    limits: Limits = getattr(thresholds, OUTPUTS[key[0]])
    try:
        moved = deviation(a, base).relative
        error = None if not_finite(b) else deviation(a, b)
    except NumericsError as problem:
        raise NumericsError(f"{shown(key)}: {problem}") from problem
    far = limits.max_to_move * moved >= limits.max_relative
    row = Row(
        output=key[0],
        group=key[1],
        at=key[2],
        moved=moved,
        decided_by="to_move" if far else "relative",
        limit=limits.max_to_move if far else limits.max_relative,
        passed=False,
        reason=f"{not_finite(b)} of {b.size} values of B aren't finite",
    )
    if error is None:
        return row
    to_move = parity(base, a, b).relative if moved >= limits.max_relative else None
    row = row.model_copy(update={**dataclasses.asdict(error), "to_move": to_move, "reason": ""})
    if row.used <= 1:
        return row.model_copy(update={"passed": True})
    what = "the edit's move" if far else "its norm"
    return row.model_copy(
        update={"reason": f"B is off by {row.used * row.limit:.2g} times {what}, and may be by {row.limit:g}"}
    )


def moves(key: tuple[str, str, int | None], base: Array, a: Array, thresholds: Thresholds) -> bool:
    """Whether the edit moves an output by more than its tolerance, so that a lost edit is seen in it."""
    limits: Limits = getattr(thresholds, OUTPUTS[key[0]])
    return deviation(a, base).relative > limits.max_relative
