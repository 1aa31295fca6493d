"""What a report needs to know of a verdict: its checks, whoever decided them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, Protocol

from excise.errors import UsageError
from excise.eval.evaluation import Measure
from excise.eval.evaluation_figures import cell_text, one_line

Status = Literal["passed", "failed", "skipped"]

#: In a list of checks, what needs attention comes first.
ORDER: Final[tuple[Status, ...]] = ("failed", "skipped", "passed")


class Check(Protocol):
    """One condition of a verdict.

    ``measured`` and ``bound`` may be a number, a text, a ``Measure``, anything that prints well, or None where there is
    none. ``images`` are the pictures that explain the check: files as in ``Finding.file``, or the ids of cases.
    """

    @property
    def name(self) -> str: ...
    @property
    def status(self) -> Status: ...
    @property
    def sentence(self) -> str: ...
    @property
    def measured(self) -> object: ...
    @property
    def bound(self) -> object: ...
    @property
    def images(self) -> Sequence[str]: ...


def in_order(checks: Sequence[Check]) -> list[Check]:
    """Failed checks first, then skipped ones, then the rest; otherwise as given.

    Raises:
        UsageError: a check of another status.
    """
    for check in checks:
        if check.status not in ORDER:
            raise UsageError(f"check {check.name!r} is {check.status!r}: a check is {', '.join(ORDER)}")
    return sorted(checks, key=lambda check: ORDER.index(check.status))


def outcome(checks: Sequence[Check]) -> Status:
    """``failed`` if any check is, ``passed`` if none failed and at least one passed, otherwise ``skipped``."""
    found = {check.status for check in checks}
    return "failed" if "failed" in found else "passed" if "passed" in found else "skipped"


def headline(checks: Sequence[Check]) -> str:
    """The verdict in words, such as ``Failed: 1 of 5 checks failed, 1 skipped``."""
    count = {status: sum(check.status == status for check in checks) for status in ORDER}
    skipped = f", {count['skipped']} skipped" if count["skipped"] else ""
    match outcome(checks):
        case "failed":
            return f"Failed: {count['failed']} of {len(checks)} checks failed{skipped}"
        case "passed":
            return f"Passed: {count['passed']} of {len(checks)} checks passed{skipped}"
        case _:
            return "Not decided: " + (f"all {len(checks)} checks were skipped" if checks else "there are no checks")


def requirement(check: Check) -> str:
    """What was measured and what was required, such as ``measured 3.1, bound 2``; what there is of it."""
    parts = [("measured", check.measured), ("bound", check.bound)]
    return ", ".join(f"{word} {_printed(value)}" for word, value in parts if value is not None)


def _printed(value: object) -> str:
    """Numbers with at most 6 digits, figures with their interval, all on one line."""
    if isinstance(value, Measure):
        return cell_text(value)
    return f"{value:.6g}" if isinstance(value, float) else one_line(str(value))
