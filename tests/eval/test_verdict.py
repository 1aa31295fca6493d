"""Verdicts: a good edit passes, and everything that should fail does, for its own reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from excise.eval.results import EDITED_ONNX, EDITED_TORCH, Results
from excise.eval.verdict import Thresholds, Verdict, count_tolerances, decide

Judged = Callable[..., Results]


def failed(results: Results) -> set[str]:
    verdict = decide(results)
    assert verdict.passed == (not verdict.failures)
    return {check.name for check in verdict.failures}


def undecided(results: Results, images: int) -> Results:
    """The same results, had noise been able to flip the first ``images`` of the torch run."""
    delta = np.zeros_like(results.stability.delta)
    delta[:images] = np.abs(results.runtimes[EDITED_TORCH].margin[:images])
    return dataclasses.replace(results, stability=dataclasses.replace(results.stability, delta=delta))


def test_a_good_edit_passes(judged: Judged) -> None:
    verdict = decide(judged())
    assert verdict.passed
    assert len(verdict.checks) == 9
    assert all(check.sentence.endswith(".") for check in verdict.checks)


def test_no_checks_is_no_pass() -> None:
    assert not Verdict(()).passed


def test_the_unedited_onnx_fails(judged: Judged) -> None:
    """The negative control: the exported model without the edit stands in for the edited one."""
    assert failed(judged(onnx=(0, 0))) == {
        "concept erased, edited onnx",
        "runtimes agree on detections",
        "flips of detections are chance",
    }


def test_the_unedited_onnx_fails_whatever_its_margins(judged: Judged) -> None:
    """Even were every torch image a coin toss, which makes the tolerance as wide as can be."""
    assert "flips of detections are chance" in failed(undecided(judged(onnx=(0, 0)), 40))


def test_no_edit_at_all_fails(judged: Judged) -> None:
    assert failed(judged(torch=(0, 0), onnx=(0, 0))) == {"concept erased, edited torch", "concept erased, edited onnx"}


def test_a_base_without_the_concept_shows_nothing(judged: Judged) -> None:
    results = judged(base=(20, 0))
    assert failed(results) == {
        "base shows the concept",
        "concept erased, edited torch",
        "concept erased, edited onnx",
    }
    assert [check.measured for check in decide(results).checks[:3]] == [0.0, None, None]


def test_a_base_that_shows_the_concept_too_rarely_fails(judged: Judged) -> None:
    assert failed(judged(base=(10, 0))) == set()
    assert failed(judged(base=(11, 0))) == {"base shows the concept"}


def test_an_edit_that_destroys_the_rest_fails(judged: Judged) -> None:
    assert failed(judged(torch=(20, 20), onnx=(20, 20))) == {
        "kept objects intact, edited torch",
        "kept objects intact, edited onnx",
    }


def test_thresholds_are_met_exactly_at_their_value(judged: Judged) -> None:
    # 90 % of 20 detections is 18 lost; 5 points of 20 kept images is one.
    assert failed(judged(torch=(18, 1), onnx=(18, 1))) == set()
    assert failed(judged(torch=(17, 0), onnx=(18, 0))) == {"concept erased, edited torch"}
    assert failed(judged(torch=(20, 1), onnx=(20, 2))) == {"kept objects intact, edited onnx"}


def test_one_stray_image_is_tolerated_and_two_are_not(judged: Judged) -> None:
    assert failed(judged(torch=(20, 0), onnx=(19, 0))) == set()
    assert failed(judged(torch=(20, 0), onnx=(18, 0))) == {"runtimes agree on detections"}


def test_the_tolerance_counts_images_that_noise_could_flip(judged: Judged) -> None:
    results = judged(torch=(20, 0), onnx=(18, 0))
    assert count_tolerances(results) == (1, 1)
    assert count_tolerances(undecided(results, 2)) == (2, 1)
    assert count_tolerances(undecided(results, 23)) == (20, 3)
    assert failed(undecided(results, 2)) == set()


def test_no_artefact_can_widen_the_tolerance(judged: Judged) -> None:
    expected = count_tolerances(judged())
    for onnx in ((0, 0), (10, 5), (20, 20)):
        assert count_tolerances(judged(onnx=onnx)) == expected


def test_flips_that_lean_to_one_side_fail_within_the_tolerance(judged: Judged) -> None:
    # Seven flips to one side: p = 2 / 2⁷ = 0.016. Eight: p = 0.0078.
    base = judged(torch=(20, 0), onnx=(13, 0))
    assert "flips of detections are chance" not in failed(undecided(base, 20))
    assert "flips of detections are chance" in failed(undecided(judged(torch=(20, 0), onnx=(12, 0)), 20))


def test_thresholds_can_be_set(judged: Judged) -> None:
    results = judged(torch=(17, 0), onnx=(17, 0))
    assert not decide(results).passed
    assert decide(results, Thresholds(min_reduction=0.8)).passed


def test_sentences_name_the_counts(judged: Judged) -> None:
    sentences = {check.name: check.sentence for check in decide(judged(torch=(18, 1), onnx=(19, 0))).checks}
    assert "from 20 to 1 of 20" in sentences[f"concept erased, {EDITED_ONNX}"]
    assert "-5.0 points" in sentences[f"kept objects intact, {EDITED_TORCH}"]
    assert "edited torch counts 2, edited onnx 1" in sentences["runtimes agree on detections"]
