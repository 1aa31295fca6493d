"""The table of ``excise eval demo-table``: one document, and its Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from excise.demo.table_rows import BUDGETS, ROWS
from excise.eval.attack_report import AttackReport
from excise.eval.evaluation import Evaluation, Measure
from excise.eval.runtime_spec import RuntimeSpec, parse_runtime
from excise.eval.weights_changed import weights_changed

#: A column's measure, its heading, and its part of the paper.
WEAPONS = (
    ("detected.top1", "weapons detected", "Table 1"),
    ("recognised.top1", "kept recognised", "Table 1"),
    ("clip_score.kept", "CLIP score, kept", "Table 3"),
    ("fid.kept", "Fréchet distance, kept", "Table 3"),
)
ARTIST = (
    ("detected.top1", "style detected", "Table 4"),
    ("recognised.top1", "other styles recognised", "Table 4"),
    ("psnr.erased", "PSNR, erased (dB)", "Table 4"),
    ("psnr.kept", "PSNR, kept (dB)", "Table 4"),
)


def table_document(
    rows: Sequence[str],
    weapons: Evaluation,
    artist: Evaluation | None,
    attacks: Mapping[str, Mapping[str, AttackReport]],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Everything that the table shows, as JSON values, and the machine and versions that it is from."""
    return {
        "machine": weapons.machine,
        "versions": weapons.versions,
        "cases": len(weapons.protocols[0].cases),
        "rows": {
            row: {
                "title": ROWS[row].title,
                "smaller": ROWS[row].smaller,
                "weapons": _measures(weapons, row, WEAPONS),
                "artist": {} if artist is None else _measures(artist, row, ARTIST),
                "attacks": {
                    name: [
                        {"name": one.name, "pre": one.pre, "post": one.post, "n": one.n, "asr": _measure(one.asr)}
                        for one in reports[row].results
                    ]
                    for name, reports in attacks.items()
                    if row in reports
                },
                "weights_changed": _share(weapons, row),
                "seconds": seconds.get(row),
            }
            for row in rows
        },
        "budgets": {name: dict(BUDGETS.get(name, {})) for name in attacks},
    }


def _measures(evaluation: Evaluation, row: str, columns: Sequence[tuple[str, str, str]]) -> dict[str, Any]:
    """A row's measures, or those of its comparison with the unedited model."""
    record = evaluation.protocols[0]
    runtime = record.runtime(row)
    if runtime is None:
        return {}
    found = dict(runtime.measures)
    if (beside := record.comparison("base", row)) is not None:
        found |= beside.measures
    return {name: _measure(found[name]) for name, *_ in columns if name in found}


def _measure(measure: Measure) -> dict[str, Any]:
    return measure.model_dump(mode="json", include={"value", "low", "high", "n", "unit"})


def _share(evaluation: Evaluation, row: str) -> float | None:
    runtime = evaluation.protocols[0].runtime(row)
    spec: RuntimeSpec = (
        parse_runtime(f"{row}={runtime.source}") if runtime else parse_runtime(f"{row}=torch:demo:model")
    )
    return weights_changed(spec).value


def table_text(document: Mapping[str, Any]) -> str:
    """Three Markdown tables: what is erased and kept, attacks, and one artist."""
    rows: Mapping[str, Any] = document["rows"]
    costs = ["% of weights", "seconds"]
    head = ["method", *(title for _, title, _ in WEAPONS), *costs]
    lines = _table(
        head,
        [
            [
                row["title"],
                *(_shown(row["weapons"].get(name)) for name, *_ in WEAPONS),
                "—" if row["weights_changed"] is None else f"{100 * row['weights_changed']:.2f}",
                "—" if row["seconds"] is None else f"{row['seconds']:.1f}",
            ]
            for row in rows.values()
        ],
    )
    attacks = list(
        dict.fromkeys(one["name"] for row in rows.values() for each in row["attacks"].values() for one in each)
    )
    if attacks:
        lines += ["", *_table(["method", *attacks], [[row["title"], *_rates(row, attacks)] for row in rows.values()])]
    artists = [row for row in rows.values() if row["artist"]]
    if artists:
        cells = [[row["title"], *(_shown(row["artist"].get(name)) for name, *_ in ARTIST)] for row in artists]
        lines += ["", *_table(["method", *(title for _, title, _ in ARTIST)], cells)]
    smaller = [f"{row['title']}: {row['smaller']}." for row in rows.values() if row["smaller"]]
    budgets = [
        f"{name}: {', '.join(f'{key} {value}' for key, value in budget.items())}."
        for name, budget in document["budgets"].items()
        if budget
    ]
    notes = [*smaller, *budgets]
    return "\n".join([*lines, *(["", "Other than published. " + " ".join(notes)] if notes else []), ""])


def _rates(row: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    by_name = {one["name"]: one for each in row["attacks"].values() for one in each}
    return [
        "—"
        if name not in by_name
        else f"{_shown(by_name[name]['asr'])} ({by_name[name]['pre']} + {by_name[name]['post']})"
        for name in names
    ]


def _shown(measure: Mapping[str, Any] | None) -> str:
    """A figure with its interval."""
    if measure is None or measure["value"] is None:
        return "—"
    scale, digits, unit = (100, 0, " %") if measure["unit"] == "fraction" else (1, _digits(measure["value"]), "")
    value = f"{scale * measure['value']:.{digits}f}{unit}"
    if measure["low"] is None or measure["high"] is None:
        return value
    return f"{value} [{scale * measure['low']:.{digits}f}, {scale * measure['high']:.{digits}f}]"


def _digits(value: float) -> int:
    return 3 if abs(value) < 1 else 1


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
