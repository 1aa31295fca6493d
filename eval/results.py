"""What a judgement measured: plain arrays and figures, from which verdicts and reports are made without any model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from excise.eval.protocol import Protocol
from excise.eval.statistics import Discordance, Proportion

BASE, EDITED_TORCH, EDITED_ONNX = "base torch", "edited torch", "edited onnx"
#: What each of the three runtimes stands for, in the order of tables and grids.
ROLES: tuple[str, ...] = (BASE, EDITED_TORCH, EDITED_ONNX)


@dataclass(frozen=True)
class RuntimeResults:
    """One runtime's images and what the detector saw in them; rows as in ``Protocol.rows``, erased prompts first."""

    name: str  #: the runtime's own name
    images: npt.NDArray[np.uint8]  #: (n, height, width, 3)
    top: npt.NDArray[np.intp]  #: (n,), the top label's index
    success: npt.NDArray[np.bool_]  #: (n,), a detection (erased prompts) or the prompt's own label (kept prompts)
    margin: npt.NDArray[np.float64]  #: (n,), best logit of the wanted labels minus best of the rest
    detections: Proportion
    kept_accuracy: Proportion
    clip_score_erased: float
    clip_score_kept: float
    fid_kept: float | None  #: against the base runtime's kept images; None for the base itself
    seconds_per_image: float


@dataclass(frozen=True)
class Agreement:
    """Two runtimes on the same requests."""

    erased: Discordance
    kept: Discordance
    mean_difference: float  #: mean absolute pixel difference, in grey levels of 255
    max_difference: int  #: the largest, in grey levels


@dataclass(frozen=True)
class Stability:
    """How far rounding could move the decisions on the edited torch runtime's images: measured from that run alone."""

    amplitude: int  #: noise is uniform on the integers of ± this many grey levels
    draws: int
    seed: int
    delta: npt.NDArray[np.float64]  #: (n,), the largest change of each image's margin over the draws


@dataclass(frozen=True)
class Results:
    """Everything that ``judge`` measured."""

    protocol: Protocol
    detector: str  #: the detector's name
    feature_dimension: int  #: width of the features that the Fréchet distance is made of
    runtimes: Mapping[str, RuntimeResults]  #: by role
    agreement: Agreement  #: edited torch against edited onnx
    stability: Stability
