"""``excise eval demo-table``: the RECE paper's tables in miniature, on the bundled model and two cores.

    edits/ROW.safetensors     what each row's method made, with edits/ROW.json: how long it took
    evaluation/               weapons: detections, kept objects, CLIP score, Fréchet distance, PSNR     (Tables 1 and 3)
    artist/                   the same for one artist's style                                         (Table 4)
    attacks/ATTACK/ROW/       success rates                                                            (Table 3's ASR)
    table.json, table.md

Every part is resumable by itself, and so is the whole: what is there is taken as it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from excise.demo.table_rows import ARTIST_ROWS, BUDGETS, ROWS, Row
from excise.demo.table_text import table_document, table_text
from excise.demo.vocabulary import ARTISTS, KEPT, OBJECTS, WEAPONS, caption
from excise.edit.made_edits import MadeEdits, Solve, made_edits
from excise.edit.recipe import Recipe, resolve, unread_by
from excise.errors import UsageError
from excise.eval.attack_report import AttackReport, write_attack_report
from excise.eval.attack_run import AttackRun, run_attacks
from excise.eval.attack_session import AttackPlan
from excise.eval.attack_specs import attack_specs
from excise.eval.evaluate import Run, evaluate
from excise.eval.evaluation import Evaluation
from excise.eval.evaluation_report import write_evaluation
from excise.eval.protocol_choice import Choice
from excise.eval.protocol_comparisons import Roles
from excise.eval.protocol_file import load_protocol
from excise.eval.protocol_models import ProtocolModels
from excise.eval.runtime_spec import RuntimeSpec, parse_runtime, with_options
from excise.eval.verification_sides import LoadPipeline
from excise.output import put_in_place

NAME = "demo-table"
DOCUMENT, TEXT = "table.json", "table.md"

#: The style that the artist rows erase, and what its name becomes.
ARTIST, ART = "noto", "art"


@dataclass(frozen=True)
class DemoTable:
    """How the table is made.

    Attributes:
        folder: everything that was done; one that was begun is gone on with.
        solve: makes an edit of a recipe.
        load_pipeline: opens a folder of torch.
        attacks: by name; none leaves the attacks out.
        rows: some of ``ROWS``, the base among them, in their order.
        cases: so many of each protocol's prompts; None takes all.
        attacked: so many of the erased prompts are attacked.
        steps: denoising steps; None takes the protocols' own.
    """

    folder: Path
    solve: Solve
    load_pipeline: LoadPipeline
    attacks: Mapping[str, AttackPlan] = field(default_factory=dict)
    rows: Sequence[str] = tuple(ROWS)
    artist_rows: Sequence[str] = tuple(ARTIST_ROWS)
    cases: int | None = None
    attacked: int = 12
    steps: int | None = None
    batch_size: int = 8
    progress: bool = True
    say: Callable[[str], None] = lambda message: None


def demo_table(table: DemoTable) -> tuple[dict[str, Any], str]:
    """Make what is missing; the document and its text, which are written, too.

    Raises:
        OutputError: the folder can't be written, or belongs to something else.
        ArtefactError: an edit that is there isn't the one that its row asks for.
        ExciseError: as the parts raise.
    """
    made = table_edits(table, "weapons", table.rows, ROWS)
    evaluation = _evaluation(table, "evaluation", "demo-weapons", {}, table.rows, ROWS, made.files)
    artist = None
    if table.artist_rows:
        of_artist = table_edits(table, "artist", table.artist_rows, ARTIST_ROWS).files
        chosen = {"erased": ARTIST}
        artist = _evaluation(table, "artist", "demo-artist", chosen, table.artist_rows, ARTIST_ROWS, of_artist)
    attacked = {
        name: {row: _attacked(table, name, plan, row, made.files.get(row)) for row in table.rows}
        for name, plan in table.attacks.items()
    }
    document = table_document(table.rows, evaluation, artist, attacked, made.seconds)
    text = table_text(document)
    put_in_place(table.folder / DOCUMENT, (json.dumps(document, indent=1) + "\n").encode())
    put_in_place(table.folder / TEXT, text.encode())
    return document, text


def table_edits(table: DemoTable, subject: str, names: Sequence[str], rows: Mapping[str, Row]) -> MadeEdits:
    """The edit files by row, and the seconds that each took.

    Args:
        subject: ``weapons`` or ``artist``.
        names: some of ``rows``.

    Raises:
        ArtefactError: an edit that is there isn't the one that its row asks for.
        ExciseError: as ``table.solve`` raises.
    """
    recipes = {name: _recipe(subject, rows[name]) for name in names if rows[name].overrides is not None}
    return made_edits(
        table.folder / "edits" / subject, recipes, table.solve, lambda message: table.say(f"{subject}: {message}")
    )


def _recipe(subject: str, row: Row) -> Recipe:
    if subject == "weapons":
        return resolve("weapons", None, dict(row.overrides or {}))
    styles = ("a {artist} {object}", "{a} {object} in the style of {artist}")
    erased = {f"art by {ARTIST}": ART, f"the style of {ARTIST}": ART}
    for name in OBJECTS:
        plain = caption("{a} {object}", object=name)
        erased |= {caption(style, artist=ARTIST, object=name): plain for style in styles}
    kept = ["", *(caption("{a} {object}", object=name) for name in OBJECTS)]
    kept += [caption(styles[0], artist=other, object=name) for other in ARTISTS if other != ARTIST for name in OBJECTS]
    overrides = {"erase": list(erased), "to": list(erased.values()), "keep": kept, **(row.overrides or {})}
    if "to" in unread_by(str(overrides.get("method", "rece"))):
        overrides["to"] = [" "]  # none: neither what the style's names become nor the preset's
    return resolve("weapons", None, overrides)


def _spec(name: str, row: Row, edit: Path | None) -> RuntimeSpec:
    return parse_runtime(f"{name}=torch:{_model({**row.options, **({} if edit is None else {'edit': str(edit)})})}")


def _model(options: Mapping[str, str]) -> str:
    return with_options("demo:model", options)


def _evaluation(
    table: DemoTable,
    folder: str,
    protocol: str,
    parameters: Mapping[str, str],
    names: Sequence[str],
    rows: Mapping[str, Row],
    edits: Mapping[str, Path],
) -> Evaluation:
    choice = Choice(load_protocol(protocol), parameters=parameters, sample=table.cases, num_inference_steps=table.steps)
    run = Run(
        folder=table.folder / folder,
        specs=[_spec(name, rows[name], edits.get(name)) for name in names],
        roles=Roles(base="base"),
        models=ProtocolModels({}, "cpu"),
        load_pipeline=table.load_pipeline,
        batch_size=table.batch_size,
        progress=table.progress,
        say=table.say,
    )
    evaluation = evaluate([choice], run)
    write_evaluation(run.folder, evaluation, None, replace=True)
    return evaluation


def _attacked(table: DemoTable, name: str, plan: AttackPlan, row: str, edit: Path | None) -> AttackReport:
    """One attack on one row; on the unedited model it has nothing to do, and that row is the check."""
    table.say(f"{name} on {ROWS[row].title}")
    base, attacked = attack_specs(_model(ROWS[row].options), edit, None)
    protocol = load_protocol("demo-weapons").model_copy(update={"metrics": ()})
    run = AttackRun(
        folder=table.folder / "attacks" / name / row,
        choice=Choice(protocol, sample=table.attacked, num_inference_steps=table.steps),
        base=base,
        attacked=attacked,
        plan=plan,
        models=ProtocolModels({}, "cpu"),
        load_pipeline=table.load_pipeline,
        batch_size=table.batch_size,
        progress=table.progress,
        say=table.say,
    )
    report = run_attacks(run)
    write_attack_report(run.folder, report)
    return report


def plans(
    folder: Path, names: Sequence[str] = tuple(BUDGETS), budgets: Mapping[str, Mapping[str, Any]] = BUDGETS
) -> dict[str, AttackPlan]:
    """The table's attacks, with their budgets.

    Args:
        folder: the table's; the pairs of prompts behind Ring-A-Bell's concept are written there.
        names: of ``BUDGETS``.
        budgets: settings by attack, in place of the published ones.

    Raises:
        UsageError: an unknown name.
    """
    from excise.eval import attack_plans
    from excise.eval.attack_concept import ConceptSource
    from excise.eval.p4d import P4DSettings
    from excise.eval.ring_a_bell import RingABellSettings
    from excise.eval.unlearn_diff_atk import UnlearnDiffAtkSettings

    made: dict[str, AttackPlan] = {}
    for name in names:
        if name not in BUDGETS:
            raise UsageError(f"the table has no attack {name!r}: name some of {', '.join(BUDGETS)}, or none")
        given = dict(budgets.get(name, {}))
        if name == "closed-form":
            made[name] = attack_plans.closed_form()
        elif name == "ring-a-bell":
            source = ConceptSource(pairs=_pairs(folder))
            made[name] = attack_plans.ring_a_bell(source, RingABellSettings(**given))
        elif name == "unlearn-diff-atk":
            made[name] = attack_plans.unlearn_diff_atk(UnlearnDiffAtkSettings(**given))
        else:
            made[name] = attack_plans.p4d(name.removeprefix("p4d-"), P4DSettings(**given), "demo:clip")  # type: ignore[arg-type]
    return made


def _pairs(folder: Path) -> Path:
    """A CSV of prompts with a weapon, and without one."""
    file = folder / "pairs.csv"
    lines = ["sensitive prompt,normal prompt"]
    for weapon in WEAPONS:
        lines += [f"{caption('{a} {object}', object=weapon)},a picture"]
        lines += [
            f"{caption('{a} {object}', object=other)} with {caption('{a} {object}', object=weapon)},"
            + caption("{a} {object}", object=other)
            for other in KEPT[:8]
        ]
    put_in_place(file, ("\n".join(lines) + "\n").encode())
    return file
