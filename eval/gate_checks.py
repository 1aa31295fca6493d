"""One rule on one runtime: the figure is looked up, held against its bound, and the outcome put into words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from excise.eval.evaluation import Measure, ProtocolRecord, RuntimeRecord
from excise.eval.evaluation_figures import cell_text, one_line, value_text
from excise.eval.gate_images import SHOWN, failing_images
from excise.eval.gate_result import GateCheck, Status
from excise.eval.policy import (
    BASE,
    REFERENCE,
    BaseRule,
    Limit,
    MeasureRule,
    ProvenanceRule,
    PValueRule,
    SameEditRule,
    Skip,
)


@dataclass(frozen=True)
class Missing:
    """Why a figure isn't there."""

    why: str


def role(protocol: ProtocolRecord, word: str) -> str | None:
    """The runtime that ``reference``, ``base`` or a name stands for; None where the protocol has no such role."""
    return {REFERENCE: protocol.reference, BASE: protocol.base}.get(word, word)


def check_runtime(rule: BaseRule, protocol: ProtocolRecord, runtime: RuntimeRecord) -> GateCheck:
    """The rule's check of one runtime."""
    match rule:
        case MeasureRule():
            return _measure(rule, protocol, runtime)
        case PValueRule():
            return _p_value(rule, protocol, runtime)
        case ProvenanceRule():
            return _provenance(rule, protocol, runtime)
        case SameEditRule():
            return _same_edit(rule, protocol, runtime)
        case _:
            raise TypeError(f"no rule: {rule!r}")


def unrun(rule: BaseRule, protocol: str, why: str) -> GateCheck:
    """The check of a rule that finds nothing to judge."""
    status: Status = "skipped" if rule.if_not_run == "skip" else "failed"
    return GateCheck(
        name=f"{protocol}: {rule.name}",
        rule=rule.name,
        protocol=protocol,
        runtime=None,
        measure=getattr(rule, "measure", None),
        bound="to be measured",
        status=status,
        sentence=_capital(f"{why}; the policy {'skips' if status == 'skipped' else 'asks for'} it."),
    )


def figure_of(
    protocol: ProtocolRecord, name: str, runtime: str, *, of: Literal["runtime", "comparison"], against: str | None
) -> Measure | Missing:
    """A figure of a runtime, or of its comparison with ``against``."""
    if of == "comparison":
        comparison = protocol.comparison(against, runtime) if against is not None else None
        if comparison is None:
            return Missing(f"the report compares {runtime} with {against or 'no reference'} nowhere")
        measures, place = comparison.measures, f"the comparison with {against}"
    else:
        record = protocol.runtime(runtime)
        if record is None:
            return Missing(f"the report has no runtime {runtime}")
        measures, place = record.measures, f"the report of {runtime}"
    if name not in measures:
        there = ", ".join(sorted(measures)) or "no figures"
        return Missing(f"{name} isn't in {place}, which has {there}")
    found = measures[name]
    if found.value is None:
        return Missing(f"{name} could not be computed: {one_line(found.error or 'no reason given')}")
    return found


def _measure(rule: MeasureRule, protocol: ProtocolRecord, runtime: RuntimeRecord) -> GateCheck:
    against = role(protocol, rule.against)
    found = figure_of(protocol, rule.measure, runtime.name, of=rule.of, against=against)
    upper = rule.bound.side == "upper"
    draft = _draft(rule, protocol, runtime, "at most" if upper else "at least", found)
    draft = draft.model_copy(update={"against": against, "relation": "<=" if upper else ">="})
    if isinstance(found, Missing):
        return _missing(draft, rule.if_missing, found)
    if few := _too_few(found, rule.min_n):
        return _done(draft, "failed", few)
    other = _other_figure(rule, protocol)
    if isinstance(other, Missing):
        return _missing(draft, rule.if_missing, other)
    limit = rule.bound.limit.of(other[0].value or 0.0) if other is not None else rule.bound.limit.of(0.0)
    shown = value_text(found.model_copy(update={"value": limit, "low": None, "high": None}))
    terms = "" if other is None else f" = {_terms(rule.bound.limit, *other)}"
    bound = f"{draft.bound} {shown}{terms}"
    draft = draft.model_copy(update={"limit": limit, "bound": bound})
    end, what = found.value, "the figure"
    if rule.judge == "interval":
        end, what = (found.high, "its upper end") if upper else (found.low, "its lower end")
        if end is None:
            return _missing(draft, rule.if_missing, Missing(f"{rule.measure} has no interval, which the rule judges"))
        if found.confidence < rule.confidence:
            return _done(
                draft,
                "failed",
                f"the interval of {rule.measure} is at {found.confidence:g}, and the rule asks for {rule.confidence:g}",
            )
    assert end is not None
    kept = end <= limit if upper else end >= limit
    figure = f"{rule.measure} is {cell_text(found)} over {found.n} {'pairs' if rule.of == 'comparison' else 'images'}"
    far = value_text(found.model_copy(update={"value": end, "low": None, "high": None}))
    sentence = f"{figure}; {what}{'' if rule.judge == 'point' else f', {far},'} must be {bound}"
    if kept:
        return _done(draft, "passed", sentence)
    if found.value is not None and (found.value <= limit if upper else found.value >= limit):
        sentence += ": the figure keeps to it, but so many images don't show that it does"
    return _with_images(_done(draft, "failed", sentence), protocol, against, rule.bound.side)


def _other_figure(rule: MeasureRule, protocol: ProtocolRecord) -> tuple[Measure, str] | Missing | None:
    """The figure that the bound is relative to and its runtime; None for a bound that is a number."""
    limit = rule.bound.limit
    if limit.value is not None:
        return None
    word = limit.than or (rule.against if rule.of == "runtime" else REFERENCE)
    name, against = role(protocol, word), role(protocol, rule.against)
    if name is None:
        return Missing(f"the report names no {word}, which the bound is relative to")
    measure = limit.measure or rule.measure
    found: Measure | Missing = Missing("")
    if rule.of == "comparison":
        found = figure_of(protocol, measure, name, of="comparison", against=against)
    if isinstance(found, Missing):
        # Of the runtime itself: a floor, or its own distance from the base.
        found = figure_of(protocol, measure, name, of="runtime", against=None)
    return found if isinstance(found, Missing) else (found, name)


def _terms(limit: Limit, other: Measure, name: str) -> str:
    """The bound's parts, such as ``2 × 66 of edited torch + 0.01``."""
    times = "" if limit.times is None else f"{limit.times:g} × "
    plus = "" if not limit.plus else f" {'+' if limit.plus > 0 else '−'} {abs(limit.plus):g}"
    return f"{times}{value_text(other)} of {name}{plus}"


def _p_value(rule: PValueRule, protocol: ProtocolRecord, runtime: RuntimeRecord) -> GateCheck:
    against = role(protocol, rule.against)
    found = figure_of(protocol, rule.measure, runtime.name, of="comparison", against=against)
    draft = _draft(rule, protocol, runtime, f"p at least {rule.at_least:g}", found)
    draft = draft.model_copy(update={"against": against, "relation": ">=", "limit": rule.at_least})
    if isinstance(found, Missing):
        return _missing(draft, rule.if_missing, found)
    if few := _too_few(found, rule.min_n):
        return _done(draft, "failed", few)
    p = found.value or 0.0
    chance = "could be" if p >= rule.at_least else "is more than"
    sentence = (
        f"{rule.measure} is {p:.3g} over {found.n} pairs ({found.method or 'test not named'}): "
        f"the difference from {against} {chance} chance, at a level of {rule.at_least:g}"
    )
    if p >= rule.at_least:
        return _done(draft, "passed", sentence)
    return _with_images(_done(draft, "failed", sentence), protocol, against, "upper")


def _provenance(rule: ProvenanceRule, protocol: ProtocolRecord, runtime: RuntimeRecord) -> GateCheck:
    draft = _draft(rule, protocol, runtime, "every file as the manifest says", None)
    served = runtime.provenance
    if served.intact is None:
        return _missing(draft, rule.if_missing, Missing(f"{runtime.source} has no manifest to hold its files against"))
    if served.intact:
        return _done(draft, "passed", f"every file of {runtime.source} is as its manifest says")
    told = "; ".join(one_line(problem) for problem in served.problems) or "no problem is named"
    return _done(draft, "failed", f"{runtime.source} isn't as its manifest says: {told}")


def _same_edit(rule: SameEditRule, protocol: ProtocolRecord, runtime: RuntimeRecord) -> GateCheck:
    name = role(protocol, rule.against)
    other = protocol.runtime(name) if name is not None else None
    draft = _draft(rule, protocol, runtime, f"the edit of {name or rule.against}", None)
    draft = draft.model_copy(update={"against": name})
    if other is None or other.provenance.edit is None:
        return _missing(draft, rule.if_missing, Missing(f"{name or rule.against} names no edit"))
    mine, theirs = runtime.provenance.edit, other.provenance.edit
    if mine is None:
        return _missing(
            draft, rule.if_missing, Missing(f"{runtime.source} names no edit, and {name} has {theirs[:12]}")
        )
    if mine == theirs:
        return _done(draft, "passed", f"{runtime.source} carries the edit {mine[:12]} of {name}")
    return _done(draft, "failed", f"{runtime.source} carries the edit {mine[:12]}, and {name} has {theirs[:12]}")


def _draft(
    rule: BaseRule, protocol: ProtocolRecord, runtime: RuntimeRecord, bound: str, found: Measure | Missing | None
) -> GateCheck:
    return GateCheck(
        name=f"{protocol.name}, {runtime.name}: {rule.name}",
        rule=rule.name,
        protocol=protocol.name,
        runtime=runtime.name,
        measure=getattr(rule, "measure", None),
        measured=found if isinstance(found, Measure) else None,
        bound=bound,
        status="failed",
        sentence="",
    )


def _done(draft: GateCheck, status: Status, sentence: str) -> GateCheck:
    return draft.model_copy(update={"status": status, "sentence": _capital(sentence) + "."})


def _missing(draft: GateCheck, if_missing: Skip, found: Missing) -> GateCheck:
    """A check without a figure: never passed."""
    if if_missing == "skip":
        return _done(draft, "skipped", f"not judged, as the policy allows: {found.why}")
    return _done(draft, "failed", f"nothing to judge: {found.why}")


def _with_images(
    check: GateCheck, protocol: ProtocolRecord, against: str | None, side: Literal["upper", "lower"]
) -> GateCheck:
    images = failing_images(protocol, check.measure or "", check.runtime or "", against, side, check.limit)
    return check.model_copy(update={"failing": len(images), "explained_by": images[:SHOWN]})


def _too_few(found: Measure, least: int) -> str | None:
    return f"made of {found.n} images, and the rule asks for {least}" if found.n < least else None


def _capital(text: str) -> str:
    """A sentence's first letter, unless it begins with a figure's name or a folder."""
    return text[:1].upper() + text[1:] if text.split(" ")[0].isalpha() else text
