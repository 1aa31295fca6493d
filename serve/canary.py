"""A canary: what a served model has to make of a few fixed prompts and seeds, so that another model is noticed.

``record`` denoises them where the artefact is built, ``run`` does it again where it is served and compares the final
latents. It catches what hashes of files can't: an engine of other weights, a provider that falls back, memory that
was overwritten, an edit that isn't in effect.

The figure is, over all probes, the largest |x − x̂| / rms(x̂), where x̂ are the recorded latents (c, h, w): relative to
the latents' size, and not averaged over their elements, since one wrong weight may show in few of them.

**Tolerance.** Batch sizes and numbers of threads change the order of sums. ``record`` measures how far that moves the
latents and allows ``HEADROOM`` times as much, at least ``LEAST_TOLERANCE``, for machines round differently too. A
canary that couldn't fail is refused: where the folder keeps its unedited weights, they must move the latents of the
most telling prompt by more than ``CONTRAST`` times the tolerance.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from excise.errors import ArtefactError, ExciseError, UsageError
from excise.manifest import NAME, hash_file
from excise.serve.canary_record import FORMAT, Canary, Probe, stored
from excise.serve.runtime import Request

Latents = npt.NDArray[np.float32]
Images = npt.NDArray[np.uint8]

#: Given images, uint8 with shape (n, height, width, 3): which of them show what was erased.
Detector = Callable[[Images], Sequence[bool]]

#: Prompts that every model can draw, where nobody names what is kept.
KEPT = ("a photo of a cat", "a house by a tree")
STEPS, GUIDANCE_SCALE = 8, 7.5
LEAST_TOLERANCE, MOST_TOLERANCE, HEADROOM, CONTRAST = 1e-3, 0.1, 8.0, 4.0


class Canaried(Protocol):
    """A runtime whose latents can be looked at, such as ``OnnxRuntime``."""

    edit_id: str | None
    bank: tuple[str | None, ...] | None

    def denoise(
        self, requests: Sequence[Request], *, num_inference_steps: int = 50, guidance_scale: float = 7.5
    ) -> Latents:
        """The final latents, float32 with shape (n, c, h, w)."""
        ...

    def decode(self, latents: Latents) -> Images:
        """Their images, uint8 with shape (n, h, w, 3)."""
        ...


@dataclass(frozen=True)
class CanaryResult:
    """What a canary found. ``reason`` is one line, empty where it passed.

    ``difference`` is the figure above, None where there is none (another edit, a runtime that fails, values that
    aren't finite). ``detected`` are the prompts whose images show what was erased.
    """

    passed: bool
    reason: str
    difference: float | None
    tolerance: float
    detected: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, object]:
        """Plain data for JSON."""
        return {**self.__dict__, "detected": list(self.detected)}


def run(runtime: Canaried, canary: Canary, *, detector: Detector | None = None) -> CanaryResult:
    """Denoise a canary's probes, one after the other, and compare. Whatever fails in excise is a result, not an error.

    Args:
        runtime: What is served.
        canary: What was recorded of it.
        detector: Looks at the images of the prompts of what was erased; None looks at none.
    """
    start = time.monotonic()

    def result(reason: str, difference: float | None = None, detected: tuple[str, ...] = ()) -> CanaryResult:
        seconds = time.monotonic() - start
        return CanaryResult(not reason, reason, difference, canary.tolerance, detected, seconds)

    if runtime.edit_id != canary.edit_id or set(runtime.bank or ()) != set(canary.bank):
        return result(f"the canary was recorded of {_named(canary.edit_id)}, and this is {_named(runtime.edit_id)}")
    worst, shown = 0.0, []
    for probe in canary.probes:
        try:
            latents = _latents(runtime, [probe], canary.num_inference_steps, canary.guidance_scale)
            difference = relative_difference(latents[0], probe.values())
            seen = probe.erased and detector is not None and any(detector(runtime.decode(latents)))
        except ExciseError as error:
            return result(f"{probe.prompt!r}: {error}")
        if not np.isfinite(difference):
            return result(f"{probe.prompt!r}: the latents have another shape than the recorded ones, or aren't finite")
        worst = max(worst, difference)
        if difference > canary.tolerance:
            return result(
                f"{probe.prompt!r} with seed {probe.seed}: the latents are {difference:.2g} from the recorded ones, "
                f"relatively, and {canary.tolerance:.2g} is rounding: other weights are in effect",
                worst,
            )
        if seen:
            shown.append(probe.prompt)
    if shown:
        return result(f"the image of {shown[0]!r} shows what was erased", worst, tuple(shown))
    return result("", worst)


def record(
    runtime: Canaried | Path | str,
    *,
    erased: Iterable[str] = (),
    kept: Iterable[str] = KEPT,
    seed: int = 0,
    num_inference_steps: int = STEPS,
    guidance_scale: float = GUIDANCE_SCALE,
    tolerance: float | None = None,
    detector: Detector | None = None,
    manifest_sha256: str | None = None,
    repeats: Sequence[Canaried] = (),
    unedited: Canaried | None = None,
) -> Canary:
    """What this model makes of the prompts.

    Args:
        runtime: The model; or the folder of an export, of which everything below ``detector`` is then found out.
        erased: Prompts of what the edit erases. Of a bank, every prompt is asked of every edit.
        kept: Prompts of what it keeps.
        seed: Of the first probe, and one more for each.
        num_inference_steps: Each of them costs 2 calls of the UNet for each probe.
        guidance_scale: Of all probes.
        tolerance: The largest difference that passes; None measures it.
        detector: Sees none of the erased prompts' images show what was erased, or there is no canary.
        manifest_sha256: Of the folder's ``excise.json``.
        repeats: The same model, opened with other options, to measure the tolerance by.
        unedited: The model without its one edit, to make sure that it would be noticed.

    Raises:
        UsageError: No prompts, or a number of steps or a tolerance that can't be used.
        ArtefactError: The model isn't repeatable, shows what was erased, or its unedited weights would pass.
    """
    if isinstance(runtime, Path | str):
        from excise.serve.canary_folder import opened

        folder = Path(runtime)
        runtime, repeats, unedited = opened(folder)
        manifest_sha256 = hash_file(folder / NAME) if (folder / NAME).is_file() else None
    chosen = [(prompt, True) for prompt in dict.fromkeys(erased)]
    chosen += [(prompt, False) for prompt in dict.fromkeys(kept) if (prompt, True) not in chosen]
    if not chosen:
        raise UsageError("a canary without prompts can't fail: give it at least one")
    edits: Sequence[str | None] = runtime.bank or (None,)
    asked = [
        Probe(prompt=prompt, erased=is_erased and not (runtime.bank and edit is None), seed=seed + row, edit=edit)
        for edit in edits
        for row, (prompt, is_erased) in enumerate(chosen)
    ]
    steps, scale = num_inference_steps, guidance_scale
    latents = np.concatenate([_latents(runtime, [probe], steps, scale) for probe in asked])
    others = [_latents(other, asked, steps, scale) for other in (runtime, *repeats)]
    measured = max(relative_difference(one, row) for other in others for one, row in zip(other, latents, strict=True))
    allowed = max(LEAST_TOLERANCE, HEADROOM * measured) if tolerance is None else tolerance
    if not 0 < allowed <= MOST_TOLERANCE or not measured <= allowed:
        raise (UsageError if tolerance is not None else ArtefactError)(
            f"the same prompts and seeds give latents that differ by {measured:.2g}, and a tolerance of {allowed:.2g} "
            f"isn't between that and {MOST_TOLERANCE}: no canary can tell this model from another"
        )
    contrast = None
    if unedited is not None:
        plain = _latents(unedited, asked, steps, scale)
        contrast = max(relative_difference(one, row) for one, row in zip(plain, latents, strict=True))
        if not contrast > CONTRAST * allowed:
            raise ArtefactError(
                f"without its edit the model's latents are within {contrast:.2g} of these, with a tolerance of "
                f"{allowed:.2g}: give prompts of what it erases"
            )
    if detector is not None:
        for probe, row in zip(asked, latents, strict=True):
            if probe.erased and any(detector(runtime.decode(row[None]))):
                raise ArtefactError(f"the image of {probe.prompt!r} shows what was erased: the edit isn't enough")
    return Canary(
        format=FORMAT,
        edit_id=runtime.edit_id,
        bank=tuple(runtime.bank or ()),
        manifest_sha256=manifest_sha256,
        num_inference_steps=steps,
        guidance_scale=scale,
        tolerance=allowed,
        measured=measured,
        contrast=contrast,
        probes=tuple(
            probe.model_copy(update={"latents": stored(row)}) for probe, row in zip(asked, latents, strict=True)
        ),
    )


def relative_difference(latents: Latents, recorded: Latents) -> float:
    """|x − x̂|∞ / rms(x̂) of two latents with shape (c, h, w); infinite for other shapes, NaN or infinity."""
    if latents.shape != recorded.shape:
        return float("inf")
    size = float(np.sqrt(np.mean(np.square(recorded, dtype=np.float64))))
    found = float(np.abs(latents.astype(np.float64) - recorded).max()) / max(size, float(np.finfo(np.float32).tiny))
    return found if np.isfinite(found) else float("inf")


def _latents(runtime: Canaried, probes: Sequence[Probe], steps: int, scale: float) -> Latents:
    requests = [Request(probe.prompt, seed=probe.seed, edit=probe.edit) for probe in probes]
    return runtime.denoise(requests, num_inference_steps=steps, guidance_scale=scale)


def _named(edit_id: str | None) -> str:
    return f"edit {edit_id[:12]}…" if edit_id is not None else "a model or bank without one edit"
