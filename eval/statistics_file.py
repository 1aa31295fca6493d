"""Feature statistics on disk: a ``*.safetensors`` file with ``total`` and ``outer`` (int64), and one JSON document.

The document, under the key ``excise_statistics``, has the format, the count, the grid and the extractor's fingerprint.
The same statistics give the same bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from excise.errors import ArtefactError
from excise.eval.feature_extractor import Fingerprint
from excise.eval.feature_statistics import MOST_IMAGES, FeatureStatistics
from excise.manifest import first_problem
from excise.output import new_file

FORMAT: Final = 1

_KEY = "excise_statistics"


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = FORMAT
    count: int = Field(ge=0, le=MOST_IMAGES)
    exponent: int
    fingerprint: Fingerprint


def save_statistics(path: Path, statistics: FeatureStatistics) -> None:
    """Write statistics; the file appears whole or not at all.

    Raises:
        OutputError: ``path`` exists or can't be written.
    """
    document = _Document(
        count=statistics.count, exponent=statistics.exponent, fingerprint=statistics.fingerprint
    ).model_dump_json()
    with new_file(path) as partial:
        save_file({"total": statistics.total, "outer": statistics.outer}, partial, {_KEY: document})


def load_statistics(path: Path, fingerprint: Fingerprint | None = None) -> FeatureStatistics:
    """Read statistics.

    Args:
        fingerprint: the extractor that they must be of; None takes any.

    Raises:
        ArtefactError: the file can't be read, is of another format, damaged, or of another extractor.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(_KEY)
            if text is None:
                raise ArtefactError(f"{path} has no feature statistics: compute them again")
            document = _Document.model_validate_json(text)
            if {*file.keys()} != {"total", "outer"}:
                raise ArtefactError(
                    f"{path} is damaged: it holds {', '.join(sorted(file.keys()))}, not total and outer"
                )
            total, outer = file.get_tensor("total"), file.get_tensor("outer")
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"{path} can't be read as feature statistics: {error}") from error
    except ValidationError as error:
        raise ArtefactError(f"{path} holds no feature statistics of format {FORMAT}: {first_problem(error)}") from error
    if total.dtype != np.int64 or outer.dtype != np.int64 or total.ndim != 1 or outer.shape != 2 * total.shape:
        raise ArtefactError(f"{path} is damaged: int64 sums of one width are needed, not {total.shape}, {outer.shape}")
    if fingerprint is not None and (difference := document.fingerprint.difference(fingerprint)) is not None:
        raise ArtefactError(f"{path} is of another feature extractor, with {difference}: compute it again")
    return FeatureStatistics(document.fingerprint, document.exponent, document.count, total, outer)
