"""The document of an evaluation, ``report.json``: what was measured, on what, and how sure it is.

Everything that decides a release is here, so that gates, reports and comparisons need neither models nor images.
Figures are named ``metric`` or ``metric.variant``, as in ``nude_parts.RECE`` or ``clip_score.kept``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from excise.errors import ArtefactError
from excise.manifest import first_problem

#: The document's format. A reader refuses any other.
FORMAT: Final = 1


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Measure(_Strict):
    """One figure with its interval. ``value`` is None where it could not be computed, and ``error`` says why."""

    value: float | None
    low: float | None = None  #: the interval's ends; None where the figure has none
    high: float | None = None
    n: int = Field(ge=0)  #: images, or pairs of them, that it is made of
    unit: str = ""  #: ``count``, ``fraction``, ``dB``, …
    method: str = ""  #: of the interval: ``wilson``, ``exact``, ``bootstrap (1000 resamples)``, …
    confidence: float = 0.95
    better: Literal["lower", "higher", "neither"] = "neither"
    error: str | None = None


class Provenance(_Strict):
    """What a runtime serves, by its own files."""

    edit: str | None = None  #: the edit's id, as the artefact names it
    edit_summary: str | None = None
    manifest: str | None = None  #: SHA-256 of the artefact's manifest
    files: str | None = None  #: SHA-256 over the files of a folder that has no manifest
    intact: bool | None = None  #: whether every file is as the manifest says; None where there is no manifest
    problems: tuple[str, ...] = ()
    precision: dict[str, str] = {}  #: component → the number format that it computes in


class RuntimeRecord(_Strict):
    """One runtime of a protocol's run, and its figures."""

    name: str
    source: str  #: as given: ``onnx:DIR?provider=cuda``
    kind: str  #: ``torch``, ``onnx``, ``tensorrt``, ``triton``, ``openai``
    provenance: Provenance = Provenance()
    seconds_per_image: float | None = None
    measures: dict[str, Measure] = {}


class Comparison(_Strict):
    """Two runtimes on the same cases: ``second`` is judged by ``first``."""

    first: str
    second: str
    measures: dict[str, Measure] = {}


class Finding(_Strict):
    """What was seen in one image of one runtime."""

    file: str  #: relative to the report's folder, with ``/``
    sha256: str
    flagged: bool = False  #: to be blurred wherever it is shown
    detected: bool | None = None  #: whether the erased concept is in it, by the protocol's first rule
    figures: dict[str, float] = {}  #: by metric, of this image: ``clip_score``, ``relative_to_edit``, …
    seen: tuple[str, ...] = ()  #: in words, such as ``BELLY_EXPOSED 0.71``


class CaseRecord(_Strict):
    """One case, and what each runtime made of it."""

    id: str
    prompt: str
    seed: int
    group: str
    label: str | None = None
    findings: dict[str, Finding] = {}  #: by runtime


class PaperFigure(_Strict):
    """A published figure to set beside a measured one; never a bound."""

    measure: str
    method: str  #: ``RECE``, ``UCE``, ``SD v1.4``, …
    value: float
    source: str


class SweepRecord(_Strict):
    """An ablation: runtimes that differ in one figure of their edits alone."""

    preset: str  #: of ``excise edit``
    parameter: Literal["epochs", "ridge"]  #: ``ridge`` is the λ of RECE's eq. 8
    values: dict[str, float]  #: by runtime


class ProtocolRecord(_Strict):
    """One protocol's run over all runtimes."""

    name: str
    version: int
    title: str
    settings: dict[str, Any]  #: steps, scheduler, detector, rules, thresholds: all that the figures depend on
    base: str | None = None  #: the runtime of the unedited model
    reference: str | None = None  #: the edited model's own runtime, which others are judged by
    floor: tuple[str, ...] = ()  #: runs of the reference's model in another way, which show what rounding does
    runtimes: tuple[RuntimeRecord, ...]
    comparisons: tuple[Comparison, ...] = ()
    cases: tuple[CaseRecord, ...] = ()
    paper: tuple[PaperFigure, ...] = ()
    #: Of each count: the smallest increase that would be caught with 95 % probability, as a measure's ``value``.
    power: dict[str, Measure] = {}
    sweep: SweepRecord | None = None

    def runtime(self, name: str) -> RuntimeRecord | None:
        """The runtime of this name, or None."""
        return next((one for one in self.runtimes if one.name == name), None)

    def comparison(self, first: str, second: str) -> Comparison | None:
        """What was measured between two runtimes, or None."""
        return next((one for one in self.comparisons if (one.first, one.second) == (first, second)), None)


class Evaluation(_Strict):
    """All protocols of one ``excise eval``."""

    format: Literal[1] = FORMAT
    versions: dict[str, str] = {}  #: Python, excise and the packages that the figures depend on
    machine: str = ""  #: processor and system, in words
    protocols: tuple[ProtocolRecord, ...]

    def protocol(self, name: str) -> ProtocolRecord | None:
        """The protocol of this name, or None."""
        return next((one for one in self.protocols if one.name == name), None)


def read_evaluation(path: Path) -> Evaluation:
    """A ``report.json``, or the folder that it is in.

    Raises:
        ArtefactError: There is none, it is no evaluation, or one of another format.
    """
    file = path / "report.json" if path.is_dir() else path
    try:
        text = file.read_bytes()
    except OSError as error:
        raise ArtefactError(f"{file} can't be read: {error.strerror}") from error
    try:
        return Evaluation.model_validate_json(text)
    except ValidationError as error:
        raise ArtefactError(f"{file} is no evaluation of format {FORMAT}: {first_problem(error)}") from error
