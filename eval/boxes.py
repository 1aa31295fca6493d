"""What a detector found in an image: named boxes with scores, and their JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from excise.errors import ArtefactError


@dataclass(frozen=True)
class Box:
    """One detection: its class, its score from 0 to 1, and x, y, width and height in whole pixels of the image."""

    name: str
    score: float
    box: tuple[int, int, int, int]


def observation(boxes: Iterable[Box]) -> dict[str, Any]:
    """The boxes of one image as JSON values; ``boxes_of`` gives equal boxes back, scores to the last bit."""
    return {"boxes": [{"name": one.name, "score": one.score, "box": list(one.box)} for one in boxes]}


def boxes_of(observation: Mapping[str, Any]) -> tuple[Box, ...]:
    """The boxes in an observation.

    Raises:
        ArtefactError: It isn't one of boxes.
    """
    try:
        found = [
            (one["name"], float(one["score"]), tuple(int(end) for end in one["box"])) for one in observation["boxes"]
        ]
        return tuple(Box(name, score, (x, y, width, height)) for name, score, (x, y, width, height) in found)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtefactError(f"this is no observation of boxes: {str(dict(observation))[:80]}") from error
