"""Whether a refitted engine computes what the patched ONNX model does, measured against how far the edit moved it.

    relative = ‖refitted − ONNX‖ / ‖ONNX − engine before the refit‖

A refit that left the engine as it was scores 1. The text states that both are run on lie half in random directions and
half in those that the new weights read in another way, so that a narrow edit moves the output as far as its own prompts
would, and well beyond the rounding of float16.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from excise.enginefile import EngineEntry
from excise.errors import ArtefactError, NumericsError
from excise.export.denoisers import family_of
from excise.export.engine_execution import EngineExecution
from excise.export.parity import TIMESTEPS, DenoiserInputs, random_latents
from excise.manifest import BaseEntry
from excise.parity import Parity, parity

#: A refitted engine is refused beyond this. Of two edits of the bundled model, by PyTorch on the CPU: computing in
#: float16 scores 0.002, and one of the 14 weights kept as it was 0.12 or more. Not yet measured on a GPU.
TOLERANCE = 0.05
_TEXT = "encoder_hidden_states"


def check_inputs(
    entry: EngineEntry, base: BaseEntry, changes: Iterable[NDArray[Any]], *, seed: int = 0
) -> DenoiserInputs:
    """Seeded inputs of the smallest shapes that the engine's first profile takes.

    Args:
        entry: The engine's.
        base: The unedited model, for its family.
        changes: What each refitted weight (o, d) changes by; those of another width than the text states' are left out.
        seed: Of everything.

    Raises:
        ArtefactError: The engine's inputs aren't its family's.
        ModelError: The family is unknown.
    """
    family = family_of(base.name, base.pipeline)
    if missing := [name for name in (family.latents, "timestep", _TEXT) if name not in entry.inputs]:
        raise ArtefactError(f"the engine has no input {missing[0]}, which {family.title} reads: build it again")
    ranges = entry.profiles[0] if entry.profiles else {}
    shapes = {name: ranges[name].min if name in ranges else one.shape for name, one in entry.inputs.items()}
    others = [name for name in sorted(shapes) if name not in (family.latents, "timestep", _TEXT)]
    return DenoiserInputs(
        sample=random_latents(seed, shapes[family.latents]),
        timesteps=tuple(family.time_scale * step for step in TIMESTEPS),
        encoder_hidden_states=_text_states(shapes[_TEXT], changes, np.random.default_rng(seed + 1)),
        others={name: random_latents(seed + 2 + place, shapes[name]) for place, name in enumerate(others)},
        latents=family.latents,
    )


def _text_states(
    shape: tuple[int, ...], changes: Iterable[NDArray[Any]], generator: np.random.Generator
) -> NDArray[np.float32]:
    """Text states (n, t, d) of mean square 1: normal ones, and combinations of the changes' rows, in equal parts."""
    width = shape[-1]
    normal = generator.standard_normal((int(np.prod(shape[:-1])), width), dtype=np.float32)
    moved = np.zeros_like(normal)
    for change in changes:
        if change.shape[1:] == (width,):
            drawn = generator.standard_normal((len(normal), len(change)), dtype=np.float32)
            moved += drawn @ change.astype(np.float32)
    if not moved.any():
        return normal.reshape(shape)
    moved *= np.sqrt(width) / np.linalg.norm(moved, axis=1, keepdims=True)
    states: NDArray[np.float32] = ((normal + moved) / np.sqrt(2)).astype(np.float32).reshape(shape)
    return states


def engine_outputs(execution: EngineExecution, entry: EngineEntry, inputs: DenoiserInputs) -> NDArray[np.float32]:
    """An engine's outputs, shape (timesteps, *the sample's), as ``excise.export.parity.onnx_outputs`` gives them."""
    shape = tuple(size if size > 0 else len(inputs.sample) for size in entry.inputs["timestep"].shape)
    outputs = []
    for step in inputs.timesteps:
        feed: dict[str, NDArray[Any]] = {**inputs.arrays(), "timestep": np.full(shape, step)}
        outputs.append(execution({name: array.astype(entry.inputs[name].dtype) for name, array in feed.items()}))
    return np.stack(outputs)


def compare(before: NDArray[Any], expected: NDArray[Any], after: NDArray[Any]) -> Parity:
    """The refitted engine's figures.

    Args:
        before: Outputs of the engine before the refit.
        expected: Those of the patched ONNX model, same inputs.
        after: Those of the refitted engine, same inputs.

    Raises:
        ArtefactError: They are further apart than ``TOLERANCE``, or can't be compared.
    """
    try:
        found = parity(before, expected, after)
    except NumericsError as error:
        raise ArtefactError(f"the refit can't be checked ({error}); nothing was written") from error
    if found.relative > TOLERANCE:
        raise ArtefactError(
            f"the refit failed: the engine is {found.relative:.3g} of the edit's own movement away from the patched "
            f"ONNX model, and {TOLERANCE:g} is allowed (1 is an engine that kept its weights); nothing was written, "
            "build the engine again"
        )
    return found
