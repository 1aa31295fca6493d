"""RECE's epochs judged by a zero-shot CLIP: from what the command line names to what an edit is made with.

What it judges by is recorded in the edit (``excise.editmetadata.Detection``): a share of pictures says nothing without
the detector, its labels and the seeds. Paths aren't recorded: a detector is known by its content.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from excise.demo import CLIP
from excise.editmetadata import Detection
from excise.errors import UsageError
from excise.eval.detector import ClipDetector
from excise.eval.epoch_probe import GUIDANCE_SCALE, STEPS, EpochProbe
from excise.manifest import hash_file

if TYPE_CHECKING:
    from excise.edit.model_folder import Sites
    from excise.edit.recipe import Recipe
    from excise.edit.transform import Transform

#: Labels that stand for everything else, at most.
OTHERS = 50

#: Files that decide what a transformers folder computes, besides its weights.
_SETTINGS = (".json", ".txt", ".model")


class ClipProbe:
    """An ``EpochProbe`` with a zero-shot CLIP, as ``excise.edit.erase.erase`` takes it: made by ``clip_probe``.

    The models are loaded at the first call.
    """

    def __init__(
        self,
        folder: Path,
        counted: Sequence[str],
        labels: dict[str, list[str]],
        sites: Sequence[str],
        pipeline: Callable[[], Any],
        *,
        images: int,
        device: str,
        progress: bool,
    ) -> None:
        """``labels`` are all labels with their prompts, ``counted`` those of the concept; else as ``clip_probe``."""
        self._folder, self._counted, self._labels, self._sites = folder, tuple(counted), labels, list(sites)
        self._pipeline, self._images, self._device, self._progress = pipeline, images, device, progress

    @cached_property
    def detection(self) -> Detection:
        """What judges, by how many pictures; which concepts are shown is left open. Reads the detector's files."""
        return Detection(
            detector="CLIP, zero-shot: the top label",
            fingerprint=detector_fingerprint(self._folder),
            labels=self._counted,
            others=tuple(label for label in self._labels if label not in self._counted),
            seeds=tuple(range(self._images)),
            scheduler="DDIM",
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE_SCALE,
        )

    def __call__(self, derived: Tensor, edit: Transform, /) -> float:
        """As ``EpochProbe``, under an edit of all the sites in their order."""
        return self._loaded(derived, lambda name, weight: edit.on_weight(weight, self._sites.index(name)))

    @cached_property
    def _loaded(self) -> EpochProbe:
        detector = ClipDetector(self._folder, self._labels, device=self._device)
        return EpochProbe(
            self._pipeline().to(self._device),
            detector,
            self._counted,
            self._sites,
            images=self._images,
            progress=self._progress,
        )


def clip_probe(
    recipe: Recipe,
    sites: Sites,
    pipeline: Callable[[], Any],
    *,
    detector: str,
    labels: Sequence[str] = (),
    others: Sequence[str] = (),
    images: int = 4,
    device: str = "cpu",
    progress: bool = True,
) -> ClipProbe:
    """What ``excise.edit.erase.erase`` takes as a probe: an ``EpochProbe`` with a zero-shot CLIP.

    Names are checked at once; the models are loaded at the first call.

    Args:
        recipe: of the edit.
        sites: that the edit moves, in the order in which it was solved for them.
        pipeline: loads the pipeline, unedited, on the CPU.
        detector: ``clip:DIR``, a transformers folder, or ``clip:demo``, the bundled CLIP.
        labels: count as the concept; by default the concepts of the recipe.
        others: don't; by default at most ``OTHERS`` of the targets and the kept prompts, evenly spread, but for blank
            ones and those that count.
        images: as of ``EpochProbe``, and so ``progress``.
        device: where both models run.

    Raises:
        UsageError: a recipe without RECE epochs, a model that isn't a Stable Diffusion 1 or 2, or a detector, labels
            or a number of images that can't be used.
    """
    if recipe.method != "rece" or recipe.epochs == 0:
        raise UsageError("--detector judges RECE's epochs: give --method rece, and --epochs auto or 1 or more")
    if sites.family.name != "stable-diffusion":
        raise UsageError(f"--detector judges Stable Diffusion 1 and 2 only, not family {sites.family.name}")
    if images < 1:
        raise UsageError(f"--detector-images {images}: give 1 or more")
    folder, pairs = _clip_folder(detector), recipe.pairs()
    prompts = chain((target for _, target in pairs), recipe.kept(pairs))
    counted, known = zero_shot_labels(labels or [concept for concept, _ in pairs], others, prompts)
    names = list(sites.streams["text"])
    return ClipProbe(folder, counted, known, names, pipeline, images=images, device=device, progress=progress)


def _clip_folder(detector: str) -> Path:
    """The folder that ``clip:DIR`` names."""
    kind, _, place = detector.partition(":")
    if kind != "clip" or not place:
        raise UsageError(f"--detector {detector} is not clip:DIR: name a CLIP's folder, or clip:demo")
    folder = CLIP if place == "demo" else Path(place)
    if not (folder / "config.json").is_file():
        raise UsageError(f"--detector {detector}: {folder} has no config.json: name a transformers CLIP folder")
    return folder


def detector_fingerprint(folder: Path) -> str:
    """SHA-256 over a transformers folder's weights and settings, whatever it is called and wherever it lies.

    Of the weights, safetensors count where there are any, else pickles: transformers reads the same.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    weights = [path for path in files if path.suffix == ".safetensors"] or [p for p in files if p.suffix == ".bin"]
    digest = hashlib.sha256()
    for path in (*weights, *(path for path in files if path.suffix in _SETTINGS)):
        digest.update(f"{path.name} {hash_file(path)}\n".encode())
    return digest.hexdigest()


def zero_shot_labels(
    concepts: Iterable[str], others: Sequence[str], prompts: Iterable[str]
) -> tuple[tuple[str, ...], dict[str, list[str]]]:
    """The labels that count as the concept, and every label with its one prompt: itself.

    Args:
        concepts: count.
        others: don't.
        prompts: stand for ``others`` where those are none, as ``clip_probe`` says.

    Raises:
        UsageError: nothing counts, nothing else is left, or one text is both.
    """
    counted = tuple(dict.fromkeys(filter(str.strip, concepts)))
    if not counted:
        raise UsageError("no label counts as the concept: give --erase TEXT or --detector-label TEXT")
    if both := [text for text in others if text in counted]:
        raise UsageError(f"{both[0]!r} is the concept and --detector-other: remove it from one of the two")
    rest = [text for text in dict.fromkeys(others or prompts) if text.strip() and text not in counted]
    if not rest:
        raise UsageError("nothing to tell the concept from: give --detector-other TEXT, such as what else is drawn")
    if not others:
        number = min(OTHERS, len(rest))
        rest = [rest[place * len(rest) // number] for place in range(number)]
    return counted, {text: [text] for text in (*counted, *rest)}
