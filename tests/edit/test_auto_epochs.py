"""When ``auto`` stops: fabricated curves of margin, movement and detected share, with a detector and without one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from excise.edit.auto_epochs import GAIN, MOST, choose, detection_of, helps, stop_rule
from excise.edit.problem import PROBED, Stage
from excise.edit.rece import Epoch
from excise.editmetadata import Detection
from excise.errors import UsageError

DETECTION = Detection(
    detector="fake",
    fingerprint="0" * 64,
    labels=("gun",),
    others=("cat",),
    seeds=(0, 1, 2),
    scheduler="DDIM",
    num_inference_steps=5,
    guidance_scale=7.5,
)


class Curve:
    """A run whose edits are numbers, 0 for UCE's: what each is worth, what it costs, and what is detected after it."""

    def __init__(self, margins: Sequence[float], moved: Sequence[float], shares: Sequence[float] = ()) -> None:
        self.margins, self.moved_by, self.shares = margins, moved, shares
        self.derived, self.judged = 0, 0
        self.certified = [1]
        self.uce: Any = 0

    # What ``choose`` reads of a problem.

    def margin(self, edit: int) -> Any:
        return SimpleNamespace(total=[self.margins[edit]])

    def moved(self, edit: int) -> float:
        return self.moved_by[edit]

    # Of the rounds.

    def __iter__(self) -> Iterator[Epoch]:
        return self

    def __next__(self) -> Epoch:
        self.derived += 1
        edit: Any = self.derived
        return Epoch((torch.full((1, 1), float(edit)),), None, edit, 0.5)

    # Of the probe.

    detection = DETECTION

    def __call__(self, derived: Any, edit: Any, /) -> float:
        # What epoch n derives is judged under the edit before it.
        assert float(derived) == edit + 1
        self.judged += 1
        return self.shares[edit]

    def run(self, epochs: Any = "auto") -> tuple[Stage, ...]:
        anything: Any = self
        return choose(anything, epochs, anything, probe=anything if self.shares else None)


def accepted(stages: Sequence[Stage]) -> int:
    """Epochs that were; only the last may not be."""
    assert [stage.name for stage in stages] == ["uce", *(f"epoch {n}" for n in range(1, len(stages)))]
    assert all(stage.accepted for stage in stages[:-1])
    return sum(stage.accepted for stage in stages) - 1


# Without a detector.


@pytest.mark.parametrize(
    ("margins", "moved", "expected"),
    [
        ([0.1, 0.3, 0.302, 0.9], [0.1, 0.2, 0.3, 0.4], 1),  # a small rise that costs something
        ([0.1, 0.3, 0.302, 0.9], [0.1, 0.2, 0.2, 0.4], 3),  # one that costs nothing
        ([0.1, 0.3, 0.302, 0.9], [0.1, 0.2, 0.1, 0.4], 3),  # one that gives something back
        ([0.1, 0.3, 0.29, 0.9], [0.1, 0.2, 0.0, 0.4], 1),  # a fall, whatever it gives back
        ([0.1, 0.1, 0.9, 0.9], [0.1, 0.1, 0.1, 0.1], 0),
        ([0.1, 0.2, 0.3, 0.4], [0.1, 0.5, 0.9, 1.3], 3),  # worth what it costs
    ],
)
def test_the_margin_decides_where_there_is_no_detector(margins: list[float], moved: list[float], expected: int) -> None:
    curve = Curve([*margins, 0.0], [*moved, 9.0])
    stages = curve.run()
    assert accepted(stages) == expected
    assert [stage.detected for stage in stages] == [stage.detected_after for stage in stages] == [None] * len(stages)
    # No epoch beyond the first that only harms.
    assert curve.derived == expected + 1


# With one.


@pytest.mark.parametrize(
    ("shares", "margins", "expected", "tried"),
    [
        ([0.0], [0.1, 0.9], 0, True),  # nothing to erase, whatever the margin would gain
        ([1.0, 0.5, 0.0], [0.1, 0.101, 0.102, 0.9], 2, True),  # small rises are no reason to stop while it is seen
        ([1.0, 1.0, 1.0, 0.0], [0.1, 0.101, 0.102, 0.103, 0.9], 3, True),
        ([1.0, 0.5, 0.0], [0.9, 0.5, 0.4, 0.3], 2, True),  # nor are falls, where fewer pictures show it
        ([0.5, 0.75], [0.1, 0.9, 0.9], 0, False),  # it comes back, whatever the margin says
        ([0.5, 0.25, 0.25], [0.1, 0.2, 0.2, 0.2], 1, False),  # the same again, and no margin
        ([0.5, 0.25, 0.25], [0.1, 0.2, 0.1, 0.2], 1, False),
    ],
)
def test_the_detector_decides_where_there_is_one(
    shares: list[float], margins: list[float], expected: int, tried: bool
) -> None:
    curve = Curve(margins, [0.1 * number for number in range(len(margins))], shares)
    stages = curve.run()
    assert accepted(stages) == expected
    assert [stage.detected for stage in stages] == [None, *shares][: len(stages)]
    # Where nothing was detected before the last one, nothing was derived after it.
    after = [None, *shares[1 : expected + 1], None if tried else shares[expected + 1]]
    assert [stage.detected_after for stage in stages] == after
    assert curve.judged == curve.derived == len(shares)


def test_the_margin_would_have_stopped_where_the_detector_goes_on() -> None:
    """The negative control of the curves above."""
    margins, moved = [0.1, 0.101, 0.102, 0.9], [0.1, 0.2, 0.3, 0.4]
    assert accepted(Curve(margins, moved).run()) == 0
    assert accepted(Curve(margins, moved, [1.0, 0.5, 0.0]).run()) == 2


def test_so_many_and_no_more() -> None:
    rising, still = [0.01 * number for number in range(MOST + 2)], [0.0] * (MOST + 2)
    for shares, derived in (([], MOST), ([1.0] * (MOST + 2), MOST + 1)):
        curve = Curve(rising, still, shares)
        assert accepted(curve.run()) == MOST
        assert curve.derived == derived


@pytest.mark.parametrize("shares", [[], [1.0, 0.0, 1.0, 0.5]])
def test_a_number_of_epochs_is_run_as_it_is(shares: list[float]) -> None:
    curve = Curve([0.5, 0.4, 0.3, 0.2], [0.1, 0.2, 0.3, 0.4], shares)
    stages = curve.run(3)
    assert accepted(stages) == 3
    assert [stage.detected for stage in stages] == [None, *(shares[:3] or [None] * 3)]
    assert all(stage.detected_after is None for stage in stages)
    assert (curve.derived, curve.judged) == (3, 3 if shares else 0)


figures = st.floats(0, 1)


@given(before=st.tuples(figures, figures), after=st.tuples(figures, figures), seen=figures, left=figures)
def test_an_epoch_that_helps_is_no_worse_in_what_decides(
    before: tuple[float, float], after: tuple[float, float], seen: float, left: float
) -> None:
    def stage(figures: tuple[float, float], **shares: float) -> Any:
        return Stage("", None, SimpleNamespace(total=[figures[0]]), figures[1], **shares)  # type: ignore[arg-type]

    start = stage(before)
    if helps(start, stage(after)):
        assert after[0] > before[0]
        assert after[1] <= before[1] or after[0] - before[0] >= GAIN
        # Going back doesn't help as well: no run goes round in circles.
        assert not helps(stage(after), start)
    judged = helps(start, stage(after, detected=seen, detected_after=left))
    assert judged == (seen > 0 and (left, -after[0]) < (seen, -before[0]))


def test_auto_needs_something_to_measure() -> None:
    curve = Curve([0.1], [0.1], [1.0])
    curve.certified = []
    with pytest.raises(UsageError, match="epochs = auto needs the certificate"):
        curve.run()


# For the record.


def test_the_thresholds_are_those_of_the_rule() -> None:
    probe: Any = Curve([], [])
    assert stop_rule(None).model_dump() == {"judge": "margin", "gain": GAIN, "most": MOST}
    assert stop_rule(probe).judge == "detector"


@pytest.mark.parametrize("count", [1, PROBED, 50])
def test_the_pictures_are_counted(count: int) -> None:
    probe: Any = Curve([], [])
    found = detection_of(probe, [str(number) for number in range(count)])
    assert len(found.concepts) == min(count, PROBED)
    assert found.pictures == 3 * len(found.concepts)
    assert found.model_copy(update={"concepts": (), "pictures": 0}) == DETECTION
