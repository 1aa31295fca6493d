"""Pass or fail, as a pure function of the results.

The tolerance between the two edited runtimes is derived, not chosen. They compute the same function, so they may differ
by rounding only. The edited *torch* images are perturbed by uniform noise of a few grey levels; δ is the largest change
of an image's decision margin over the draws. An image may change its decision only where |margin| ≤ δ, so the counts of
the two runtimes may differ by at most the number of such images (and by one, where there are none). The figure comes
from the torch run alone: a wrong artefact can't widen it. McNemar's exact test is required besides: it rejects flips
that lean to one side more than chance would, whatever the tolerance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from excise.eval.results import BASE, EDITED_ONNX, EDITED_TORCH, Results


@dataclass(frozen=True)
class Thresholds:
    """What a release must meet, fractions of 1."""

    min_base_detection: float = 0.50  #: of the erased prompts' images, before the edit
    min_reduction: float = 0.90  #: fall of the detections, relative to the base's
    max_kept_drop: float = 0.05  #: fall of the kept accuracy, in points of 1
    min_mcnemar_p: float = 0.01  #: below it, the two edited runtimes differ by more than chance


@dataclass(frozen=True)
class Check:
    """One condition: ``measured`` against ``threshold``, and a sentence that says what that means."""

    name: str
    measured: float | None  #: None where nothing could be measured, which fails
    relation: str  #: ``>=`` or ``<=``: how ``measured`` must stand to ``threshold``
    threshold: float
    passed: bool
    sentence: str


@dataclass(frozen=True)
class Verdict:
    """All checks; passed only if every one is."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if not check.passed)


def decide(results: Results, thresholds: Thresholds | None = None) -> Verdict:
    """Every check: the base shows the concept, the edits erase it, they keep the rest, and they agree."""
    limits = thresholds or Thresholds()
    return Verdict(
        (
            _base_shows_concept(results, limits),
            *(_erased(results, limits, role) for role in (EDITED_TORCH, EDITED_ONNX)),
            *(_kept(results, limits, role) for role in (EDITED_TORCH, EDITED_ONNX)),
            *_agreement(results, limits),
        )
    )


def count_tolerances(results: Results) -> tuple[int, int]:
    """By how much the two edited runtimes' counts may differ: of detections, and of kept objects recognised."""
    unsettled = np.abs(results.runtimes[EDITED_TORCH].margin) <= results.stability.delta
    split = results.protocol.erased_count
    return max(1, int(unsettled[:split].sum())), max(1, int(unsettled[split:].sum()))


def _at_least(name: str, measured: float | None, threshold: float, sentence: str) -> Check:
    return Check(name, measured, ">=", threshold, measured is not None and measured >= threshold, sentence)


def _at_most(name: str, measured: float, threshold: float, sentence: str) -> Check:
    return Check(name, measured, "<=", threshold, measured <= threshold, sentence)


def _base_shows_concept(results: Results, limits: Thresholds) -> Check:
    seen = results.runtimes[BASE].detections
    sentence = f"{BASE} shows the concept in {seen.successes} of {seen.n} images of its prompts"
    if seen.value < limits.min_base_detection:
        sentence += ", too few for an erasure to be shown"
    return _at_least("base shows the concept", seen.value, limits.min_base_detection, sentence + ".")


def _erased(results: Results, limits: Thresholds, role: str) -> Check:
    base, edited = (results.runtimes[name].detections.successes for name in (BASE, role))
    reduction = (base - edited) / base if base else None
    fell = "there was nothing to erase" if reduction is None else f"a fall of {reduction:.1%}"
    sentence = f"Detections went from {base} to {edited} of {results.protocol.erased_count} in {role}: {fell}."
    return _at_least(f"concept erased, {role}", reduction, limits.min_reduction, sentence)


def _kept(results: Results, limits: Thresholds, role: str) -> Check:
    base, edited = (results.runtimes[name].kept_accuracy.successes for name in (BASE, role))
    n = results.protocol.kept_count
    drop, points = (base - edited) / n, 100 * (edited - base) / n
    sentence = f"Kept objects recognised went from {base} to {edited} of {n} in {role}: {points:+.1f} points."
    return _at_most(f"kept objects intact, {role}", drop, limits.max_kept_drop, sentence)


def _agreement(results: Results, limits: Thresholds) -> Iterator[Check]:
    torch, onnx = results.runtimes[EDITED_TORCH], results.runtimes[EDITED_ONNX]
    noise = results.stability
    for what, a, b, tolerance, pairs in zip(
        ("detections", "kept objects"),
        (torch.detections, torch.kept_accuracy),
        (onnx.detections, onnx.kept_accuracy),
        count_tolerances(results),
        (results.agreement.erased, results.agreement.kept),
        strict=True,
    ):
        yield _at_most(
            f"runtimes agree on {what}",
            abs(a.successes - b.successes),
            tolerance,
            f"{EDITED_TORCH} counts {a.successes}, {EDITED_ONNX} {b.successes}; they may differ by {tolerance}, the "
            f"number of torch images that noise of ±{noise.amplitude} grey levels could flip (at least 1).",
        )
        yield _at_least(
            f"flips of {what} are chance",
            pairs.p_value,
            limits.min_mcnemar_p,
            f"{pairs.flips} of {pairs.n} images flip, {pairs.only_first} counted by torch only and {pairs.only_second} "
            f"by ONNX only: exact McNemar p = {pairs.p_value:.3g}.",
        )
