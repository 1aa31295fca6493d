"""A world small enough to reason about: an image is one grey level, which says what it shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from excise.eval.protocol import PromptSeeds, Protocol
from excise.eval.results import BASE, EDITED_ONNX, EDITED_TORCH, Results
from excise.serve.runtime import Progress, Request

LABELS = ("gun", "knife", "cat", "owl", "pig")
#: Label → the grey level of its images. Levels are far apart, so noise of ±2 never changes a decision.
LEVELS = {label: 25 + 50 * number for number, label in enumerate(LABELS)}


class GreyDetector:
    """Sees how near an image's mean grey level is to each label's."""

    name = "grey"
    labels = LABELS

    def image_features(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        grey = images.reshape(len(images), -1).mean(1, dtype=np.float64)
        rows = np.exp(-(((grey[:, None] - np.array(list(LEVELS.values()))) / 30) ** 2))
        unit: npt.NDArray[np.float32] = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
        return unit

    def text_features(self, prompts: Sequence[str]) -> npt.NDArray[np.float32]:
        return np.array([[label in prompt for label in LABELS] for prompt in prompts], np.float32)

    def label_logits(self, features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return 20 * features


@dataclass
class GreyRuntime:
    """Paints the prompt's object, but another in the first ``lost_erased`` and ``lost_kept`` images."""

    name: str
    lost_erased: int = 0
    lost_kept: int = 0
    seen: list[Request] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def generate(
        self,
        requests: Sequence[Request],
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        progress: Progress | None = None,
    ) -> npt.NDArray[np.uint8]:
        self.seen, self.settings = list(requests), {"steps": num_inference_steps, "scale": guidance_scale}
        images, counts = [], {"erased": 0, "kept": 0}
        for number, request in enumerate(requests):
            label = next(label for label in LABELS if label in request.prompt)
            group, limit = ("erased", self.lost_erased) if label in ("gun", "knife") else ("kept", self.lost_kept)
            counts[group] += 1
            if counts[group] <= limit:
                label = "pig" if label != "pig" else "owl"
            images.append(np.full((8, 8, 3), LEVELS[label] + request.seed % 3, np.uint8))
            if progress is not None:
                progress(number + 1, len(requests))
        return np.stack(images)


@pytest.fixture
def protocol() -> Protocol:
    """Twenty images of two erased prompts and twenty of two kept ones: an image is five points."""
    return Protocol(
        name="grey",
        erased=tuple(PromptSeeds(f"a {label}", label, tuple(range(10))) for label in ("gun", "knife")),
        kept=tuple(PromptSeeds(f"a {label}", label, tuple(range(10))) for label in ("cat", "owl")),
        labels={label: [f"a {label}"] for label in LABELS},
        erased_labels=frozenset({"gun", "knife"}),
        num_inference_steps=3,
        guidance_scale=2.0,
    )


@pytest.fixture
def detector() -> GreyDetector:
    return GreyDetector()


@pytest.fixture
def grey_runtime() -> type[GreyRuntime]:
    return GreyRuntime


Judged = Callable[..., Results]


@pytest.fixture
def judged(protocol: Protocol, detector: GreyDetector) -> Judged:
    """``judged(base=(lost_erased, lost_kept), torch=…, onnx=…)``: a judgement's results; by default a good edit's."""
    from excise.eval.judge import judge

    def run(
        base: tuple[int, int] = (0, 0), torch: tuple[int, int] = (20, 0), onnx: tuple[int, int] = (20, 0)
    ) -> Results:
        runtimes = {
            role: GreyRuntime(f"{role} (grey)", *lost)
            for role, lost in ((BASE, base), (EDITED_TORCH, torch), (EDITED_ONNX, onnx))
        }
        return judge(protocol, runtimes, detector, progress=False)

    return run
