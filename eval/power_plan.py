"""How many images a goal needs: an increase to catch, and right runtimes to let pass, each with its probability.

Counts are whole, so the power of a rule doesn't rise with every image: it goes up like the teeth of a saw (Chernick &
Liu, The American Statistician 56, 2002). The number given is the one *from which on* the goal is met.
"""

from __future__ import annotations

from dataclasses import dataclass

from excise.errors import UsageError
from excise.eval.power import Rule, gate_probabilities

#: A plan beyond this many images is refused.
MOST = 50_000
#: The last search goes in steps of n / 200 or one.
_STEPS = 200


@dataclass(frozen=True)
class Goal:
    """What a gate should do.

    Raises:
        UsageError: fractions that aren't.
    """

    rule: Rule
    base_rate: float  #: of the reference's detections, a fraction of the cases
    increase: float  #: to be caught, a fraction of the cases
    power: float = 0.95  #: the probability to catch it
    false_alarm: float = 0.05  #: the largest probability to reject a right runtime
    churn: float = 0.0  #: the share of cases that flip by rounding alone

    def __post_init__(self) -> None:
        for name, value in (("power", self.power), ("false alarm rate", self.false_alarm)):
            if not 0 < value < 1:
                raise UsageError(f"a {name} lies between 0 and 1, not at {value:g}")
        if not 0 < self.increase <= 1 - self.base_rate:
            raise UsageError(
                f"an increase of {self.increase:g} on a base rate of {self.base_rate:g} can't be: "
                f"give more than 0, up to {1 - self.base_rate:g}"
            )


@dataclass(frozen=True)
class Plan:
    """The number of cases, and what the gate does with so many."""

    n: int
    catch: float  #: probability to reject a runtime with the goal's increase
    false_alarm: float  #: probability to reject a right one


def achieved(goal: Goal, n: int) -> Plan:
    """What the goal's rule does with n cases."""
    catch, alarm = gate_probabilities(goal.rule, n, goal.base_rate, (goal.increase, 0.0), churn=goal.churn)
    return Plan(n, catch, alarm)


def plan(goal: Goal, *, most: int = MOST) -> Plan:
    """The number of cases from which on the goal is met; above 200, to within 1 %.

    Raises:
        UsageError: no number of cases up to ``most`` does.
    """
    limit = goal.rule.limit(goal.base_rate)
    if limit <= 0:
        raise UsageError(
            f"with a base rate of {goal.base_rate:g} the rule rejects a right runtime, however many cases: "
            "raise its bound"
        )
    if goal.increase <= limit:
        raise UsageError(
            f"the rule allows an increase of {limit:g}, so one of {goal.increase:g} is never caught: lower its bound"
        )

    def met(n: int) -> bool:
        found = achieved(goal, n)
        return found.catch >= goal.power and found.false_alarm <= goal.false_alarm

    high = 8
    while not met(high):
        high *= 2
        if high > most:
            found = achieved(goal, most)
            raise UsageError(
                f"{most} cases are too few: they catch the increase with probability {found.catch:.3g} and reject "
                f"a right runtime with {found.false_alarm:.3g}: aim at a larger increase"
            )
    low = 1 if high == 8 else high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if met(middle) else (middle, high)
    # Teeth shrink with n: the last failure is not far above a first success.
    step = max(1, high // _STEPS)
    n = high + high // 2
    while not met(n):
        n += max(1, high // 10)
    while n > 0 and met(n):
        n -= step
    return achieved(goal, n + step)
