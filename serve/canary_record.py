"""The file ``canary.json``: what ``excise.serve.canary`` recorded, as data.

Latents are float32, little-endian, in base64: at Stable Diffusion's 4 × 64 × 64 each probe takes 87 kB.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from excise.errors import ArtefactError
from excise.manifest import Sha256, first_problem
from excise.output import put_in_place

NAME = "canary.json"
FORMAT = 1


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StoredLatents(_Frozen):
    """Latents with ``shape`` (c, h, w), and the SHA-256 of their bytes."""

    shape: tuple[int, int, int]
    sha256: Sha256
    base64: str

    @model_validator(mode="after")
    def _whole(self) -> Self:
        data = base64.b64decode(self.base64, validate=True)
        if len(data) != 4 * int(np.prod(self.shape)) or hashlib.sha256(data).hexdigest() != self.sha256:
            raise ValueError("the latents aren't those of their SHA-256")
        return self


def stored(latents: npt.NDArray[np.float32]) -> StoredLatents:
    """Latents with shape (c, h, w) as data."""
    data = np.ascontiguousarray(latents, "<f4").tobytes()
    channels, height, width = latents.shape
    return StoredLatents(
        shape=(channels, height, width),
        sha256=hashlib.sha256(data).hexdigest(),
        base64=base64.b64encode(data).decode(),
    )


class Probe(_Frozen):
    """One prompt and seed, and the final latents of it. ``edit`` is the id of a bank's edit; None is its base."""

    prompt: str
    seed: int = Field(ge=0)
    erased: bool  #: whether the prompt asks for what the edit erases
    edit: str | None = None
    latents: StoredLatents | None = None

    def values(self) -> npt.NDArray[np.float32]:
        """The recorded latents, float32 with shape (c, h, w)."""
        if self.latents is None:
            return np.empty((0, 0, 0), np.float32)
        return np.frombuffer(base64.b64decode(self.latents.base64), "<f4").reshape(self.latents.shape)


class Canary(_Frozen):
    """What was recorded.

    Attributes:
        format: Version of this format.
        edit_id: The edit that was in effect; None for an unedited model and a bank.
        bank: The ids of a bank's edits, None for the base.
        manifest_sha256: Of the export's ``excise.json``.
        num_inference_steps, guidance_scale: Of all probes.
        tolerance: The largest relative difference that passes.
        measured: The largest between runs of the same model.
        contrast: How far the model without its edit is, in the most telling probe; None where nobody could tell.
        probes: At least one.
    """

    format: int = FORMAT
    edit_id: str | None = None
    bank: tuple[str | None, ...] = ()
    manifest_sha256: Sha256 | None = None
    num_inference_steps: int = Field(ge=1)
    guidance_scale: FiniteFloat
    tolerance: FiniteFloat = Field(gt=0)
    measured: FiniteFloat = Field(ge=0)
    contrast: FiniteFloat | None = None
    probes: tuple[Probe, ...] = Field(min_length=1)

    def to_json(self) -> str:
        """Deterministic JSON with a final newline."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=1, ensure_ascii=False) + "\n"

    def write(self, folder: Path) -> Path:
        """Write ``folder/canary.json`` in one step; its path. Raises ``OSError`` if it can't be written."""
        file = Path(folder) / NAME
        put_in_place(file, self.to_json().encode())
        return file


def read_canary(folder: Path) -> Canary:
    """Parse ``folder/canary.json``.

    Raises:
        ArtefactError: there is none, or it isn't one that this excise can read.
    """
    file = Path(folder) / NAME
    try:
        raw = json.loads(file.read_bytes())
    except OSError as error:
        raise ArtefactError(f"{file} can't be read ({error.strerror}): build the repository again") from error
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{file} isn't JSON ({error}): build the repository again") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise ArtefactError(f"{file} isn't a canary of format {FORMAT}: build the repository again with this excise")
    try:
        canary = Canary.model_validate(raw)
    except ValidationError as error:
        raise ArtefactError(f"{file} is malformed: {first_problem(error)}") from error
    if any(probe.latents is None for probe in canary.probes):
        raise ArtefactError(f"{file} has a probe without latents, which can't fail: build the repository again")
    return canary
