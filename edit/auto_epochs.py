"""How many RECE epochs: as many as take the concept further away (Gong et al., ECCV 2024, arXiv 2407.12383, §4.5).

After each epoch two figures are taken. The *margin* is the least relative error with which any embedding of the
concept's own norm regenerates it (``certificate.py``): what the epoch is for. *Moved* is the relative movement of the
kept tokens: what it costs. The paper picks an epoch by generating pictures from each derived embedding; a probe does
that where a detector is at hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from excise.edit.problem import PROBED, Problem, Stage, spread
from excise.edit.rece import Epoch, Rounds
from excise.edit.transform import Transform
from excise.errors import UsageError

#: With ``auto``, an epoch has to raise the margin by this much (of 1), or it is left out and the run ends.
GAIN = 0.005

#: The most epochs that ``auto`` tries: the paper's longest run.
MOST = 10

#: From an epoch's derived tokens and the edit that they were derived against, the share of pictures generated from them
#: that show the concept. The tokens are whole prompts, every position of each, one after the other: (concepts · t, d).
Probe = Callable[[Tensor, Transform], float]


def choose(
    rounds: Rounds, epochs: int | Literal["auto"], problem: Problem, *, probe: Probe | None = None
) -> tuple[Stage, ...]:
    """UCE's stage and the epochs after it.

    A number of epochs is run as it is. With ``auto`` the first epoch that raises the margin by less than ``GAIN``, or
    whose derived embedding shows the concept in no picture, is recorded as not accepted, and the run ends: it would
    only move what is kept.

    Args:
        rounds: RECE's iterator, at its start.
        epochs: how many, or ``auto``: at most ``MOST``.
        problem: what ``rounds`` works on.
        probe: judges a derived embedding by pictures.

    Raises:
        UsageError: ``auto`` without a token to measure the margin on.
    """
    if epochs == "auto" and not len(problem.certified):
        raise UsageError("epochs = auto needs the certificate: leave out --no-certificate, or give a number of epochs")
    stages = [Stage.of(problem, "uce", rounds.uce)]
    for number in range(1, (MOST if epochs == "auto" else epochs) + 1):
        before = stages[-1]
        epoch = next(rounds)
        stage = Stage.of(problem, f"epoch {number}", epoch.transform, epoch.residual)
        if probe is not None:
            stage = replace(stage, detected=probe(_derived(epoch, problem), before.transform))
        if epochs == "auto" and (_margin(stage) - _margin(before) < GAIN or stage.detected == 0.0):
            stages.append(replace(stage, accepted=False))
            break
        stages.append(stage)
    return tuple(stages)


def _margin(stage: Stage) -> float:
    return 0.0 if stage.margin is None else float(stage.margin.total[0])


def _derived(epoch: Epoch, problem: Problem) -> Tensor:
    """The epoch's embeddings of whole prompts, of at most ``PROBED`` concepts."""
    if epoch.regeneration is None:
        return torch.cat([epoch.derived[place] for place in spread(len(epoch.derived), PROBED)])
    return problem.probed.to(epoch.regeneration) @ epoch.regeneration
