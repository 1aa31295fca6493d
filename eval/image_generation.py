"""The images of an evaluation's cases: resumable, and the same files wherever a run was ended.

The batch that an image is computed in is a function of the list of cases alone: the cases of one guidance scale and
size, in order, cut into shards of ``batch_size``. A shard that isn't complete is computed as a whole again, and only
what is missing of it is written, so that rounding never depends on where a run was ended.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from excise.errors import ArtefactError, OutputError, UsageError
from excise.eval.cases import Case
from excise.eval.image_file import (
    ImageFormat,
    ImageMetadata,
    ImageState,
    encode_image,
    image_size,
    inspect_image,
    write_image,
)
from excise.serve.runtime import Progress, Request, Runtime

#: Where the runtimes' folders of images are.
IMAGES = "images"

#: The cases of one batch, all of one guidance scale and size.
Shard = tuple[Case, ...]


@dataclass(frozen=True)
class GenerationSettings:
    """What the images of one runtime depend on besides the cases.

    Raises:
        UsageError: no steps.
    """

    num_inference_steps: int
    edit_id: str | None = None  #: of the edit that the runtime serves, as far as it says
    depends_on: Mapping[str, Any] = field(default_factory=dict)  #: all else, such as the runtime's source: JSON
    image_format: ImageFormat = "png"

    def __post_init__(self) -> None:
        if self.num_inference_steps < 1:
            raise UsageError(f"num_inference_steps must be at least 1, not {self.num_inference_steps}")


@dataclass(frozen=True)
class Generated:
    """All images of one runtime.

    Attributes:
        files: By case id, in the order of the cases.
        made: How many were written now.
        damaged: Ids of the cases whose images were there, damaged, and were made again.
        seconds: Spent in the runtime, for ``computed`` images.
        computed: Images that the runtime made now, those of incomplete shards that were there already included.
    """

    files: dict[str, Path]
    made: int
    damaged: tuple[str, ...]
    seconds: float
    computed: int

    @property
    def seconds_per_image(self) -> float | None:
        """Of this run; None where nothing was left to do."""
        return self.seconds / self.computed if self.computed else None


def shards(cases: Sequence[Case], batch_size: int) -> tuple[Shard, ...]:
    """The batches that cases are computed in: by guidance scale and size in the order of first appearance, then as they
    stand.

    Raises:
        UsageError: no case, two of one id, or no batch.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, not {batch_size}")
    if not cases:
        raise UsageError("there is no case to generate an image of")
    ids = [case.id for case in cases]
    if len(set(ids)) < len(ids):
        repeated = next(one for one in ids if ids.count(one) > 1)
        raise UsageError(f"two cases are called {repeated}: an image's file is named by its case")
    settings: dict[tuple[float, tuple[int, int] | None], list[Case]] = {}
    for case in cases:
        settings.setdefault((case.guidance_scale, case.size), []).append(case)
    return tuple(
        tuple(alike[start : start + batch_size])
        for alike in settings.values()
        for start in range(0, len(alike), batch_size)
    )


def digest(value: Any) -> str:
    """SHA-256 of anything that JSON can hold, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def cases_digest(cases: Iterable[Case]) -> str:
    """SHA-256 of a list of cases with all that they say, in its order; a size counts where a case asks for one."""
    optional = ("height", "width")
    said = [
        {name: value for name, value in asdict(case).items() if value is not None or name not in optional}
        for case in cases
    ]
    return digest(said)


def generate(
    folder: Path,
    name: str,
    cases: Sequence[Case],
    runtime: Runtime,
    settings: GenerationSettings,
    *,
    batch_size: int,
    progress: bool = True,
) -> Generated:
    """Every case's image, ``folder/images/name/ID.png``: those that are there already are kept.

    Two of these must not write to one folder at a time: ``run_folder.open_run`` sees to it.

    Args:
        name: the runtime's, as in its specification.
        progress: show bars with rate and remaining time on stderr.

    Raises:
        UsageError: the cases or settings can't be used.
        OutputError: an image that is there was made from something else, or none can be written.
        ArtefactError, UsageError: of the runtime. Whatever was raised, finished images stay.
    """
    plan = Plan(folder, name, cases, settings, batch_size, progress=progress)
    with plan.bar(progress) as bar:
        for shard in plan.incomplete:
            before, size = int(bar.n), plan.missing_of(shard)

            def report(done: int, total: int, start: int = before, size: int = size) -> None:
                # whole images, so that the rate is in images; never backwards
                bar.update(max(0, start + size * done // total - bar.n))

            images, seconds = compute(runtime, shard, settings.num_inference_steps, report)
            plan.store(shard, images, seconds)
            bar.update(before + size - bar.n)
    return plan.result()


def compute(
    runtime: Runtime, shard: Shard, num_inference_steps: int, progress: Progress | None = None
) -> tuple[npt.NDArray[np.uint8], float]:
    """A shard's images, uint8 with shape (n, height, width, 3), and the seconds that they took.

    Raises:
        ArtefactError: the runtime returned something else than as many images.
    """
    requests = [
        Request(case.prompt, negative_prompt=case.negative_prompt, seed=case.seed, height=case.height, width=case.width)
        for case in shard
    ]
    started = time.perf_counter()
    images = runtime.generate(
        requests,
        num_inference_steps=num_inference_steps,
        guidance_scale=shard[0].guidance_scale,
        progress=progress,
    )
    seconds = time.perf_counter() - started
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) != len(shard) or images.shape[3] != 3:
        raise ArtefactError(
            f"{runtime.name} returned {images.dtype} with shape {images.shape} for {len(shard)} requests, not that "
            "many uint8 images"
        )
    return images, seconds


class Plan:
    """What is left to do of one runtime's images, and where they go. Arguments and errors are those of ``generate``."""

    def __init__(
        self,
        folder: Path,
        name: str,
        cases: Sequence[Case],
        settings: GenerationSettings,
        batch_size: int,
        *,
        progress: bool,
    ) -> None:
        if Path(name).name != name:
            raise UsageError(f"{name!r} can't name a runtime's folder: take a name without '/'")
        planned = shards(cases, batch_size)
        self.name, self._format = name, settings.image_format
        self._folder = folder / IMAGES / name
        hashed = digest(
            {"depends_on": dict(settings.depends_on), "batch_size": batch_size, "cases": cases_digest(cases)}
        )
        self._metadata = {
            case.id: ImageMetadata(
                case=case.id,
                prompt=case.prompt,
                negative_prompt=case.negative_prompt,
                seed=case.seed,
                guidance_scale=case.guidance_scale,
                num_inference_steps=settings.num_inference_steps,
                runtime=name,
                edit_id=settings.edit_id,
                settings=hashed,
            )
            for case in cases
        }
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self._folder} can't be made: {error.strerror}") from error
        #: What a case asks for → (height, width) of its image, of those that are there.
        self._sizes: dict[tuple[int, int] | None, tuple[int, int]] = {
            case.size: case.size for case in cases if case.size
        }
        self._asked = {case.id: case.size for case in cases}
        states = self._look(progress)
        self._missing = {id for id, state in states.items() if state is not ImageState.WHOLE}
        self._damaged = tuple(id for id, state in states.items() if state is ImageState.DAMAGED)
        self._total, self._left = len(cases), len(self._missing)
        self._seconds, self._computed = 0.0, 0
        #: The shards of which an image is missing or damaged.
        self.incomplete: tuple[Shard, ...] = tuple(shard for shard in planned if self.missing_of(shard))

    def _look(self, progress: bool) -> dict[str, ImageState]:
        """What is at every image's place, before anything is computed."""
        states = {}
        shown = progress and any(self._folder.iterdir())
        for id, metadata in tqdm(
            self._metadata.items(), f"{self.name}: looking", unit="image", file=sys.stderr, disable=not shown
        ):
            states[id] = inspect_image(self.path(id), metadata)
            if states[id] is ImageState.WHOLE and self._asked[id] not in self._sizes:
                self._sizes[self._asked[id]] = image_size(self.path(id))
        return states

    def path(self, id: str) -> Path:
        """Where a case's image is."""
        return self._folder / f"{id}.{self._format}"

    def missing_of(self, shard: Shard) -> int:
        """How many images of a shard are to be written."""
        return sum(case.id in self._missing for case in shard)

    def bar(self, progress: bool) -> tqdm[Any]:
        """A progress bar over all images, at those that are there; a context manager."""
        return tqdm(
            total=self._total,
            initial=self._total - self._left,
            desc=self.name,
            unit="image",
            file=sys.stderr,
            disable=not progress,
        )

    def store(self, shard: Shard, images: npt.NDArray[np.uint8], seconds: float) -> None:
        """Write what is missing of a shard; ``images`` are all of it, with shape (n, height, width, 3).

        Raises:
            ArtefactError: they have another size than their cases ask for, or than the images that are there.
            OutputError: one can't be written; those before it stay.
        """
        height, width = images.shape[1:3]
        asked = shard[0].size
        wanted = self._sizes.setdefault(asked, (height, width))
        if (height, width) != wanted:
            made = f"{self.name} made images of {width} × {height} pixels"
            if asked is None:
                raise ArtefactError(
                    f"{made}, and those before have {wanted[1]} × {wanted[0]}: it must keep to one size"
                )
            raise ArtefactError(
                f"{made}, and case {shard[0].id} asks for {wanted[1]} × {wanted[0]}: give --image-size own to take "
                "each model's own, or a runtime that can make it"
            )
        self._seconds, self._computed = self._seconds + seconds, self._computed + len(shard)
        for case, image in zip(shard, images, strict=True):
            if case.id in self._missing:
                write_image(self.path(case.id), encode_image(image, self._metadata[case.id], self._format))

    def result(self) -> Generated:
        """What there is once every incomplete shard was stored."""
        return Generated(
            files={id: self.path(id) for id in self._metadata},
            made=self._left,
            damaged=self._damaged,
            seconds=self._seconds,
            computed=self._computed,
        )
