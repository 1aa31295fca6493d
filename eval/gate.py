"""The release gate: a policy's rules, each on every runtime that it names, as a pure function of a report.

A right runtime is rejected, and a wrong one passes, with probabilities that follow from the rules and the number of
images: ``excise.eval.power`` has them.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

from excise.eval.evaluation import Comparison, Evaluation, ProtocolRecord, RuntimeRecord
from excise.eval.gate_checks import check_runtime, role, unrun
from excise.eval.gate_result import GateCheck, GateResult
from excise.eval.policy import EVERY, Policy, Rule, refuse_unknown


def decide(evaluation: Evaluation, policy: Policy) -> GateResult:
    """Every rule's checks, in the policy's order.

    Raises:
        UsageError: a rule names a metric that neither excise nor the report knows.
    """
    refuse_unknown(policy, figure_names(evaluation))
    return GateResult(
        policy=policy.name, checks=tuple(check for rule in policy.rules for check in _checks(rule, evaluation))
    )


def figure_names(evaluation: Evaluation) -> frozenset[str]:
    """The names of all figures of a report."""
    records: list[RuntimeRecord | Comparison] = []
    for protocol in evaluation.protocols:
        records += [*protocol.runtimes, *protocol.comparisons]
    return frozenset(name for record in records for name in record.measures)


def _checks(rule: Rule, evaluation: Evaluation) -> Iterator[GateCheck]:
    protocols = [one for one in evaluation.protocols if fnmatchcase(one.name, rule.protocol)]
    if not protocols:
        there = ", ".join(one.name for one in evaluation.protocols) or "none"
        yield unrun(rule, rule.protocol, f"no protocol {rule.protocol} is in the report, which has {there}")
    for protocol in protocols:
        names = _judged(rule, protocol)
        if not names:
            what = "runtime to judge" if rule.runtime == EVERY else f"runtime {rule.runtime}"
            yield unrun(rule, protocol.name, f"the report of {protocol.name} has no {what}")
        for name in names:
            record = protocol.runtime(name)
            assert record is not None
            yield check_runtime(rule, protocol, record)


def _judged(rule: Rule, protocol: ProtocolRecord) -> list[str]:
    """The runtimes of a protocol that a rule names."""
    if rule.runtime == EVERY:
        known = {protocol.base, protocol.reference, *protocol.floor}
        return [one.name for one in protocol.runtimes if one.name not in known]
    name = role(protocol, rule.runtime)
    return [name] if name is not None and protocol.runtime(name) is not None else []
