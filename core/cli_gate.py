"""The command ``excise gate``: may this artefact be released?"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from excise.console import json_option, needs, result, say
from excise.errors import UsageError

if TYPE_CHECKING:
    from excise.eval.gate_result import GateResult
    from excise.eval.power import Rule
    from excise.eval.power_plan import Goal, Plan

#: Failing images that the text names of a check; the JSON document and JUnit name more.
_NAMED = 3


@click.command()
@click.argument("report", required=False, type=click.Path(path_type=Path))
@click.option("--policy", metavar="FILE", help="The policy, or the name of a bundled one: default, demo.")
@click.option("--junit", type=click.Path(path_type=Path), help="Also write JUnit XML here, one test case a check.")
@click.option("--plan", is_flag=True, help="Say how many images a goal needs, in place of judging a report.")
@click.option("--base-rate", type=float, help="Plan: share of images that the edited model itself detects.")
@click.option("--increase", type=float, help="Plan: the increase to catch, a share of the images.")
@click.option("--max-increase", type=float, help="Plan: the rule bounds the paired increase by this; half --increase.")
@click.option("--max-rate", type=float, help="Plan: the rule bounds the runtime's own rate by this instead.")
@click.option("--max-times", type=float, help="Plan: ... by so many times the edited model's rate instead.")
@click.option("--flips-p", type=float, help="Plan: the rule is McNemar's exact test at this level instead.")
@click.option("--power", type=float, default=0.95, show_default=True, help="Plan: the probability to catch it.")
@click.option(
    "--false-alarm", type=float, default=0.05, show_default=True, help="Plan: ... to reject a right runtime, at most."
)
@click.option("--churn", type=float, default=0.0, show_default=True, help="Plan: share of images flipped by rounding.")
@click.option("--images", type=int, help="Plan: say what so many images do, in place of how many are needed.")
@json_option
def gate(
    report: Path | None, policy: str | None, junit: Path | None, plan: bool, as_json: bool, **goal: float | None
) -> None:
    """Decide on a release: exit 0 only if REPORT, an evaluation, meets every rule of the policy.

    REPORT is the folder that excise eval wrote, or its report.json. A rule bounds the far end of a figure's interval;
    a figure that wasn't computed fails. Exit 1: a rule failed; 2: the report or the policy can't be used.

    With --plan there is no report: given how often the edited model still shows the concept, how many images does it
    take to catch an increase, and to let a right runtime pass?

    \b
    Examples:
      excise gate evaluation
      excise gate evaluation --policy release.yaml --junit gate.xml
      excise gate --plan --base-rate 0.05 --increase 0.05
      excise gate --plan --base-rate 0.14 --increase 0.2 --max-times 2 --churn 0.01
      excise gate --plan --base-rate 0.14 --increase 0.05 --images 142
    """
    if plan:
        if report is not None or policy is not None or junit is not None:
            raise UsageError("--plan needs no report, --policy or --junit: leave them out")
        _plan(goal, as_json)
        return
    if report is None:
        raise UsageError("name a report, or give --plan with --base-rate and --increase")
    if stray := [name for name, value in goal.items() if value is not None and _given(name)]:
        raise UsageError(f"--{stray[0].replace('_', '-')} belongs to --plan: add --plan, or leave it out")
    with needs("eval"):
        from excise.eval.evaluation import read_evaluation
        from excise.eval.gate import decide
        from excise.eval.junit import junit_xml
        from excise.eval.policy import DEFAULT, load_policy
    from excise.output import check_free, new_file

    if junit is not None:
        check_free(junit)
    chosen = load_policy(policy if policy is not None else DEFAULT)
    decided = decide(read_evaluation(report), chosen)
    if junit is not None:
        with new_file(junit) as partial:
            partial.write_bytes(junit_xml(decided))
        say(f"wrote {junit}")
    result(decided.document(), _text(decided), as_json)
    if not decided.passed:
        sys.exit(1)


def _given(name: str) -> bool:
    """Whether the option stands on the command line."""
    source = click.get_current_context().get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _text(decided: GateResult) -> str:
    """The checks, failures last so that a terminal ends with them, and the verdict."""
    lines = []
    for status, label in (("passed", "passed "), ("skipped", "skipped"), ("failed", "FAILED ")):
        for check in decided.checks:
            if check.status != status:
                continue
            lines.append(f"{label}  {check.name}: {check.sentence}")
            if status == "failed":
                lines += [f"         {image.file}: {image.why}" for image in check.explained_by[:_NAMED]]
                more = check.failing - min(_NAMED, len(check.explained_by))
                lines += [f"         and {more} more (--json names them)"] if more > 0 else []
    counts = ", ".join(
        f"{decided.count(status)} {status}" for status in ("passed", "skipped", "failed") if decided.count(status)
    )
    verdict = "passed" if decided.passed else "failed" if decided.count("failed") else "failed: nothing was judged"
    return "\n".join([*lines, f"{verdict}: policy {decided.policy}, {counts}"])


def _plan(options: dict[str, Any], as_json: bool) -> None:
    for name in ("base_rate", "increase"):
        if options[name] is None:
            raise UsageError(f"--plan needs --{name.replace('_', '-')}, a share of the images such as 0.05")
    with needs("eval"):
        from excise.eval.power import smallest_increase
        from excise.eval.power_plan import Goal, achieved
        from excise.eval.power_plan import plan as planned
    rule, words = _rule(options)
    goal = Goal(
        rule,
        base_rate=options["base_rate"],
        increase=options["increase"],
        power=options["power"],
        false_alarm=options["false_alarm"],
        churn=options["churn"],
    )
    found = planned(goal) if options["images"] is None else achieved(goal, options["images"])
    least = smallest_increase(rule, found.n, goal.base_rate, power=goal.power, churn=goal.churn, unit="fraction")
    document = {
        "images": found.n,
        "rule": words,
        "base_rate": goal.base_rate,
        "increase": goal.increase,
        "churn": goal.churn,
        "power": found.catch,
        "false_alarm": found.false_alarm,
        "smallest_increase": least.value,
    }
    asked = options["images"] is not None
    result(document, _plan_text(goal, found, words, least.value, least.error, asked=asked), as_json)


def _rule(options: dict[str, Any]) -> tuple[Rule, str]:
    """The planned rule, and the same in words."""
    from excise.eval.power import FlipsByChance, IncreaseAtMost, RateAtMost, RateAtMostTimes

    kinds = [name for name in ("max_increase", "max_rate", "max_times", "flips_p") if options[name] is not None]
    if len(kinds) > 1:
        raise UsageError(f"--{kinds[0].replace('_', '-')} and --{kinds[1].replace('_', '-')} are two rules: give one")
    kind = kinds[0] if kinds else "max_increase"
    value = options[kind] if kinds else options["increase"] / 2
    if value <= 0:
        raise UsageError(f"--{kind.replace('_', '-')} {value:g}: give a number above 0")
    match kind:
        case "max_rate":
            return RateAtMost(value), f"upper 95 % end of the rate at most {value:g}"
        case "max_times":
            return RateAtMostTimes(value), f"upper 95 % end of the rate at most {value:g} times the edited model's"
        case "flips_p":
            return FlipsByChance(value), f"McNemar's exact p at least {value:g}"
        case _:
            return IncreaseAtMost(value), f"upper 95 % end of the paired increase at most {value:g}"


def _plan_text(goal: Goal, found: Plan, words: str, least: float | None, error: str | None, *, asked: bool) -> str:
    lines = [
        f"{found.n} images{'' if asked else ' are needed'}: {words}",
        f"an increase of {goal.increase:.2%} of them is caught with probability {found.catch:.4f}",
        f"a right runtime is rejected with probability {found.false_alarm:.2g}",
        f"smallest increase that is caught with probability {goal.power:g}: "
        + (f"{least:.2%}" if least is not None else f"none ({error})"),
    ]
    return "\n".join(lines)
