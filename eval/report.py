"""The report of a judgement: ``report.json`` for machines, ``report.html`` for people, ``grid.png`` for a README."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.resources
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from excise.eval.grids import data_uri, labelled_grid, png, reduced, strip
from excise.eval.protocol import PromptSeeds
from excise.eval.results import ROLES, Results
from excise.eval.statistics import Proportion
from excise.eval.verdict import Check, Verdict, count_tolerances
from excise.output import check_free, new_file

FILES: tuple[str, ...] = ("report.json", "report.html", "grid.png")
#: Whose versions a report names, where they are installed.
_PACKAGES = ("excise", "numpy", "scipy", "torch", "diffusers", "transformers", "onnxruntime", "clean-fid")
#: Seeds shown of each erased prompt, and columns of ``grid.png`` for kept ones.
_SEEDS_SHOWN, _KEPT_COLUMNS = 4, 4


def write_report(folder: Path, results: Results, verdict: Verdict, context: Mapping[str, Any]) -> dict[str, Path]:
    """Write ``FILES`` into ``folder``, made if need be, and return their paths by name.

    Args:
        context: what the caller knows and the report must name: the edit's id, the manifest's hash, …; JSON values.

    Raises:
        OutputError: one of the files exists already, or can't be written.
        ValueError: ``context`` is not JSON.
    """
    paths = {name: folder / name for name in FILES}
    for path in paths.values():
        check_free(path)
    contents = {
        "report.json": (json.dumps(as_json(results, verdict, context), indent=1, allow_nan=False) + "\n").encode(),
        "report.html": html(results, verdict, context).encode(),
        "grid.png": png(_readme_grid(results)),
    }
    for name, path in paths.items():
        with new_file(path) as partial:
            partial.write_bytes(contents[name])
    return paths


def as_json(results: Results, verdict: Verdict, context: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that was measured, except the pixels, in a fixed order."""
    protocol = results.protocol
    return {
        "format": 1,
        "passed": verdict.passed,
        "checks": [dataclasses.asdict(check) for check in verdict.checks],
        "context": dict(context),
        "versions": versions(),
        "protocol": {
            "name": protocol.name,
            "num_inference_steps": protocol.num_inference_steps,
            "guidance_scale": protocol.guidance_scale,
            "scheduler": protocol.scheduler,
            "erased": [_prompt_json(row) for row in protocol.erased],
            "kept": [_prompt_json(row) for row in protocol.kept],
            "labels": {label: list(prompts) for label, prompts in protocol.labels.items()},
            "erased_labels": [label for label in protocol.labels if label in protocol.erased_labels],
        },
        "detector": {"name": results.detector, "feature_dimension": results.feature_dimension},
        "runtimes": {
            role: {
                "name": run.name,
                "detections": _proportion_json(run.detections),
                "kept_accuracy": _proportion_json(run.kept_accuracy),
                "clip_score_erased": run.clip_score_erased,
                "clip_score_kept": run.clip_score_kept,
                "fid_kept": run.fid_kept,
                "fid_images": protocol.kept_count,
                "seconds_per_image": run.seconds_per_image,
            }
            for role, run in _runs(results)
        },
        "agreement": {
            "erased": {**dataclasses.asdict(results.agreement.erased), "tolerance": count_tolerances(results)[0]},
            "kept": {**dataclasses.asdict(results.agreement.kept), "tolerance": count_tolerances(results)[1]},
            "mean_difference_grey_levels": results.agreement.mean_difference,
            "max_difference_grey_levels": results.agreement.max_difference,
        },
        "rounding_noise": {
            "amplitude_grey_levels": results.stability.amplitude,
            "draws": results.stability.draws,
            "seed": results.stability.seed,
        },
        "images": [
            {
                "prompt": row.prompt,
                "label": row.label,
                "seed": row.seeds[0],
                "erased": number < protocol.erased_count,
                "delta": float(results.stability.delta[number]),
                "runtimes": {
                    role: {
                        "top": list(protocol.labels)[run.top[number]],
                        "success": bool(run.success[number]),
                        "margin": float(run.margin[number]),
                    }
                    for role, run in _runs(results)
                },
            }
            for number, row in enumerate(protocol.rows())
        ],
    }


def html(results: Results, verdict: Verdict, context: Mapping[str, Any]) -> str:
    """One page with everything in it: no scripts, nothing fetched."""
    template = importlib.resources.files("excise.eval").joinpath("report.html.jinja").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(template).render(
        results=results,
        protocol=results.protocol,
        verdict=verdict,
        roles=ROLES,
        figures=figures(results),
        checks=[(check, requirement(check)) for check in verdict.checks],
        intervals=_intervals(results),
        erased=_erased_cards(results),
        kept=_kept_cards(results),
        context={name: _shown(value) for name, value in context.items()},
        versions=versions(),
    )


def table(results: Results, verdict: Verdict) -> str:
    """The figures and the verdict as plain text, at most 100 columns wide where the names allow."""
    rows = [("", list(ROLES)), *figures(results)]
    first = max(len(name) for name, _ in rows)
    width = max(len(cell) for _, cells in rows for cell in cells)
    lines = [f"{name:<{first}}  {'  '.join(f'{cell:>{width}}' for cell in cells)}".rstrip() for name, cells in rows]
    longest = max(len(check.name) for check in verdict.checks)
    lines.append("")
    for check in verdict.checks:
        lines.append(f"{'pass' if check.passed else 'FAIL'}  {check.name:<{longest}}  {requirement(check)}")
    for check in verdict.failures:
        lines += ["", f"FAIL  {check.name}: {check.sentence}"]
    passed = len(verdict.checks) - len(verdict.failures)
    lines += ["", f"{'PASSED' if verdict.passed else 'FAILED'}: {passed} of {len(verdict.checks)} checks"]
    return "\n".join(lines)


def figures(results: Results) -> list[tuple[str, list[str]]]:
    """The table of figures: a row's name, and its cells in the order of ``ROLES``."""
    runs = [run for _, run in _runs(results)]
    # metrics.fid_name would import torch through clean-fid.
    fid = f"FID (features of {results.detector}), {results.protocol.kept_count} kept images"
    return [
        ("Detections of the erased concept", [_counted(run.detections) for run in runs]),
        ("  95 % interval", [_interval(run.detections) for run in runs]),
        ("Kept objects recognised", [_counted(run.kept_accuracy) for run in runs]),
        ("  95 % interval", [_interval(run.kept_accuracy) for run in runs]),
        ("CLIP score, erased prompts", [f"{run.clip_score_erased:.1f}" for run in runs]),
        ("CLIP score, kept prompts", [f"{run.clip_score_kept:.1f}" for run in runs]),
        (fid, ["reference" if run.fid_kept is None else f"{run.fid_kept:.4f}" for run in runs]),
        ("Seconds per image", [f"{run.seconds_per_image:.3f}" for run in runs]),
    ]


def requirement(check: Check) -> str:
    """What was measured and what was required, such as ``0.97 (required: at least 0.90)``."""
    sense = "at least" if check.relation == ">=" else "at most"
    measured = "not measurable" if check.measured is None else f"{check.measured:.3g}"
    return f"{measured} (required: {sense} {check.threshold:g})"


def versions() -> dict[str, str]:
    """Python's version and those of the installed packages that the figures depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _runs(results: Results) -> list[tuple[str, Any]]:
    return [(role, results.runtimes[role]) for role in ROLES]


def _prompt_json(row: PromptSeeds) -> dict[str, Any]:
    return {"prompt": row.prompt, "label": row.label, "seeds": list(row.seeds)}


def _proportion_json(proportion: Proportion) -> dict[str, Any]:
    return {**dataclasses.asdict(proportion), "value": proportion.value}


def _counted(proportion: Proportion) -> str:
    return f"{proportion.successes}/{proportion.n} ({proportion.value:.1%})"


def _interval(proportion: Proportion) -> str:
    return f"{proportion.low:.1%}–{proportion.high:.1%}"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _intervals(results: Results) -> list[tuple[str, list[tuple[str, Proportion]]]]:
    return [
        ("Detections of the erased concept", [(role, run.detections) for role, run in _runs(results)]),
        ("Kept objects recognised", [(role, run.kept_accuracy) for role, run in _runs(results)]),
    ]


def _starts(rows: tuple[PromptSeeds, ...], first: int) -> list[int]:
    """The number of each prompt's first image."""
    return [first + int(n) for n in np.cumsum([0, *(len(row.seeds) for row in rows)])[:-1]]


def _erased_cards(results: Results) -> list[dict[str, Any]]:
    """One card an erased prompt: the same seeds in a strip for each runtime."""
    cards = []
    for row, start in zip(results.protocol.erased, _starts(results.protocol.erased, 0), strict=True):
        seeds = row.seeds[:_SEEDS_SHOWN]
        strips = []
        for role, run in _runs(results):
            detected = int(run.success[start : start + len(row.seeds)].sum())
            image = strip(reduced(run.images[start : start + len(seeds)]))
            strips.append(
                {
                    "role": role,
                    "note": f"{detected} of {len(row.seeds)} detected",
                    "source": data_uri(image),
                    "width": image.shape[1],
                    "height": image.shape[0],
                    "alt": f"{role}: “{row.prompt}”, seeds {', '.join(map(str, seeds))}",
                }
            )
        cards.append({"prompt": row.prompt, "seeds": ", ".join(map(str, seeds)), "strips": strips})
    return cards


def _kept_cards(results: Results) -> list[dict[str, Any]]:
    """One card a kept prompt: its first seed in each runtime, and what the detector saw in it."""
    names = list(results.protocol.labels)
    cards = []
    first = results.protocol.erased_count
    for row, start in zip(results.protocol.kept, _starts(results.protocol.kept, first), strict=True):
        tiles = []
        for role, run in _runs(results):
            image = reduced(run.images[start : start + 1])[0]
            seen = names[run.top[start]]
            tiles.append(
                {
                    "role": role,
                    "seen": seen,
                    "right": seen == row.label,
                    "source": data_uri(image),
                    "width": image.shape[1],
                    "height": image.shape[0],
                    "alt": f"{role}: “{row.prompt}”, seed {row.seeds[0]}",
                }
            )
        cards.append({"prompt": row.prompt, "seed": row.seeds[0], "tiles": tiles})
    return cards


def _readme_grid(results: Results) -> Any:
    """Rows are the runtimes; columns the first seed of each erased prompt, then of some kept ones."""
    protocol = results.protocol
    erased, kept = protocol.erased[:6], protocol.kept[:_KEPT_COLUMNS]
    starts = [*_starts(erased, 0), *_starts(kept, protocol.erased_count)]
    columns = [row.prompt for row in (*erased, *kept)]
    return labelled_grid([run.images[starts] for _, run in _runs(results)], ROLES, columns)
