"""What a gate decided: a document of its own, ``excise gate --json``, beside ``report.json``."""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from excise.eval.evaluation import Measure

#: The document's format.
FORMAT: Final = 1

Status = Literal["passed", "failed", "skipped"]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FailingImage(_Strict):
    """One image that explains a failed check."""

    case: str  #: the case's id
    file: str  #: as in ``Finding.file``
    why: str  #: in words


class GateCheck(_Strict):
    """One rule on one runtime of one protocol."""

    name: str  #: of the check: protocol, runtime and rule
    rule: str
    protocol: str
    runtime: str | None  #: None where there is none to judge
    against: str | None = None
    measure: str | None = None  #: the figure's name
    measured: Measure | None = None
    relation: Literal["<=", ">="] | None = None  #: how the deciding end must stand to ``limit``
    limit: float | None = None
    bound: str  #: the requirement in words
    status: Status
    sentence: str  #: what was found, in words
    failing: int = Field(default=0, ge=0)  #: how many images explain the failure
    explained_by: tuple[FailingImage, ...] = ()  #: the first of them, worst first

    @property
    def images(self) -> tuple[str, ...]:
        """The files of the images that explain a failure."""
        return tuple(image.file for image in self.explained_by)


class GateResult(_Strict):
    """All checks of a policy, in its order."""

    format: Literal[1] = FORMAT
    policy: str
    checks: tuple[GateCheck, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed and at least one passed: where all were skipped, nothing was shown."""
        found = {check.status for check in self.checks}
        return "failed" not in found and "passed" in found

    def count(self, status: Status) -> int:
        """How many checks have this status."""
        return sum(check.status == status for check in self.checks)

    def document(self) -> dict[str, Any]:
        """JSON values, the verdict first."""
        fields = self.model_dump(mode="json")
        return {"format": fields["format"], "policy": self.policy, "passed": self.passed, "checks": fields["checks"]}
