"""A stream's transform as the arrays that an edit file holds (``excise.editfile``)."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from excise.edit.transform import Transform
from excise.editfile import Array


def stream_arrays(transform: Transform, stream: str, *, tolerance: float = 1e-13) -> dict[str, Array]:
    """The matrix and its factors of a shared transform, or the steps of one that differs from site to site.

    Args:
        transform: the stream's edit.
        stream: its name, which starts every array's.
        tolerance: of the factors, as ``Transform.factors`` has it.
    """
    tensors: dict[str, Tensor]
    if transform.is_shared:
        left, right = transform.factors(tolerance=tolerance)
        tensors = {"transform": transform.matrix(0), "left": left, "right": right}
    else:
        tensors = {
            f"steps.{number}.{name}": getattr(step, name)
            for number, step in enumerate(transform.steps)
            for name in ("shared", "scaled", "scalars")
        }
    return {f"{stream}.{name}": np.ascontiguousarray(tensor.cpu().numpy()) for name, tensor in tensors.items()}
