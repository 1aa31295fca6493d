"""A canary passes on what it was recorded of, however it is batched, and on nothing else."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from excise.editfile import Edit
from excise.errors import ArtefactError, UsageError
from excise.manifest import hash_file
from excise.serve.canary import LEAST_TOLERANCE, CanaryResult, Images, record, relative_difference, run
from excise.serve.canary_folder import unedited
from excise.serve.canary_record import NAME, Canary, read_canary
from excise.serve.canary_watch import CanaryWatch
from excise.serve.onnx_runtime import OnnxRuntime
from excise.serve.runtime import Request
from tests.serve.test_bank_runtime import make

ERASED, KEPT = ("a gun",), ("a cat",)


@pytest.fixture(scope="module")
def canary(versions: tuple[Path, Path]) -> Canary:
    """Of the first edit."""
    return record(versions[0], erased=ERASED, kept=KEPT, num_inference_steps=3)


def test_passes_with_other_threads_and_again_and_again(canary: Canary, versions: tuple[Path, Path]) -> None:
    for threads in (1, 2):
        result = run(OnnxRuntime(versions[0], threads=threads), canary)
        assert result.passed
        assert result.reason == ""
        assert result.difference is not None
        assert result.difference <= max(canary.measured, 1e-5)
    assert [(probe.prompt, probe.erased, probe.seed) for probe in canary.probes] == [
        ("a gun", True, 0),
        ("a cat", False, 1),
    ]
    assert canary.manifest_sha256 == hash_file(versions[0] / "excise.json")
    assert LEAST_TOLERANCE <= canary.tolerance < 0.1


def test_notices_another_edit_and_none(canary: Canary, versions: tuple[Path, Path], exported: Path) -> None:
    for folder in (versions[1], exported):
        result = run(OnnxRuntime(folder), canary)
        assert not result.passed
        assert "was recorded of edit" in result.reason


@pytest.mark.parametrize("which", ["unedited", "other"])
def test_notices_other_weights_that_call_themselves_the_same(
    canary: Canary, versions: tuple[Path, Path], edits: tuple[Edit, Edit], which: str
) -> None:
    runtime = unedited(versions[0]) if which == "unedited" else OnnxRuntime(versions[0], edit=edits[1])
    assert runtime is not None
    runtime.edit_id = canary.edit_id
    result = run(runtime, canary)
    assert not result.passed
    assert "other weights are in effect" in result.reason
    assert result.difference is not None
    assert result.difference > 4 * canary.tolerance


def test_the_unedited_weights_are_the_exports(versions: tuple[Path, Path], runtime: OnnxRuntime) -> None:
    plain = unedited(versions[0])
    assert plain is not None
    requests = [Request(prompt, seed=3) for prompt in (*ERASED, *KEPT)]
    got, expected = (one.denoise(requests, num_inference_steps=2) for one in (plain, runtime))
    np.testing.assert_array_equal(got, expected)


def test_notices_one_tampered_weight(canary: Canary, versions: tuple[Path, Path], tmp_path: Path) -> None:
    """One float32 of the UNet's several thousand becomes 100."""
    folder = Path(shutil.copytree(versions[0], tmp_path / "tampered"))
    manifest = json.loads((folder / "excise.json").read_text())
    place = next(iter(manifest["weights"].values()))
    file = folder / place["data"]
    content = file.read_bytes()
    file.unlink()  # it may be a hard link
    at = place["offset"] + 4 * 17
    file.write_bytes(content[:at] + np.float32(100).tobytes() + content[at + 4 :])
    result = run(OnnxRuntime(folder), canary)
    assert not result.passed
    assert "other weights are in effect" in result.reason


def test_latents_that_are_not_finite_fail(canary: Canary, versions: tuple[Path, Path]) -> None:
    runtime = OnnxRuntime(versions[0])
    runtime.denoise = lambda *_, **__: np.full((1, *runtime.latent_shape), np.nan, np.float32)  # type: ignore[method-assign]
    result = run(runtime, canary)
    assert (result.passed, result.difference) == (False, None)
    assert "aren't finite" in result.reason


def test_a_runtime_that_fails_is_a_result(canary: Canary, versions: tuple[Path, Path]) -> None:
    runtime = OnnxRuntime(versions[0])

    def broken(*_: object, **__: object) -> np.ndarray:  # type: ignore[type-arg]
        raise ArtefactError("the GPU fell off the bus")

    runtime.denoise = broken  # type: ignore[method-assign]
    assert run(runtime, canary).reason.endswith("the GPU fell off the bus")


def test_a_detector_sees_the_erased_prompts_alone(canary: Canary, versions: tuple[Path, Path]) -> None:
    runtime = OnnxRuntime(versions[0])
    seen: list[tuple[int, ...]] = []

    def detector(images: Images) -> list[bool]:
        seen.append(images.shape)
        return [True] * len(images)

    result = run(runtime, canary, detector=detector)
    assert (result.passed, result.detected) == (False, ("a gun",))
    assert seen == [(1, *runtime.image_shape)]
    assert run(runtime, canary, detector=lambda images: [False] * len(images)).passed
    with pytest.raises(ArtefactError, match="shows what was erased"):
        record(runtime, erased=ERASED, detector=detector, num_inference_steps=1)


def test_a_canary_that_cannot_fail_is_refused(versions: tuple[Path, Path]) -> None:
    runtime = OnnxRuntime(versions[0])
    with pytest.raises(UsageError, match="without prompts can't fail"):
        record(runtime, kept=())
    with pytest.raises(ArtefactError, match="give prompts of what it erases"):
        record(runtime, kept=KEPT, unedited=runtime, num_inference_steps=1)
    other = OnnxRuntime(versions[1])
    with pytest.raises(ArtefactError, match="no canary can tell"):
        record(runtime, kept=KEPT, repeats=[other], num_inference_steps=1)
    with pytest.raises(UsageError, match=r"tolerance of 0\.5"):
        record(runtime, kept=KEPT, tolerance=0.5, num_inference_steps=1)


def test_a_bank_is_asked_every_prompt_of_every_edit(exported: Path, edits: tuple[Edit, Edit], tmp_path: Path) -> None:
    runtime = OnnxRuntime(make(exported, tmp_path / "bank", edits, with_base=True), threads=1)
    assert runtime.bank is not None
    canary = record(runtime, erased=ERASED, kept=KEPT, num_inference_steps=2)
    assert {probe.edit for probe in canary.probes} == set(runtime.bank)
    assert not any(probe.erased for probe in canary.probes if probe.edit is None)
    assert run(runtime, canary).passed
    swapped = canary.model_copy(
        update={"probes": tuple(p.model_copy(update={"edit": runtime.bank[0]}) for p in canary.probes)}
    )
    assert not run(runtime, swapped).passed


def test_relative_difference_is_of_the_largest_element() -> None:
    recorded = np.full((4, 8, 8), 2.0, np.float32)
    latents = recorded.copy()
    latents[1, 2, 3] += 1
    assert relative_difference(latents, recorded) == pytest.approx(0.5)
    assert relative_difference(latents[:3], recorded) == np.inf


def test_goes_through_its_file(canary: Canary, tmp_path: Path) -> None:
    assert canary.write(tmp_path).name == NAME
    again = read_canary(tmp_path)
    assert again == canary
    assert again.to_json() == canary.to_json()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: None, "can't be read"),
        (lambda text: text[:-20], "isn't JSON"),
        (lambda text: text.replace('"format": 1', '"format": 9'), "isn't a canary of format 1"),
        (lambda text: text.replace('"base64": "', '"base64": "AAAA'), "aren't those of their SHA-256"),
        (lambda text: text.replace('"seed": 0', '"seed": -1'), "malformed: probes.0.seed"),
        (lambda text: json.dumps({**json.loads(text), "probes": []}), "malformed: probes"),
        (
            lambda text: json.dumps(
                {**json.loads(text), "probes": [{"prompt": "", "seed": 0, "erased": False, "latents": None}]}
            ),
            "without latents, which can't fail",
        ),
    ],
)
def test_a_damaged_file_is_refused(canary: Canary, tmp_path: Path, change: object, message: str) -> None:
    text = change(canary.to_json())  # type: ignore[operator]
    if text is not None:
        (tmp_path / NAME).write_text(text)
    with pytest.raises(ArtefactError, match=message):
        read_canary(tmp_path)


def test_the_watch_runs_when_it_is_due() -> None:
    now, told = [100.0], []
    passed = CanaryResult(True, "", 0.0, 1e-3, (), 0.1)
    watch = CanaryWatch(lambda: passed, 60, on_result=told.append, clock=lambda: now[0])
    assert watch.due
    assert watch.check() is passed
    assert not watch.due
    now[0] = 159.9
    assert not watch.due
    now[0] = 160.0
    assert watch.due
    assert told == [passed]
    once = CanaryWatch(lambda: passed, 0, clock=lambda: now[0])
    once.check()
    now[0] = 1e9
    assert not once.due


def test_the_watch_repeats_in_a_thread_and_takes_any_error_for_a_failure() -> None:
    twice, runs = threading.Event(), []

    def broken() -> CanaryResult:
        runs.append(1)
        if len(runs) == 2:
            twice.set()
        raise MemoryError("no\nmemory")

    watch = CanaryWatch(broken, 0.02)
    watch.check()
    watch.start()
    assert twice.wait(10)
    watch.stop()
    assert watch.result is not None
    assert not watch.result.passed
    assert "MemoryError" in watch.result.reason
