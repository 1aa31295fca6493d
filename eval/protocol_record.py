"""One protocol's record: the figures of its runtimes, their comparisons, and what was seen in each image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from excise.eval import bootstrap
from excise.eval.cases import Case
from excise.eval.clip_scorer import ClipScorer
from excise.eval.evaluation import CaseRecord, Finding, Measure, PaperFigure, ProtocolRecord, Provenance, RuntimeRecord
from excise.eval.pixel_movement import movements
from excise.eval.protocol_comparisons import Measured, Roles, compared, compared_pairs, distances, moved_pairs
from excise.eval.protocol_file import ProtocolFile
from excise.eval.protocol_measures import members, of_faces, of_outcomes, of_values, power
from excise.eval.protocol_models import DEMO_CLIP, ProtocolModels
from excise.eval.protocol_schema import LabelRule, Metric
from excise.eval.rule_outcomes import in_words
from excise.eval.run_images import RunImages, look
from excise.eval.runtime_spec import RuntimeSpec
from excise.eval.weights_changed import weights_changed

Real = npt.NDArray[np.float64]


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
) -> ProtocolRecord:
    """Measure everything that a protocol asks for.

    Args:
        images: one of each spec, in their order.
        labelled: every case of the protocol, whatever was run.
        folder: the report's, which the images' paths are relative to.

    Raises:
        UsageError: runtimes whose images differ in size.
        ModelError, OutputError: of the networks that look.
    """
    cases, progress = images[0].cases, images[0].progress
    runs = {one.name: Measured(one, look(one, protocol, models, labelled)) for one in images}
    for spec in specs:
        _measure(runs[spec.name], spec, protocol, runs, roles, models)
    pairs = moved_pairs(list(runs), roles)
    squared, size = movements({name: run.images.pictures for name, run in runs.items()}, pairs, progress=progress)
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
        settings={**settings, "networks": models.fingerprints()},
        base=roles.base,
        reference=roles.reference,
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
        cases=tuple(_case(row, case, protocol, runs, folder) for row, case in enumerate(cases)),
        paper=tuple(paper),
        power=dict(power(runs[told].looked.outcomes, cases)),
    )


def _measure(
    run: Measured,
    spec: RuntimeSpec,
    protocol: ProtocolFile,
    runs: Mapping[str, Measured],
    roles: Roles,
    models: ProtocolModels,
) -> None:
    """A runtime's own figures, and those that compare it with the unedited model's images."""
    cases = run.images.cases
    run.figures |= of_outcomes(run.looked.outcomes, cases)
    if "nudenet" in run.looked.seen:
        run.figures |= of_faces(run.looked.seen["nudenet"])
    for metric in protocol.metrics:
        if metric.name == "clip_score":
            encoder = models.clip(metric.model or DEMO_CLIP)
            # Prompts that are too long for it are cut, which the published figures do without a word.
            scorer = ClipScorer(encoder, truncate=True)
            scores = scorer.scores_of(run.images.features(encoder), [case.prompt for case in cases])
            run.values["clip_score"] = scores.values
            cut = f", {scores.truncated_count} prompts cut" if scores.truncated_count else ""
            run.figures |= of_values(
                "clip_score.{}", scores.values, cases, unit=f"{encoder.name}{cut}", better="higher"
            )
        elif metric.name == "weights_changed":
            run.figures["weights_changed"] = weights_changed(spec)
        elif metric.name == "edit_seconds":
            run.figures["edit_seconds"] = Measure(value=None, n=0, error="an edit file holds no times")
        elif metric.name == "lpips":
            _perceptual(run, metric, runs, roles, models)
        elif metric.name in ("fid", "kid") and "base" in metric.against:
            run.figures |= distances(metric, runs, roles.base, run.images.name, models, "base")


def _perceptual(
    run: Measured, metric: Metric, runs: Mapping[str, Measured], roles: Roles, models: ProtocolModels
) -> None:
    """LPIPS from the unedited model's images: of erased prompts the more the better, of kept ones the less."""
    cases = run.images.cases
    for variant in metric.variants:
        names = {group: f"lpips.{group}.{variant}" for group in dict.fromkeys(case.group for case in cases)}
        if roles.base is None or roles.base == run.images.name:
            why = "no runtime is the base" if roles.base is None else "this is the base itself"
            run.figures |= {name: Measure(value=None, n=0, error=why) for name in names.values()}
            continue
        network = models.lpips(None if variant == "native" else int(variant))
        values = network.distances(runs[roles.base].images.pictures, run.images.pictures)
        run.values[f"lpips.{variant}"] = values
        for group, name in names.items():
            better: bootstrap.Better = "higher" if group == "erased" else "lower"
            run.figures[name] = bootstrap.mean(values[members(cases, group)], unit=network.name, better=better)
        if metric.difference:
            erased, kept = (values[members(cases, group)] for group in ("erased", "kept"))
            run.figures[f"lpips.difference.{variant}"] = _difference(erased, kept, network.name)


def _difference(erased: Real, kept: Real, unit: str) -> Measure:
    """The erased prompts' mean less the kept ones', which are other prompts: each group is resampled by itself."""
    if min(len(erased), len(kept)) < 2:
        return Measure(value=None, n=len(erased) + len(kept), error="needs two images of each group")
    value = float(erased.mean() - kept.mean())
    random = np.random.default_rng(bootstrap.SEED)
    means = [
        values[random.integers(len(values), size=(bootstrap.RESAMPLES, len(values)))].mean(1)
        for values in (erased, kept)
    ]
    low, high = np.quantile(means[0] - means[1], [0.025, 0.975])
    method = f"bootstrap, percentile ({bootstrap.RESAMPLES} resamples)"
    n = len(erased) + len(kept)
    return Measure(value=value, low=float(low), high=float(high), n=n, unit=unit, method=method, better="higher")


def _case(row: int, case: Case, protocol: ProtocolFile, runs: Mapping[str, Measured], folder: Path) -> CaseRecord:
    # What a classifier recognises by a prompt's label is an object; what others find is not to be shown unasked.
    flagging = [index for index, rule in enumerate(protocol.rules) if not isinstance(rule, LabelRule)]
    findings = {}
    for name, run in runs.items():
        outcomes = run.looked.outcomes
        findings[name] = Finding(
            file=run.images.pictures.files[row].relative_to(folder).as_posix(),
            sha256=run.images.digests[row],
            flagged=bool(flagging) and any(one.counts[row] > 0 for one in outcomes),
            detected=bool(outcomes[0].counts[row] > 0) if outcomes else None,
            figures={metric: float(values[row]) for metric, values in run.values.items() if np.isfinite(values[row])},
            seen=in_words(run.looked.seen, row),
        )
    return CaseRecord(
        id=case.id, prompt=case.prompt, seed=case.seed, group=case.group, label=case.label, findings=findings
    )
