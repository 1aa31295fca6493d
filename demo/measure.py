"""Measure the demo model: the detector on fresh real images, and the generator by the detector; draw a grid.

Protocol: "a {object}" for every object × 8 seeds, and "a {artist} {object}" for every artist × object; 50 DDIM steps,
guidance 5. Zero-shot labels are all objects ("a {object}") or all artists ("art by {artist}").
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from excise.demo.composition import Composer
from excise.demo.vocabulary import ARTISTS, OBJECTS, caption
from excise.eval.detector import ClipDetector
from excise.serve.runtime import Request, Runtime

STEPS = 50
GUIDANCE = 5.0


@dataclass(frozen=True)
class Figures:
    """Shares between 0 and 1, and how many images each rests on."""

    real_images: int
    real_object: float
    real_artist: float
    generated_images: int
    generated_object: float
    styled_images: int
    styled_artist: float
    styled_object: float

    def lines(self) -> list[str]:
        """The figures as a Markdown table."""
        rows = [
            ("detector, freshly composed images: right object", self.real_object, self.real_images),
            ("detector, freshly composed images: right artist", self.real_artist, self.real_images),
            ('generated "a {object}": right object', self.generated_object, self.generated_images),
            ('generated "a {artist} {object}": right artist', self.styled_artist, self.styled_images),
            ('generated "a {artist} {object}": right object', self.styled_object, self.styled_images),
        ]
        return ["| what | share | images |", "|---|---|---|"] + [f"| {w} | {100 * s:.1f} % | {n} |" for w, s, n in rows]

    def dict(self) -> dict[str, float]:
        """As plain data."""
        return asdict(self)


def measure(runtime: Runtime, clip: Path, artwork: Path, grid: Path, *, seeds: int = 8) -> Figures:
    """Measure a runtime of the demo model and write ``grid`` (a PNG: one picture an object and artist)."""
    by_object = ClipDetector(clip, {name: [caption("{a} {object}", object=name)] for name in OBJECTS})
    by_artist = ClipDetector(clip, {name: [f"art by {name}"] for name in ARTISTS})
    real = Composer(artwork, seed=123_456_789).draw(2000)
    real_object = float(np.mean(by_object.detect(real.images) == real.objects))
    real_artist = float(np.mean(by_artist.detect(real.images) == real.artists))

    def generate(prompts: list[tuple[str, int]], label: str) -> np.ndarray:
        images = []
        for start in tqdm(range(0, len(prompts), 32), desc=label):
            requests = [Request(prompt, seed=seed) for prompt, seed in prompts[start : start + 32]]
            images.append(runtime.generate(requests, num_inference_steps=STEPS, guidance_scale=GUIDANCE))
        return np.concatenate(images)

    plain = [(caption("a {object}", object=name), seed) for name in OBJECTS for seed in range(seeds)]
    generated = generate(plain, "a {object}")
    wanted = np.repeat(np.arange(len(OBJECTS)), seeds)
    styled = [
        (caption("a {artist} {object}", artist=artist, object=name), 100 + number)
        for number, artist in enumerate(ARTISTS)
        for name in OBJECTS
    ]
    artful = generate(styled, "a {artist} {object}")
    wanted_artist = np.repeat(np.arange(len(ARTISTS)), len(OBJECTS))
    found = by_object.detect(generated)
    for index, name in enumerate(OBJECTS):
        wrong = [list(OBJECTS)[o] for o in found[wanted == index] if o != index]
        if wrong:
            tqdm.write(f"{name}: taken for {', '.join(wrong)}")
    edge = artful.shape[1]
    rows = artful.reshape(len(ARTISTS), len(OBJECTS) // 20, 20, edge, edge, 3).transpose(1, 0, 2, 3, 4, 5)
    sheet = rows.reshape(-1, 20, edge, edge, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 20 * edge, 3)
    Image.fromarray(sheet).save(grid)
    return Figures(
        len(real.images),
        real_object,
        real_artist,
        len(generated),
        float(np.mean(found == wanted)),
        len(artful),
        float(np.mean(by_artist.detect(artful) == wanted_artist)),
        float(np.mean(by_object.detect(artful) == np.tile(np.arange(len(OBJECTS)), len(ARTISTS)))),
    )
