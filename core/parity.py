"""How far one implementation of an edited model is from another, measured against how far the edit moved it.

    relative = ‖exported − edited‖ / ‖edited − base‖

0 is exact. 1 is what an export that lost the edit scores, so a figure near 1 is caught whatever the edit's size.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from excise.errors import NumericsError


@dataclass(frozen=True)
class Parity:
    """Distances between two implementations of one edited model.

    Attributes:
        relative: ‖exported − edited‖ / ‖edited − base‖, Frobenius.
        max_abs: Largest |exported − edited|.
        edit_relative: ‖edited − base‖ / ‖base‖: the size of the edit itself.
        edit_max_abs: Largest |edited − base|.
    """

    relative: float
    max_abs: float
    edit_relative: float
    edit_max_abs: float

    def dict(self) -> dict[str, float]:
        """The figures by name, for the manifest."""
        return asdict(self)


@dataclass(frozen=True)
class Deviation:
    """How far one array is from another.

    Attributes:
        max_abs: Largest |found − reference|.
        relative: ‖found − reference‖ / ‖reference‖, Frobenius.
        cosine: ⟨found, reference⟩ / (‖found‖ ‖reference‖); 0 where ``found`` is all zeros.
    """

    max_abs: float
    relative: float
    cosine: float


def parity(base: NDArray[Any], edited: NDArray[Any], exported: NDArray[Any]) -> Parity:
    """Compare outputs of equal shape: denoiser outputs, final latents or images; computed in float64.

    Args:
        base: From the unedited model.
        edited: From the edited model that is the reference, same inputs.
        exported: From the edited model that is to be checked, same inputs.

    Raises:
        NumericsError: Shapes differ, an output isn't finite, or the edit changed nothing, so that there is no scale.
    """
    if not base.shape == edited.shape == exported.shape:
        raise NumericsError(f"parity needs equal shapes: {base.shape}, {edited.shape} and {exported.shape}")
    arrays = {"base": base, "edited": edited, "exported": exported}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise NumericsError(f"the {name} model's outputs aren't finite: check it before measuring parity")
    start, target, found = (array.astype(np.float64) for array in arrays.values())
    moved, error = target - start, found - target
    scale = float(np.linalg.norm(moved))
    if scale == 0:
        raise NumericsError("the edit changes none of these outputs: choose prompts that it acts on")
    norm = float(np.linalg.norm(start))
    return Parity(
        relative=float(np.linalg.norm(error)) / scale,
        max_abs=float(np.abs(error).max()),
        edit_relative=scale / norm if norm else 0.0,
        edit_max_abs=float(np.abs(moved).max()),
    )


def deviation(reference: NDArray[Any], found: NDArray[Any]) -> Deviation:
    """Compare two finite arrays of equal shape, computed in float64.

    Raises:
        NumericsError: Shapes differ, a value isn't finite, or ``reference`` is all zeros, so that there is no scale.
    """
    if reference.shape != found.shape:
        raise NumericsError(f"a deviation needs equal shapes: {reference.shape} and {found.shape}")
    target, other = reference.astype(np.float64).ravel(), found.astype(np.float64).ravel()
    norm, other_norm = float(np.linalg.norm(target)), float(np.linalg.norm(other))
    if not np.isfinite([norm, other_norm]).all():
        raise NumericsError("a deviation needs finite values: check the model before comparing it")
    if norm == 0:
        raise NumericsError("the reference is all zeros: there is nothing to compare with")
    error = other - target
    return Deviation(
        max_abs=float(np.abs(error).max()),
        relative=float(np.linalg.norm(error)) / norm,
        cosine=float(target @ other) / (norm * other_norm) if other_norm else 0.0,
    )
