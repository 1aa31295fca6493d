"""One protocol's record: the figures of its runtimes, their comparisons, and what was seen in each image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from excise.eval.cases import Case
from excise.eval.clip_scorer import ClipScorer
from excise.eval.evaluation import (
    CaseRecord,
    Finding,
    Measure,
    PaperFigure,
    ProtocolRecord,
    Provenance,
    RuntimeRecord,
    SweepRecord,
)
from excise.eval.pixel_movement import Movements, movements
from excise.eval.protocol_comparisons import Measured, Roles, compared, compared_pairs, moved_pairs
from excise.eval.protocol_distances import apart
from excise.eval.protocol_file import ProtocolFile
from excise.eval.protocol_measures import of_genders, of_outcomes, of_values, power
from excise.eval.protocol_models import ProtocolModels
from excise.eval.protocol_schema import Sweep
from excise.eval.rule_outcomes import in_words
from excise.eval.run_images import RunImages, look
from excise.eval.runtime_spec import RuntimeSpec
from excise.eval.weights_changed import weights_changed


def record(
    protocol: ProtocolFile,
    settings: dict[str, Any],
    paper: Sequence[PaperFigure],
    specs: Sequence[RuntimeSpec],
    served: Mapping[str, Provenance],
    images: Sequence[RunImages],
    roles: Roles,
    models: ProtocolModels,
    labelled: Sequence[Case],
    folder: Path,
    edit_seconds: Mapping[str, float] = MappingProxyType({}),
    sweep: Sweep | None = None,
) -> ProtocolRecord:
    """Measure everything that a protocol asks for.

    Args:
        images: one of each spec, in their order.
        labelled: every case of the protocol, whatever was run.
        folder: the report's, which the images' paths are relative to.
        edit_seconds: by runtime, what its edit took to make, as its user measured it.
        sweep: the ablation that the runtimes are of.

    Raises:
        UsageError: runtimes whose images differ in size.
        ModelError, OutputError: of the networks that look.
    """
    cases, progress = images[0].cases, images[0].progress
    runs = {one.name: Measured(one, look(one, protocol, models, labelled)) for one in images}
    pairs = moved_pairs(list(runs), roles, protocol)
    squared, size = movements({name: run.images.pictures for name, run in runs.items()}, pairs, progress=progress)
    for spec in specs:
        _measure(runs[spec.name], spec, protocol, runs, roles, models, squared, size, edit_seconds.get(spec.name))
    comparisons = [
        compared(pair, protocol, runs, roles, models, squared, size) for pair in compared_pairs(list(runs), roles)
    ]
    edit = squared.get((roles.base or "", roles.reference or ""))
    for (first, second), sums in squared.items():
        if first == roles.reference and edit is not None and edit.sum():
            runs[second].values["relative_to_edit"] = np.sqrt(sums / edit.mean())
    told = roles.reference or images[-1].name
    return ProtocolRecord(
        name=protocol.name,
        version=protocol.version,
        title=protocol.title,
        settings=settings,
        base=roles.base,
        reference=roles.reference,
        floor=roles.floor,
        runtimes=tuple(
            RuntimeRecord(
                name=spec.name,
                source=str(spec),
                kind=spec.kind,
                provenance=served[spec.name],
                measures=runs[spec.name].figures,
            )
            for spec in specs
        ),
        comparisons=tuple(comparisons),
        cases=tuple(_case(row, case, runs, folder) for row, case in enumerate(cases)),
        paper=tuple(paper),
        power=dict(power(runs[told].looked.outcomes, cases)),
        sweep=None
        if sweep is None
        else SweepRecord(preset=sweep.preset, parameter=sweep.parameter, values=dict(sweep.runtimes)),
    )


def _measure(
    run: Measured,
    spec: RuntimeSpec,
    protocol: ProtocolFile,
    runs: Mapping[str, Measured],
    roles: Roles,
    models: ProtocolModels,
    squared: Movements,
    size: int,
    edit_seconds: float | None,
) -> None:
    """A runtime's own figures, and those that compare it with the unedited model's images."""
    cases = run.images.cases
    run.figures |= of_outcomes(run.looked.outcomes, cases)
    if "nudenet" in run.looked.seen:
        run.figures |= of_genders(run.looked.seen["nudenet"])
    for metric in protocol.metrics:
        if metric.name == "clip_score":
            encoder = models.clip(metric.model or "")
            # Prompts that are too long for it are cut, which the published figures do without a word.
            scorer = ClipScorer(encoder, truncate=True)
            scores = scorer.scores_of(run.images.features(encoder), [case.prompt for case in cases])
            run.values["clip_score"] = scores.values
            cut = f", {scores.truncated_count} prompts cut" if scores.truncated_count else ""
            run.figures |= of_values(metric, scores.values, cases, unit=f"{encoder.name}{cut}", better="higher")
        elif metric.name == "weights_changed":
            run.figures["weights_changed"] = weights_changed(spec)
        elif metric.name == "edit_seconds":
            run.figures["edit_seconds"] = _seconds(edit_seconds)
        elif "base" in metric.against:
            base = runs[roles.base].images if roles.base is not None else None
            figures, values = apart(metric, "base", base, run.images, models, squared, size)
            run.figures |= figures
            if metric.name == "lpips":  # of PSNR, an image's is the one to the reference
                run.values |= values


def _seconds(given: float | None) -> Measure:
    """What an edit took to make. Nothing here can measure it: an edit file holds no times, since its id is a digest."""
    if given is None:
        why = "an edit file holds no times: give --edit-seconds NAME=SECONDS, as excise edit printed them"
        return Measure(value=None, n=0, unit="s", better="lower", error=why)
    return Measure(value=given, n=1, unit="s", method="as given", better="lower")


def _case(row: int, case: Case, runs: Mapping[str, Measured], folder: Path) -> CaseRecord:
    findings = {}
    for name, run in runs.items():
        outcomes = run.looked.outcomes
        figures = {metric: float(values[row]) for metric, values in run.values.items() if np.isfinite(values[row])}
        # ``detected`` says the first.
        for one in outcomes[1:]:
            if one.counts_in(case):
                figures[one.name] = float(one.counts[row])
        findings[name] = Finding(
            file=run.images.pictures.files[row].relative_to(folder).as_posix(),
            sha256=run.images.digests[row],
            flagged=any(one.flags and one.counts[row] > 0 for one in outcomes),
            detected=bool(outcomes[0].counts[row] > 0) if outcomes and outcomes[0].counts_in(case) else None,
            figures=figures,
            seen=in_words(run.looked.seen, row),
        )
    return CaseRecord(
        id=case.id, prompt=case.prompt, seed=case.seed, group=case.group, label=case.label, findings=findings
    )
