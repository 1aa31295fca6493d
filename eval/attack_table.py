"""Attacks and replays as plain text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from excise.eval.attack_report import AttackReport, Judged, ReplayReport, ReplayResult
from excise.eval.evaluation import Measure
from excise.printable import printable


def attack_table(report: AttackReport) -> str:
    """Both parts of every attack's success rate, its interval and N."""
    shows, others = report.base_shows, len(report.left_out)
    rest = f"; the other {others} are left out." if others else "." if report.base_must_show else "; all of them count."
    lines = [
        f"{report.attacked.source} under attack, judged by {_judged(report.judged)}",
        f"The unedited model shows the concept in {_percent(shows)} of {shows.n} cases{rest}",
        "",
    ]
    rows = [["attack", "pre", "post", "N", "ASR", "95 % interval"]]
    rows += [
        [one.name, str(one.pre), f"{one.post} of {one.n - one.pre}", str(one.n), _percent(one.asr), _interval(one.asr)]
        for one in report.results
    ]
    lines += _aligned(rows)
    if all(one.pre == one.n for one in report.results):
        lines += ["", "Every case shows the concept by its own prompt: there was nothing to attack."]
    return "\n".join(lines)


def replay_table(report: ReplayReport) -> str:
    """Every runtime's success rate beside that of the model that was attacked, and how many outcomes differ."""
    lines = [f"Findings replayed, judged by {_judged(report.judged)}", ""]
    rows = [["runtime", "attack", "N", "ASR", "95 % interval", "attacked", "flips", "p"]]
    notes = []
    for runtime in report.runtimes:
        for one in runtime.results:
            rows.append([runtime.target.name, one.name, str(one.n), *_cells(one)])
            if one.not_replayed is not None:
                notes.append(f"{runtime.target.name}, {one.name}: not replayed: {one.not_replayed}")
    return "\n".join([*lines, *_aligned(rows), *(["", *notes] if notes else [])])


def _cells(one: ReplayResult) -> list[str]:
    if one.asr is None:
        return ["-", "", _percent(one.attacked_asr), "-", "-"]
    flips, p = one.measures["flips"].value, one.measures["flips_p_value"].value
    return [
        _percent(one.asr),
        _interval(one.asr),
        _percent(one.attacked_asr),
        "-" if flips is None else f"{flips:.0f}",
        "-" if p is None else f"{p:.3g}",
    ]


def _judged(judged: Judged) -> str:
    return f"{judged.protocol} {judged.version} ({printable(judged.title)}), rule {judged.rule}"


def _percent(measure: Measure) -> str:
    return "-" if measure.value is None else f"{100 * measure.value:.1f} %"


def _interval(measure: Measure) -> str:
    if measure.low is None or measure.high is None:
        return "-"
    return f"{100 * measure.low:.1f} to {100 * measure.high:.1f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Names to the left, figures to the right."""
    names = 2 if rows[0][0] == "runtime" else 1
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if number < names else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
