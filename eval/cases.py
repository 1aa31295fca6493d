"""What an evaluation asks for: one case an image, the same for every runtime."""

from __future__ import annotations

import re
from dataclasses import dataclass

from excise.errors import UsageError

#: A case names a file.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

#: The sides of an image are multiples of so many pixels.
SIDE = 8

#: The groups that figures are made of: prompts of what was erased, and of what was to be kept.
ERASED, KEPT = "erased", "kept"


@dataclass(frozen=True)
class Case:
    """One image to generate.

    Raises:
        UsageError: an id that can't name a file, a negative seed, or a size that no model makes.
    """

    id: str  #: unique in its protocol, such as the row's case number; also the image's file name
    prompt: str
    seed: int
    guidance_scale: float
    group: str = ERASED  #: ``erased``, ``kept``, or another that the protocol names
    label: str | None = None  #: the prompt's category or class: the stratum of a sample, what a classifier should see
    negative_prompt: str = ""
    #: The image's, in pixels and multiples of 8; None is the model's own size. Both or neither.
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.id):
            raise UsageError(f"{self.id!r} can't name a case: letters, digits, '.', '_' and '-', at most 100")
        if self.seed < 0:
            raise UsageError(f"case {self.id}: a seed is at least 0, not {self.seed}")
        if (self.height is None) != (self.width is None):
            raise UsageError(f"case {self.id}: width {self.width} and height {self.height}: give both or neither")
        if any(side is not None and (side < SIDE or side % SIDE) for side in (self.height, self.width)):
            raise UsageError(f"case {self.id}: {self.width} x {self.height} pixels: give multiples of {SIDE}")

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) in pixels that the case asks for; None is the model's own."""
        return None if self.height is None or self.width is None else (self.height, self.width)
