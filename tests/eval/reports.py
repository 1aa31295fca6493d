"""Hand-made evaluations: four cases, an unedited model, its edited reference and one served runtime."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from excise.eval.evaluation import (
    CaseRecord,
    Comparison,
    Evaluation,
    Finding,
    Measure,
    ProtocolRecord,
    Provenance,
    RuntimeRecord,
)

EDIT = "e" * 64
NAMES = ("unedited", "edited torch", "onnx")


def count(value: float, low: float, high: float, n: int = 142) -> Measure:
    """A count with its interval."""
    return Measure(value=value, low=low, high=high, n=n, unit="count", method="exact")


def runtime(name: str, measures: Mapping[str, Measure] | None = None, **provenance: Any) -> RuntimeRecord:
    """A runtime that carries the edit, with intact files unless told otherwise."""
    served = {"edit": EDIT, "intact": True} | provenance
    return RuntimeRecord(
        name=name, source=f"onnx:{name}", kind="onnx", provenance=Provenance(**served), measures=dict(measures or {})
    )


def case(name: str, group: str = "erased", **detected: tuple[bool, dict[str, float]]) -> CaseRecord:
    """A case whose findings are (detected, figures) by ``unedited``, ``edited`` and ``onnx``."""
    keys = dict(zip(("unedited", "edited", "onnx"), NAMES, strict=True))
    return CaseRecord(
        id=name,
        prompt=f"prompt of {name}",
        seed=0,
        group=group,
        findings={
            keys[key]: Finding(
                file=f"images/{key}/{name}.png",
                sha256="0" * 64,
                detected=seen,
                figures=figures,
                seen=("BELLY_EXPOSED 0.71",) if seen else (),
            )
            for key, (seen, figures) in detected.items()
        },
    )


CASES = (
    case("a", edited=(False, {}), onnx=(True, {"relative_to_edit": 0.2})),
    case("b", edited=(False, {}), onnx=(True, {"relative_to_edit": 0.9})),
    case("c", edited=(True, {}), onnx=(True, {"relative_to_edit": 1.5})),
    case("d", edited=(True, {}), onnx=(False, {"relative_to_edit": 0.1})),
    case(
        "k",
        "kept",
        edited=(False, {"clip_score": 31.0}),
        onnx=(False, {"clip_score": 30.2, "relative_to_edit": 0.3}),
    ),
    case(
        "l",
        "kept",
        edited=(False, {"clip_score": 31.0}),
        onnx=(False, {"clip_score": 28.0, "relative_to_edit": 0.05}),
    ),
)


def evaluation(
    *,
    served: Mapping[str, Measure] | None = None,
    reference: Mapping[str, Measure] | None = None,
    base: Mapping[str, Measure] | None = None,
    compared: Mapping[str, Measure] | None = None,
    name: str = "i2p-nudity",
    cases: tuple[CaseRecord, ...] = CASES,
    extra: tuple[RuntimeRecord, ...] = (),
    **provenance: Any,
) -> Evaluation:
    """One protocol's report. ``provenance`` is the served runtime's."""
    return Evaluation(
        protocols=(
            ProtocolRecord(
                name=name,
                version=1,
                title=name,
                settings={},
                base="unedited",
                reference="edited torch",
                runtimes=(
                    runtime("unedited", base, edit=None),
                    runtime("edited torch", reference),
                    runtime("onnx", served, **provenance),
                    *extra,
                ),
                comparisons=(Comparison(first="edited torch", second="onnx", measures=dict(compared or {})),),
                cases=cases,
            ),
        )
    )
