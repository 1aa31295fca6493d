"""``excise verify --components``: at which timesteps, how coarsely an export computes, and the figures as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from excise.errors import ArtefactError, ModelError
from excise.eval.onnx_precision import read_formats
from excise.eval.verification_sides import SCHEDULER, Rounding


def timesteps_of(folder: Path, count: int) -> tuple[int, ...]:
    """Timesteps evenly spread over the schedule of a pipeline's folder, descending, as ``excise verify`` takes them.

    Raises:
        ModelError: The folder has no readable scheduler.
    """
    try:
        last = int(json.loads((folder / SCHEDULER).read_bytes()).get("num_train_timesteps", 1000)) - 1
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder / SCHEDULER} can't be read: download or save the model again") from error
    return tuple(int(step) for step in np.linspace(0.98 * last, 0.02 * last, count).round())


def rounding(folder: Path) -> Rounding:
    """How coarsely the export in a folder computes, by its models' files but the VAE encoder's.

    Raises:
        ArtefactError: There is none, or one can't be read.
    """
    models = [path for path in sorted(folder.glob("*/model.onnx")) if path.parent.name != "vae_encoder"]
    if not models:
        raise ArtefactError(f"{folder} has no exported model: name a folder that excise export or Optimum wrote")
    names = {name for path in models for formats in [read_formats(path)] for name in formats.initializers}
    return "bfloat16" if "bfloat16" in names else "half" if "float16" in names else "float32"


def table(document: Mapping[str, Any]) -> str:
    """The worst output of each component on each group, and what the figures say nothing of.

    Args:
        document: ``ComponentParity.dict()``.
    """
    worst: dict[tuple[str, str], Mapping[str, Any]] = {}
    for row in document["rows"]:
        key = (row["component"], row["group"])
        if key not in worst or _used(row, document) > _used(worst[key], document):
            worst[key] = row
    lines = [f"{'component':<16}{'prompts':<10}{'worst output':<28}{'moved':>9}{'to move':>10}{'relative':>10}"]
    for (component, group), row in worst.items():
        at = "" if row["at"] is None else f", timestep {row['at']}"
        figures = f"{_figure(row['moved']):>9}{_figure(row['to_move']):>10}{_figure(row['relative']):>10}"
        verdict = "" if row["passed"] else "  FAILED"
        lines.append(f"{component:<16}{group:<10}{row['output'] + at:<28}{figures}{verdict}")
    count = len(document["rows"])
    failed = sum(not row["passed"] for row in document["rows"])
    lines.append(
        f"{document['family']}: {count - failed} of {count} outputs within {document['max_to_move']:g} of the edit's "
        f"movement or {document['max_relative']:g} of the output"
    )
    lines.append(f"not compared: {', '.join(document['not_compared'])}")
    return "\n".join(lines)


def _used(row: Mapping[str, Any], document: Mapping[str, Any]) -> float:
    """The error as a share of its limit."""
    if row["relative"] is None:
        return float("inf")
    limit = max(document["max_to_move"] * row["moved"], document["max_relative"])
    return float(row["relative"] / limit)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"
