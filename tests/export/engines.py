"""What the tests of engines share: a visible skip, the tiny model's shapes, and an edit of it."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from excise.editfile import Edit
from excise.enginefile import Range
from excise.export.pipeline import load_pipeline, read_weights
from tests.random_edits import random_edit

needs_rtx = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx isn't installed: pip install 'excise[tensorrt-rtx]'"
)

#: Of the tiny UNet: 8 × 8 latents, 24 tokens of width 32. Static shapes build in a fraction of the time.
STATIC = {
    "sample": Range(min=(2, 4, 8, 8), opt=(2, 4, 8, 8), max=(2, 4, 8, 8)),
    "encoder_hidden_states": Range(min=(2, 24, 32), opt=(2, 24, 32), max=(2, 24, 32)),
}


def differing(one: bytes, other: bytes) -> int:
    """How many bytes of two engines differ, and by how many one is longer."""
    length = min(len(one), len(other))
    first, second = (np.frombuffer(data[:length], np.uint8) for data in (one, other))
    return int(np.count_nonzero(first != second)) + abs(len(one) - len(other))


def edit_of(model: Path, sites: Iterable[str]) -> Edit:
    """A random edit of a Stable Diffusion folder."""
    weights = read_weights(load_pipeline(model).unet, list(sites))
    return random_edit({name: np.array(values) for name, values in weights.items()}, 1)
