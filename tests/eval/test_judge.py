"""The judgement: same requests everywhere, counts, margins, and a tolerance that no artefact can widen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from excise.errors import UsageError
from excise.eval.judge import AMPLITUDE, judge, margins, stability, wanted_labels
from excise.eval.protocol import Protocol
from excise.eval.results import BASE, EDITED_ONNX, EDITED_TORCH, ROLES, Results

Judged = Callable[..., Results]


def test_every_runtime_gets_the_same_requests_and_settings(
    protocol: Protocol, detector: Any, grey_runtime: Any
) -> None:
    runtimes = {role: grey_runtime(role) for role in ROLES}
    judge(protocol, runtimes, detector, progress=False)
    for runtime in runtimes.values():
        assert runtime.seen == protocol.requests()
        assert runtime.settings == {"steps": 3, "scale": 2.0}


def test_counts(judged: Judged) -> None:
    results = judged(base=(1, 2), torch=(18, 3), onnx=(20, 3))
    counts = {role: (run.detections.successes, run.kept_accuracy.successes) for role, run in results.runtimes.items()}
    assert counts == {BASE: (19, 18), EDITED_TORCH: (2, 17), EDITED_ONNX: (0, 17)}
    assert all(run.detections.n == run.kept_accuracy.n == 20 for run in results.runtimes.values())


def test_another_weapon_is_a_detection(protocol: Protocol, detector: Any, grey_runtime: Any) -> None:
    class Swaps(grey_runtime):  # type: ignore[misc]
        def generate(self, requests: Any, **settings: Any) -> Any:
            swap = {"a gun": "a knife", "a knife": "a gun", "a cat": "an owl", "a owl": "a cat"}
            return super().generate(
                [dataclasses.replace(request, prompt=swap[request.prompt]) for request in requests], **settings
            )

    results = judge(protocol, {role: Swaps(role) for role in ROLES}, detector, progress=False)
    assert results.runtimes[BASE].detections.successes == 20
    assert results.runtimes[BASE].kept_accuracy.successes == 0


def test_success_is_a_positive_margin(judged: Judged) -> None:
    for run in judged(base=(3, 4), torch=(18, 3), onnx=(20, 3)).runtimes.values():
        assert np.array_equal(run.success, run.margin > 0)


def test_margins_of_a_group() -> None:
    logits = np.array([[3, 1, 2], [0, 5, 4]], np.float32)
    wanted = np.array([[True, True, False], [True, False, False]])
    assert margins(logits, wanted).tolist() == [1, -5]


def test_wanted_labels(protocol: Protocol) -> None:
    wanted = wanted_labels(protocol)
    assert wanted.shape == (40, 5)
    assert wanted[:20].tolist() == [[True, True, False, False, False]] * 20
    assert wanted[20:30].tolist() == [[False, False, True, False, False]] * 10


def test_fid_is_against_the_base(judged: Judged) -> None:
    runtimes = judged(onnx=(20, 10)).runtimes
    assert runtimes[BASE].fid_kept is None
    assert runtimes[EDITED_TORCH].fid_kept == pytest.approx(0, abs=1e-6)
    assert runtimes[EDITED_ONNX].fid_kept is not None
    assert runtimes[EDITED_ONNX].fid_kept > 0.1


def test_agreement_counts_flips_and_pixels(judged: Judged) -> None:
    same, other = judged().agreement, judged(onnx=(15, 1)).agreement
    assert (same.erased.flips, same.kept.flips, same.mean_difference, same.max_difference) == (0, 0, 0, 0)
    assert (other.erased.only_first, other.erased.only_second) == (0, 5)
    assert (other.kept.only_first, other.kept.only_second) == (1, 0)
    # Five images of a knife (75) where torch has a pig (225), one pig where torch has a cat (125): 40 images.
    assert (other.mean_difference, other.max_difference) == ((5 * 150 + 100) / 40, 150)


def test_stability_is_of_the_torch_run_alone(judged: Judged) -> None:
    a, b = judged(onnx=(20, 0)), judged(onnx=(0, 15))
    assert np.array_equal(a.stability.delta, b.stability.delta)
    assert a.stability.delta.max() > 0


def test_stability_bounds_the_change_of_each_margin(judged: Judged, protocol: Protocol, detector: Any) -> None:
    run = judged().runtimes[EDITED_TORCH]
    wanted = wanted_labels(protocol)
    found = stability(run, detector, wanted)
    again = stability(run, detector, wanted)
    assert np.array_equal(found.delta, again.delta)
    # A whole image moved by the amplitude moves the margin further than zero-mean noise.
    shifted = margins(detector.label_logits(detector.image_features(run.images + np.uint8(AMPLITUDE))), wanted)
    assert found.delta.max() < np.abs(shifted - run.margin).max()


def test_progress_bars_are_on_stderr(
    protocol: Protocol, detector: Any, grey_runtime: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    judge(protocol, {role: grey_runtime(role) for role in ROLES}, detector)
    out, err = capsys.readouterr()
    assert out == ""
    assert all(f"{role}: 100%" in err for role in ROLES)
    assert "40/40" in err


def test_a_missing_role_is_refused(protocol: Protocol, detector: Any, grey_runtime: Any) -> None:
    with pytest.raises(UsageError, match="needs the runtimes base torch, edited torch, edited onnx, not base torch"):
        judge(protocol, {BASE: grey_runtime(BASE)}, detector, progress=False)


def test_a_detector_of_other_labels_is_refused(protocol: Protocol, detector: Any, grey_runtime: Any) -> None:
    detector.labels = ("cat",)
    with pytest.raises(UsageError, match="labels"):
        judge(protocol, {role: grey_runtime(role) for role in ROLES}, detector, progress=False)


def test_images_of_another_size_are_refused(protocol: Protocol, detector: Any, grey_runtime: Any) -> None:
    class Large(grey_runtime):  # type: ignore[misc]
        def generate(self, requests: Any, **settings: Any) -> Any:
            return super().generate(requests, **settings).repeat(2, axis=1)

    runtimes = {BASE: grey_runtime(BASE), EDITED_TORCH: Large("large"), EDITED_ONNX: grey_runtime("onnx")}
    with pytest.raises(UsageError, match="edited torch made images of shape"):
        judge(protocol, runtimes, detector, progress=False)
