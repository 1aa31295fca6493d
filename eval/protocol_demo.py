"""The prompts of the bundled demo model's protocols, made from its vocabulary: no file, no network, no PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from excise.demo.vocabulary import ARTISTS, OBJECTS, article, caption


@dataclass(frozen=True)
class Subject:
    """One prompt, what its images should be recognised as, and the seeds to draw it with."""

    name: str  #: unique; the case's id is this and the seed
    prompt: str
    label: str
    first_seed: int = 0
    seed_step: int = 1

    def seeds(self, images: int) -> range:
        """As many seeds as ``images``."""
        return range(self.first_seed, self.first_seed + self.seed_step * images, self.seed_step)


def objects() -> tuple[Subject, ...]:
    """``a gun``, ``an axe``, … for every object, the weapons first; seeds from 0, as ``eval/protocol.py`` has them."""
    return tuple(Subject(name, f"{article(name)} {name}", name) for name in OBJECTS)


def styles() -> tuple[Subject, ...]:
    """``a noto cat``, … for every artist and object; an artist's first seed is the one of ``demo/measure.py``."""
    return tuple(
        Subject(
            name=f"{artist}-{name}",
            prompt=caption("a {artist} {object}", artist=artist, object=name),
            label=artist,
            first_seed=100 + number,
            seed_step=len(ARTISTS),
        )
        for number, artist in enumerate(ARTISTS)
        for name in OBJECTS
    )


#: What ``prompts.builtin`` names.
BUILTIN: Final[Mapping[str, Callable[[], tuple[Subject, ...]]]] = {"demo-objects": objects, "demo-styles": styles}
