"""Runs a protocol: the same requests to every runtime, one detector for all of their images."""

from __future__ import annotations

import sys
import time
import typing
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from excise.errors import UsageError
from excise.eval.metrics import clip_score, fid
from excise.eval.protocol import Protocol
from excise.eval.results import BASE, EDITED_ONNX, EDITED_TORCH, ROLES, Agreement, Results, RuntimeResults, Stability
from excise.eval.statistics import mcnemar, wilson
from excise.serve.runtime import Runtime

#: The noise that stands for rounding (see ``stability``), in grey levels, and how often it is drawn.
AMPLITUDE, DRAWS, NOISE_SEED = 2, 8, 0


class Detector(typing.Protocol):
    """What ``ClipDetector`` offers and a judgement needs."""

    name: str
    labels: tuple[str, ...]

    def image_features(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Unit rows with shape (n, d)."""
        ...

    def text_features(self, prompts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Unit rows with shape (m, d)."""
        ...

    def label_logits(self, features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Logits with shape (n, labels)."""
        ...


def judge(protocol: Protocol, runtimes: Mapping[str, Runtime], detector: Detector, *, progress: bool = True) -> Results:
    """Generate every image of ``protocol`` with every runtime and measure them.

    Args:
        runtimes: one for each of ``ROLES``.
        progress: show bars with rate and remaining time on stderr.

    Raises:
        UsageError: a role is missing or unknown, the detector's labels aren't the protocol's, or a runtime's images
            don't have the shape of the base's.
        PromptTooLong: from a runtime or the detector.
    """
    if set(runtimes) != set(ROLES):
        raise UsageError(f"a judgement needs the runtimes {', '.join(ROLES)}, not {', '.join(runtimes) or 'none'}")
    if detector.labels != tuple(protocol.labels):
        raise UsageError(f"the detector's labels are not those of protocol {protocol.name!r}: build it with them")
    wanted = wanted_labels(protocol)
    texts = detector.text_features([row.prompt for row in protocol.rows()])
    judged: dict[str, RuntimeResults] = {}
    base_features: npt.NDArray[np.float32] | None = None
    for role in ROLES:
        images, seconds = _generate(protocol, runtimes[role], role, progress)
        if judged and images.shape != judged[BASE].images.shape:
            raise UsageError(f"{role} made images of shape {images.shape}, {BASE} of {judged[BASE].images.shape}")
        features = detector.image_features(images)
        kept = slice(protocol.erased_count, None)
        judged[role] = _measure(
            protocol,
            runtimes[role].name,
            images,
            features,
            texts,
            logits=detector.label_logits(features),
            wanted=wanted,
            fid_kept=None if base_features is None else fid(features[kept], base_features[kept]),
            seconds_per_image=seconds,
        )
        base_features = features if base_features is None else base_features
    return Results(
        protocol=protocol,
        detector=detector.name,
        feature_dimension=texts.shape[1],
        runtimes=judged,
        agreement=compare(judged[EDITED_TORCH], judged[EDITED_ONNX], protocol.erased_count),
        stability=stability(judged[EDITED_TORCH], detector, wanted, progress=progress),
    )


def wanted_labels(protocol: Protocol) -> npt.NDArray[np.bool_]:
    """Which labels make an image a success, with shape (n, labels): any erased one, or a kept prompt's own."""
    labels = list(protocol.labels)
    erased = np.array([label in protocol.erased_labels for label in labels])
    own = np.stack([np.array(labels) == row.label for row in protocol.rows()])
    own[: protocol.erased_count] = erased
    return own


def margins(logits: npt.NDArray[np.float32], wanted: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Decision margins (n,): each row's best wanted logit minus the best of the rest; both arguments (n, labels)."""
    values = logits.astype(np.float64)
    best, rest = np.where(wanted, values, -np.inf).max(1), np.where(wanted, -np.inf, values).max(1)
    margin: npt.NDArray[np.float64] = best - rest
    return margin


def compare(first: RuntimeResults, second: RuntimeResults, erased_count: int) -> Agreement:
    """Flips and pixel differences between two runtimes' images of the same requests."""
    total, largest = 0, 0
    for a, b in zip(first.images, second.images, strict=True):
        difference = np.abs(a.astype(np.int16) - b)
        total, largest = total + int(difference.sum()), max(largest, int(difference.max()))
    return Agreement(
        erased=mcnemar(first.success[:erased_count], second.success[:erased_count]),
        kept=mcnemar(first.success[erased_count:], second.success[erased_count:]),
        mean_difference=total / first.images.size,
        max_difference=largest,
    )


def stability(
    run: RuntimeResults, detector: Detector, wanted: npt.NDArray[np.bool_], *, progress: bool = False
) -> Stability:
    """How far noise of ±``AMPLITUDE`` grey levels, the size of an accumulated rounding error, moves each margin."""
    rng = np.random.default_rng(NOISE_SEED)
    delta = np.zeros(len(run.images))
    for _ in tqdm(range(DRAWS), "rounding noise", unit="draw", file=sys.stderr, disable=not progress):
        noise = rng.integers(-AMPLITUDE, AMPLITUDE, run.images.shape, np.int16, endpoint=True)
        noisy = np.clip(run.images + noise, 0, 255).astype(np.uint8)
        moved = margins(detector.label_logits(detector.image_features(noisy)), wanted)
        delta = np.maximum(delta, np.abs(moved - run.margin))
    return Stability(AMPLITUDE, DRAWS, NOISE_SEED, delta)


def _generate(protocol: Protocol, runtime: Runtime, role: str, progress: bool) -> tuple[npt.NDArray[np.uint8], float]:
    """All images of one runtime, and the seconds that one took."""
    requests = protocol.requests()
    with tqdm(total=len(requests), desc=role, unit="image", file=sys.stderr, disable=not progress) as bar:

        def step_done(done: int, total: int) -> None:
            # Whole images only, so that the bar's rate is in images; never backwards.
            bar.update(max(0, len(requests) * done // total - bar.n))

        started = time.perf_counter()
        images = runtime.generate(
            requests,
            num_inference_steps=protocol.num_inference_steps,
            guidance_scale=protocol.guidance_scale,
            progress=step_done,
        )
        seconds = time.perf_counter() - started
        bar.update(len(requests) - bar.n)
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) != len(requests):
        raise UsageError(
            f"{role} returned {images.dtype} with shape {images.shape} for {len(requests)} requests, not uint8 images"
        )
    return images, seconds / len(requests)


def _measure(
    protocol: Protocol,
    name: str,
    images: npt.NDArray[np.uint8],
    features: npt.NDArray[np.float32],
    texts: npt.NDArray[np.float32],
    *,
    logits: npt.NDArray[np.float32],
    wanted: npt.NDArray[np.bool_],
    fid_kept: float | None,
    seconds_per_image: float,
) -> RuntimeResults:
    top = np.argmax(logits, axis=1)
    success = wanted[np.arange(len(top)), top]
    erased, kept = slice(None, protocol.erased_count), slice(protocol.erased_count, None)
    return RuntimeResults(
        name=name,
        images=images,
        top=top,
        success=success,
        margin=margins(logits, wanted),
        detections=wilson(int(success[erased].sum()), protocol.erased_count),
        kept_accuracy=wilson(int(success[kept].sum()), protocol.kept_count),
        clip_score_erased=clip_score(features[erased], texts[erased]),
        clip_score_kept=clip_score(features[kept], texts[kept]),
        fid_kept=fid_kept,
        seconds_per_image=seconds_per_image,
    )
