"""How many RECE epochs: as many as take the concept further away (Gong et al., ECCV 2024, arXiv 2407.12383, §4.5).

Every epoch moves what is kept as well. It is worth that where it takes the concept further away; an epoch that doesn't
*only harms*, and ``auto`` stops before the first such one. What takes the concept further away is judged

- by pictures, where a detector is at hand, as the paper does. Before and after the epoch the embedding that best
  regenerates the concept is derived, and pictures are made from it. The epoch only harms where none of them shows the
  concept before it, where more do after it, or where as many do and the *margin* doesn't rise. While they show it, a
  margin that rises by little is no reason to stop: the share of a few pictures can't tell a small step from none.
- by the margin alone otherwise: the least relative error with which any embedding of the concept's own norm
  regenerates it (``certificate.py``). Nothing says what margin is enough. The epoch only harms where it doesn't rise,
  or rises by less than ``GAIN`` while the kept tokens move further.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Literal, Protocol

import torch
from torch import Tensor

from excise.edit.problem import PROBED, Problem, Stage, spread
from excise.edit.rece import Epoch, Rounds
from excise.edit.transform import Transform
from excise.editmetadata import Detection, StopRule
from excise.errors import UsageError

#: A rise of the margin (of 1) below this isn't worth any movement of what is kept, where the margin alone decides.
GAIN = 0.005

#: The most epochs that ``auto`` tries: the paper's longest run.
MOST = 10


class Probe(Protocol):
    """Judges derived embeddings by pictures."""

    @property
    def detection(self) -> Detection:
        """What judges, and by how many pictures of each concept, for the record; the concepts are left open."""
        ...

    def __call__(self, derived: Tensor, edit: Transform, /) -> float:
        """The share of pictures that show the concept, generated under an edit from what was derived against it.

        The embeddings are whole prompts, every position of each, one after the other: (concepts · t, d).
        """
        ...


def choose(
    rounds: Rounds, epochs: int | Literal["auto"], problem: Problem, *, probe: Probe | None = None
) -> tuple[Stage, ...]:
    """UCE's stage and the epochs after it.

    A number of epochs is run as it is. With ``auto`` the first epoch that only harms is recorded as not accepted, and
    the run ends.

    Args:
        rounds: RECE's iterator, at its start.
        epochs: how many, or ``auto``: at most ``MOST``.
        problem: what ``rounds`` works on.
        probe: judges what each epoch derives; with ``auto`` it also decides.

    Raises:
        UsageError: ``auto`` without a token to measure the margin on.
    """
    if epochs == "auto":
        check_measured(len(problem.certified) > 0)
        return _as_many_as_help(rounds, problem, probe)
    stages = [Stage.of(problem, "uce", rounds.uce)]
    for number, epoch in enumerate(islice(rounds, epochs), 1):
        detected = _detected(probe, epoch, problem, stages[-1])
        stages.append(replace(_stage(number, epoch, problem), detected=detected))
    return tuple(stages)


def check_measured(certificate: bool) -> None:
    """Raise ``UsageError`` where the number of epochs is ``auto`` and no margin is measured."""
    if not certificate:
        raise UsageError("epochs = auto needs the certificate: leave out --no-certificate, or give a number of epochs")


def helps(before: Stage, after: Stage) -> bool:
    """Whether the epoch between two stages takes the concept further away, as the head of this file says.

    Args:
        before: the stage that the epoch started from.
        after: the epoch's; with ``detected`` and, unless that is 0, ``detected_after`` where a detector decides.
    """
    gain, seen, left = _margin(after) - _margin(before), after.detected, after.detected_after
    if seen is None:
        return gain > 0 and (gain >= GAIN or after.moved <= before.moved)
    if seen == 0 or left is None:
        return False
    return left < seen or (left == seen and gain > 0)


def stop_rule(probe: Probe | None) -> StopRule:
    """What ends a run of ``auto``, for the record."""
    return StopRule(judge="margin" if probe is None else "detector", gain=GAIN, most=MOST)


def detection_of(probe: Probe, concepts: Sequence[str]) -> Detection:
    """What judged a run over these concepts, for the record."""
    detection = probe.detection
    shown = tuple(concepts[place] for place in spread(len(concepts), PROBED))
    return detection.model_copy(update={"concepts": shown, "pictures": len(shown) * len(detection.seeds)})


def _as_many_as_help(rounds: Rounds, problem: Problem, probe: Probe | None) -> tuple[Stage, ...]:
    stages = [Stage.of(problem, "uce", rounds.uce)]
    epoch = next(rounds)
    seen = _detected(probe, epoch, problem, stages[0])
    for number in range(1, MOST + 1):
        stage = replace(_stage(number, epoch, problem), detected=seen)
        if seen:
            # What the next epoch derives tells what this one left.
            epoch = next(rounds)
            seen = _detected(probe, epoch, problem, stage)
            stage = replace(stage, detected_after=seen)
        stages.append(replace(stage, accepted=helps(stages[-1], stage)))
        if not stages[-1].accepted:
            break
        if probe is None and number < MOST:
            epoch = next(rounds)
    return tuple(stages)


def _stage(number: int, epoch: Epoch, problem: Problem) -> Stage:
    return Stage.of(problem, f"epoch {number}", epoch.transform, epoch.residual)


def _detected(probe: Probe | None, epoch: Epoch, problem: Problem, before: Stage) -> float | None:
    """The share of pictures, under the edit before an epoch, from what the epoch derived against it."""
    return None if probe is None else probe(_derived(epoch, problem), before.transform)


def _margin(stage: Stage) -> float:
    return 0.0 if stage.margin is None else float(stage.margin.total[0])


def _derived(epoch: Epoch, problem: Problem) -> Tensor:
    """The epoch's embeddings of whole prompts, of at most ``PROBED`` concepts."""
    if epoch.regeneration is None:
        return torch.cat([epoch.derived[place] for place in spread(len(epoch.derived), PROBED)])
    return problem.probed.to(epoch.regeneration) @ epoch.regeneration
