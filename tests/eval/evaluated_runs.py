"""An evaluation's run in a world of grey images: a protocol of its own, runtimes that paint, a CLIP that reads grey."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from excise.errors import ArtefactError
from excise.eval import evaluate as module
from excise.eval.evaluate import Run
from excise.eval.evaluation import Evaluation
from excise.eval.evaluation_report import as_json, write_anew
from excise.eval.feature_extractor import Fingerprint
from excise.eval.protocol_choice import Choice
from excise.eval.protocol_comparisons import Roles
from excise.eval.protocol_file import load_protocol
from excise.eval.protocol_models import ProtocolModels
from excise.eval.runtime_spec import RuntimeSpec
from excise.serve.runtime import Progress, Request

LABELS = ("Gun", "knife", "cat", "owl")
#: Label → the grey level of its images, far apart.
LEVELS = {label: 30 + 60 * number for number, label in enumerate(LABELS)}

PROTOCOL = """
format: 1
name: grey
version: 1
title: Grey images
prompts: {source: file, file: grey.csv, columns: {prompt: prompt, seed: seed, label: label, id: id}}
groups: {erased: [gun, knife]}
sampling: {num_inference_steps: 4, guidance_scale: 2}
detectors: [{name: clip, version: "1", model: "demo:clip", label_prompts: ["{label}"]}]
rules: [{name: top1, kind: label}, {name: top2, kind: label, top: 2}]
metrics:
  - {name: clip_score, model: "demo:clip", groups: [erased, kept]}
  - {name: fid, model: "demo:clip", groups: [kept], against: [base, reference]}
  - {name: psnr, groups: [erased, kept], against: [base, reference]}
paper:
  - {measure: detected.top1, method: RECE, value: 0.1, source: a paper}
"""


def written_protocol(folder: Path, text: str = PROTOCOL, *, seeds: int = 3) -> Path:
    """The protocol's file with its prompts beside it: every label with as many seeds."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f"{label}-{seed},a {label},{seed},{label}" for label in LABELS for seed in range(seeds)]
    (folder / "grey.csv").write_text("\n".join(["id,prompt,seed,label", *rows]) + "\n")
    (folder / "grey.yaml").write_text(text)
    return folder / "grey.yaml"


@dataclass
class Clip:
    """A CLIP in four dimensions, one a label: how near the mean grey is to each label's level."""

    name: str = "demo:clip"
    looked: int = 0  #: images
    weights: str = "0" * 64
    dimension: int = len(LABELS)
    logit_scale: float = 20.0
    prompt_limit: int = 5

    @property
    def fingerprint(self) -> Fingerprint:
        return Fingerprint(name=self.name, weights=self.weights, preprocessing="mean grey")

    def image_features(self, images: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
        self.looked += len(images)
        grey = np.array([float(image.mean()) for image in images])
        rows = np.exp(-(((grey[:, None] - np.array(list(LEVELS.values()))) / 40) ** 2))
        unit: npt.NDArray[np.float32] = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
        return unit

    def text_features(self, prompts: Sequence[str], *, truncate: bool = False) -> npt.NDArray[np.float32]:
        return np.array([[label in prompt for label in LABELS] for prompt in prompts], np.float32)

    def token_count(self, prompt: str) -> int:
        return len(prompt.split())


@dataclass
class Painter:
    """Paints the prompt's label with noise of its seed, but the labels in ``lost`` as a cat; may fail in a call."""

    name: str
    lost: tuple[str, ...] = ()
    noise: int = 0  #: of the runtime: added to the seed of every second pixel
    size: int = 8
    stop_at: int | None = None
    calls: int = 0
    steps: list[int] = field(default_factory=list)

    def generate(
        self,
        requests: Sequence[Request],
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        progress: Progress | None = None,
    ) -> npt.NDArray[np.uint8]:
        if self.calls == self.stop_at:
            raise ArtefactError(f"{self.name} has vanished")
        self.calls += 1
        self.steps.append(num_inference_steps)
        return np.stack([self._painted(request) for request in requests])

    def _painted(self, request: Request) -> npt.NDArray[np.uint8]:
        label = next(label for label in LABELS if label in request.prompt)
        level = LEVELS["cat" if label in self.lost else label]
        image = np.random.default_rng(request.seed).integers(-9, 10, (self.size, self.size, 3)) + level
        image[::2] += self.noise * ((request.seed + np.arange(self.size)[:, None]) % 2)
        return image.astype(np.uint8)


#: By name: the unedited model, the edited one, and a runtime that serves it.
def painters() -> dict[str, Painter]:
    return {
        "base": Painter("base"),
        "edited": Painter("edited", lost=("Gun", "knife")),
        "served": Painter("served", lost=("Gun", "knife"), noise=1),
    }


def spec(name: str) -> RuntimeSpec:
    """A server that nobody asks: the painter of its name takes its place."""
    return RuntimeSpec(name, "openai", "http://127.0.0.1:1", source="openai:http://127.0.0.1:1")


def no_pipeline(*_: object) -> None:
    raise AssertionError("a server needs no PyTorch")


def clip_models(clip: Clip | None = None) -> ProtocolModels:
    return ProtocolModels({}, _opened={"clip demo:clip": clip or Clip()})


@dataclass
class Started:
    """What a run was started with, for tests to look into."""

    evaluation: Evaluation
    said: list[str]

    @property
    def report(self) -> bytes:
        return as_json(self.evaluation)


def start(
    folder: Path,
    protocol: Path,
    patch: pytest.MonkeyPatch,
    *,
    made: dict[str, Painter] | None = None,
    models: ProtocolModels | None = None,
    roles: Roles | None = None,
    batch_size: int = 4,
    edit_seconds: Mapping[str, float] | None = None,
    before: Callable[[], None] = lambda: None,
    **chosen: Any,
) -> Started:
    """Run the protocol, and write ``report.json``; ``chosen`` are fields of ``Choice``."""
    made = painters() if made is None else made
    said: list[str] = []
    patch.setattr(module, "open_runtime", lambda one, _: made[one.name])
    run = Run(
        folder=folder,
        specs=[spec(name) for name in made],
        roles=Roles(base="base", reference="edited") if roles is None else roles,
        models=clip_models() if models is None else models,
        load_pipeline=no_pipeline,
        batch_size=batch_size,
        progress=False,
        edit_seconds=edit_seconds or {},
        say=said.append,
    )
    evaluation = module.evaluate([Choice(load_protocol(protocol), **chosen)], run)
    before()
    write_anew(folder / "report.json", as_json(evaluation))
    return Started(evaluation, said)


def tree(folder: Path) -> dict[str, str]:
    """Path → SHA-256 of every file."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
