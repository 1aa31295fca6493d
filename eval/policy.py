"""The release policy, ``policy.yaml``: what a served runtime must meet, said before anything is measured.

A rule bounds one figure of every runtime that it names. The bound holds for the *far end* of the figure's interval, not
for the figure: with too few images the interval is wide, and the rule fails. What wasn't measured fails too, unless the
rule says otherwise. The intervals are two-sided, at 95 %: the end that decides is exceeded by chance 1 time in 40.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, model_validator

from excise.errors import UsageError
from excise.eval.measure_names import P_VALUE, metric_of, unknown_metric
from excise.eval.protocol_schema import Part, Real, Whole
from excise.eval.protocol_yaml import Problem, parse_yaml, validated

_POLICIES = Path(__file__).resolve().parent / "policies"

#: The policy of ``excise gate`` without ``--policy``.
DEFAULT: Final = "default"

#: Words for a protocol's runtimes: all that are judged, the edited model's own, the unedited model's.
EVERY, REFERENCE, BASE = "*", "reference", "base"

Skip = Literal["fail", "skip"]


class Limit(Part):
    """A number: ``value``, or ``times`` another runtime's figure ``plus`` a constant."""

    value: Real | None = Field(default=None, description="a number")
    times: Real | None = Field(default=None, description="a number, by which another runtime's figure is multiplied")
    plus: Real | None = Field(default=None, description="a number, added to another runtime's figure")
    #: Whose figure it is; by default the rule's ``against``, or the reference for a comparison.
    than: str | None = Field(default=None, min_length=1, description="a runtime's name, reference or base")
    #: That figure's name, if it isn't the rule's own.
    measure: str | None = Field(default=None, min_length=1, description="a figure's name, as in report.json")

    @model_validator(mode="after")
    def _one(self) -> Limit:
        relative = self.times is not None or self.plus is not None
        if relative == (self.value is not None):
            raise Problem((), "give value, or times and plus of another runtime's figure")
        if self.value is not None and (self.than or self.measure):
            raise Problem((), "than and measure are for times and plus")
        return self

    def of(self, figure: float) -> float:
        """The bound, given the other runtime's figure."""
        if self.value is not None:
            return self.value
        return (1.0 if self.times is None else self.times) * figure + (self.plus or 0.0)


class Bound(Part):
    """One side: ``upper``, at most, or ``lower``, at least."""

    upper: Limit | None = Field(default=None, description="value: NUMBER, or times: NUMBER and plus: NUMBER")
    lower: Limit | None = Field(default=None, description="value: NUMBER, or times: NUMBER and plus: NUMBER")

    @model_validator(mode="after")
    def _one(self) -> Bound:
        if (self.upper is None) == (self.lower is None):
            raise Problem((), "give either upper or lower: two sides are two rules")
        return self

    @property
    def side(self) -> Literal["upper", "lower"]:
        """Which side it is."""
        return "upper" if self.upper is not None else "lower"

    @property
    def limit(self) -> Limit:
        """That side's number."""
        limit = self.upper or self.lower
        assert limit is not None
        return limit


class BaseRule(Part):
    """What every rule says."""

    name: str = Field(min_length=1, description="text: what the rule is called in reports")
    #: May hold ``*``: ``demo-*``, or ``*`` for every protocol of the report.
    protocol: str = Field(min_length=1, description="a protocol's name, or * for all")
    runtime: str = Field(
        default=EVERY, min_length=1, description="a runtime's name, reference, base, or * for all that are judged"
    )
    #: Where the protocol isn't in the report.
    if_not_run: Skip = Field(default="fail", description="fail or skip")
    #: Where the figure couldn't be computed, or isn't in the report.
    if_missing: Skip = Field(default="fail", description="fail or skip")


class MeasureRule(BaseRule):
    """A bound on a figure of a runtime, or of its comparison with another."""

    kind: Literal["measure"]
    measure: str = Field(min_length=1, description="a figure's name, as in report.json")
    of: Literal["runtime", "comparison"] = Field(default="runtime", description="runtime or comparison")
    #: The comparison's other runtime; also whose images explain a failure.
    against: str = Field(default=REFERENCE, min_length=1, description="a runtime's name, reference or base")
    bound: Bound = Field(description="upper or lower")
    #: Whether the interval's far end or the figure itself must keep to the bound.
    judge: Literal["interval", "point"] = Field(default="interval", description="interval or point")
    #: The least confidence of the interval.
    confidence: Real = Field(default=0.95, gt=0, lt=1, description="a number between 0 and 1")
    min_n: Whole = Field(default=1, ge=1, description="a whole number of at least 1: images or pairs")


class PValueRule(BaseRule):
    """The two runtimes' difference could be chance: p isn't below a level."""

    kind: Literal["p_value"]
    measure: str = Field(min_length=1, description=f"a figure's name that ends with {P_VALUE}, before any dot")
    against: str = Field(default=REFERENCE, min_length=1, description="a runtime's name, reference or base")
    at_least: Real = Field(gt=0, lt=1, description="a number between 0 and 1")
    min_n: Whole = Field(default=1, ge=1, description="a whole number of at least 1: images or pairs")

    @model_validator(mode="after")
    def _p(self) -> PValueRule:
        if not metric_of(self.measure).endswith(P_VALUE):
            raise Problem(("measure",), f"a p-value's name ends with {P_VALUE}, such as detected_flips_p_value.top1")
        return self


class ProvenanceRule(BaseRule):
    """Every file of the artefact is as its manifest says."""

    kind: Literal["provenance"]
    provenance: Literal["intact"] = Field(default="intact", description="intact")


class SameEditRule(BaseRule):
    """The artefact carries the edit that another runtime carries, by its id."""

    kind: Literal["same_edit"]
    against: str = Field(default=REFERENCE, min_length=1, description="a runtime's name, reference or base")


Rule = Annotated[MeasureRule | PValueRule | ProvenanceRule | SameEditRule, Field(discriminator="kind")]


class Policy(Part):
    """A policy file."""

    format: Literal[1] = Field(description="1, the only format there is")
    name: str = Field(min_length=1, description="text: the policy's name in reports")
    note: str = Field(default="", description="text")
    rules: tuple[Rule, ...] = Field(min_length=1, description="a list of rules, at least one")

    @model_validator(mode="after")
    def _consistent(self) -> Policy:
        seen: set[str] = set()
        for number, rule in enumerate(self.rules):
            if rule.name in seen:
                raise Problem(("rules", number, "name"), f"{rule.name!r} is another rule's name")
            seen.add(rule.name)
        return self


def bundled_policies() -> tuple[str, ...]:
    """The names of the policies that come with excise."""
    return tuple(sorted(path.stem for path in _POLICIES.glob("*.yaml")))


def load_policy(name_or_path: str | Path) -> Policy:
    """A bundled policy by name, or the file of that path.

    Raises:
        UsageError: no such policy, or a file that is none: the line and the field are named.
    """
    path = Path(name_or_path)
    if str(name_or_path) in bundled_policies():
        path = _POLICIES / f"{name_or_path}.yaml"
    elif not path.exists():
        raise UsageError(f"policy {path} doesn't exist: name a file, or one of {', '.join(bundled_policies())}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"policy {path} can't be read: {error.strerror}") from error
    return validated(Policy, parse_yaml(content, path.name))


def refuse_unknown(policy: Policy, names: Iterable[str] = ()) -> None:
    """Raise ``UsageError`` if a rule names a metric that neither excise nor a report's figures ``names`` have."""
    others = tuple(names)
    for rule in policy.rules:
        if not isinstance(rule, MeasureRule | PValueRule):
            continue
        other = rule.bound.limit.measure if isinstance(rule, MeasureRule) else None
        for name in (rule.measure, other):
            if name is not None and (problem := unknown_metric(name, others)):
                raise UsageError(f"policy {policy.name!r}, rule {rule.name!r}: {problem}")
