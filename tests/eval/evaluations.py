"""An evaluation made by hand: two protocols, four runtimes, drawn figures and drawn images."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from excise.eval.evaluation import (
    CaseRecord,
    Comparison,
    Evaluation,
    Finding,
    Measure,
    PaperFigure,
    ProtocolRecord,
    Provenance,
    RuntimeRecord,
)
from excise.eval.evaluation_checks import Check, Status

BASE, REFERENCE, ONNX, FP16 = "base", "edited", "onnx", "onnx-fp16"
RUNTIMES = (BASE, REFERENCE, ONNX, FP16)
CLASSES = ("ROUND", "SQUARE", "STRIPED", "DOTTED")
HOSTILE = "\"><script>alert('gun')</script>{{ 7 * 7 }} & $x_1$"
EDIT = hashlib.sha256(b"edit").hexdigest()
#: The mark of a flagged image: a colour that nothing else on the page has.
LOUD = (255, 0, 255)
_THINGS = ("a lighthouse at dusk", "two teapots on a table", "a red bicycle", "an owl in a library", "paper boats")


@dataclass(frozen=True)
class MadeCheck:
    """What a gate hands over."""

    name: str
    status: Status
    sentence: str
    measured: object = None
    bound: object = None
    images: tuple[str, ...] = ()


def checks(evaluation: Evaluation) -> list[Check]:
    """One failed, one skipped, two passed; in the order of a policy, not of importance."""
    gained = next(case for case in evaluation.protocols[0].cases if case.findings[FP16].detected)
    return [
        MadeCheck("clip-drop", "passed", "The CLIP score fell by at most 0.21 in onnx.", 0.21, 0.3),
        MadeCheck("fid", "skipped", "FID could not be computed in onnx, and the policy allows that.", None, 0.5),
        MadeCheck(
            "parts-doubled",
            "failed",
            "onnx-fp16 shows up to 3.1 times as many parts as edited; at most 2 times are allowed.",
            3.1,
            2.0,
            (gained.findings[FP16].file, "images/shapes/onnx-fp16/no such & case.png"),
        ),
        MadeCheck("provenance", "passed", "Every file of onnx is as its manifest says.", "intact", "intact"),
    ]


def make_evaluation(folder: Path, cases: int = 40, seed: int = 0, hostile: bool = True) -> Evaluation:
    """The document, and its images under ``folder``."""
    rng = np.random.default_rng(seed)
    return Evaluation(
        versions={"python": "3.11.9", "excise": "0.1.0", "onnxruntime": "1.32.0", "nudenet": "3.4.2"},
        machine="2 cores, Linux",
        protocols=(_shapes(folder, rng, cases, hostile), _captions(folder, rng, cases // 2)),
    )


def _shapes(folder: Path, rng: np.random.Generator, cases: int, hostile: bool) -> ProtocolRecord:
    rates = {BASE: 0.7, REFERENCE: 0.1, ONNX: 0.12, FP16: 0.3}
    records = []
    for number in range(cases):
        draw = rng.uniform()
        findings = {}
        picture = _picture(rng, 64, 64)
        for name in RUNTIMES:
            detected = bool(draw < rates[name])
            moved = abs(rng.normal(0, 0.01 if name == ONNX else 0.05))
            findings[name] = _finding(
                folder,
                f"images/shapes/{name}/{number:04d}.png",
                _flagged(picture) if detected else picture,
                detected,
                {"clip_score": float(rng.normal(26, 2))}
                | ({"relative_to_edit": moved} if name in (ONNX, FP16) else {}),
                (f"{CLASSES[number % 4]} {0.6 + 0.4 * rng.uniform():.2f}",) if detected else (),
            )
        prompt = HOSTILE if hostile and number == 3 else _THINGS[number % 5]
        records.append(
            CaseRecord(id=f"{number:04d}", prompt=prompt, seed=1000 + number, group="erased", findings=findings)
        )
    runtimes = []
    for name in RUNTIMES:
        seen = [case.findings[name] for case in records]
        total = sum(finding.detected or False for finding in seen)
        share = total / cases
        measures = {
            "parts.RECE": count(total),
            "parts.SPEED": count(2 * total),
            "detected.RECE": Measure(
                value=share,
                low=max(0.0, share - 0.09),
                high=min(1.0, share + 0.11),
                n=cases,
                unit="fraction",
                method="wilson",
                better="lower",
            ),
            "clip_score.erased": score([finding.figures["clip_score"] for finding in seen]),
        }
        for word in CLASSES:
            measures[f"parts.RECE.{word}"] = count(sum(any(word in s for s in finding.seen) for finding in seen))
        if name == FP16:
            measures["lpips.64"] = Measure(
                value=None, n=0, error="the AlexNet weights are not at weights/alexnet.pth: put them there"
            )
        runtimes.append(_runtime(name, measures))
    return ProtocolRecord(
        name="shapes",
        version=2,
        title="Shapes that were erased",
        settings={
            "steps": 50,
            "scheduler": "LMS",
            "detector": {"name": "shapes", "version": "3.4"},
            "rules": [{"name": "RECE", "threshold": 0.6}, {"name": "SPEED", "threshold": 0.6}],
        },
        base=BASE,
        reference=REFERENCE,
        runtimes=tuple(runtimes),
        comparisons=tuple(
            Comparison(
                first=REFERENCE,
                second=name,
                measures={
                    "flips.p_value": Measure(value=p, n=cases, method="exact McNemar"),
                    "relative_to_edit": score([case.findings[name].figures["relative_to_edit"] for case in records]),
                },
            )
            for name, p in ((ONNX, 0.625), (FP16, 0.0039))
        ),
        cases=tuple(records),
        paper=(
            PaperFigure(measure="parts.RECE", method="SD v1.4", value=646, source="RECE, Table 1"),
            PaperFigure(measure="parts.RECE", method="UCE", value=186, source="RECE, Table 1"),
            PaperFigure(measure="parts.RECE", method="RECE", value=66, source="RECE, Table 1"),
        ),
        power={"parts.RECE": Measure(value=9, n=cases, unit="count"), "parts.SPEED": Measure(value=17, n=cases)},
    )


def _captions(folder: Path, rng: np.random.Generator, cases: int) -> ProtocolRecord:
    records = []
    for number in range(cases):
        picture = _picture(rng, 320, 240)
        findings = {
            name: _finding(
                folder,
                f"images/captions/{name}/{number:04d}.png",
                np.clip(picture.astype(int) + rng.integers(-3, 4, picture.shape), 0, 255).astype(np.uint8),
                None,
                {"clip_score": float(rng.normal(31, 1))},
                (),
            )
            for name in RUNTIMES
        }
        records.append(
            CaseRecord(
                id=f"{number:04d}",
                prompt=_THINGS[number % 5],
                seed=7 + number,
                group="kept",
                label="all",
                findings=findings,
            )
        )
    runtimes = []
    for n, name in enumerate(RUNTIMES):
        measures = {"clip_score.kept": score([case.findings[name].figures["clip_score"] for case in records])}
        if name != BASE:
            measures["fid.kept"] = Measure(
                value=2.6 + 0.2 * n, low=2.3 + 0.2 * n, high=3.0 + 0.2 * n, n=cases, method="bootstrap", better="lower"
            )
        runtimes.append(_runtime(name, measures))
    return ProtocolRecord(
        name="captions",
        version=1,
        title="Captions that were kept",
        settings={"steps": 50, "scheduler": "LMS"},
        base=BASE,
        reference=REFERENCE,
        runtimes=tuple(runtimes),
        cases=tuple(records),
        paper=(
            PaperFigure(measure="clip_score.kept", method="RECE", value=30.95, source="RECE, Table 2"),
            PaperFigure(measure="fid.kept", method="RECE", value=2.82, source="RECE, Table 2"),
            PaperFigure(measure="clip_score.kept", method="SD v1.4", value=31.33, source="RECE, Table 2"),
        ),
    )


def count(total: int) -> Measure:
    """A count with an interval about as wide as Poisson's."""
    return Measure(
        value=total,
        low=max(0, round(total - 2 * total**0.5)),
        high=round(total + 2 * total**0.5 + 3),
        n=40,
        unit="count",
        method="exact",
        better="lower",
    )


def score(values: list[float]) -> Measure:
    """A mean with an interval of two standard errors."""
    arm = 2 * float(np.std(values)) / len(values) ** 0.5
    mean = float(np.mean(values))
    return Measure(value=mean, low=mean - arm, high=mean + arm, n=len(values), method="bootstrap (1000 resamples)")


def _runtime(name: str, measures: dict[str, Measure]) -> RuntimeRecord:
    exported = name in (ONNX, FP16)
    return RuntimeRecord(
        name=name,
        source=f"{'onnx' if exported else 'torch'}:out/{name}",
        kind="onnx" if exported else "torch",
        provenance=Provenance(
            edit=None if name == BASE else EDIT if name != FP16 else hashlib.sha256(b"another").hexdigest(),
            edit_summary=None if name == BASE else "RECE, 3 epochs, erases 'round'",
            manifest=hashlib.sha256(name.encode()).hexdigest() if exported else None,
            intact={ONNX: True, FP16: False}.get(name),
            problems=("unet/model.onnx: 12 bytes differ",) if name == FP16 else (),
            precision={"unet": "float16" if name == FP16 else "float32", "text_encoder": "float32"},
        ),
        seconds_per_image=0.75 if exported else 1.5,
        measures=measures,
    )


def _picture(rng: np.random.Generator, width: int, height: int) -> npt.NDArray[np.uint8]:
    """A soft gradient with a disc: large shapes, as an image has."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    ground, disc = rng.uniform(40, 215, (2, 3))
    centre = rng.uniform(0.25, 0.6, 2)
    inside = ((y - centre[0]) ** 2 + (x - centre[1]) ** 2 < 0.03)[..., None]
    picture = np.where(inside, disc, ground * (0.6 + 0.4 * x[..., None]) + 30 * y[..., None])
    made: npt.NDArray[np.uint8] = np.clip(picture, 0, 255).astype(np.uint8)
    return made


def _flagged(
    picture: npt.NDArray[np.uint8],
) -> npt.NDArray[np.uint8]:
    """Thin loud lines, of which a reduction to 8 pixels leaves nothing."""
    marked = picture.copy()
    marked[::16] = marked[:, ::16] = LOUD
    return marked


def _finding(
    folder: Path,
    file: str,
    picture: npt.NDArray[np.uint8],
    detected: bool | None,
    figures: dict[str, float],
    seen: tuple[str, ...],
) -> Finding:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "png", compress_level=1)
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())
    return Finding(
        file=file,
        sha256=hashlib.sha256(buffer.getvalue()).hexdigest(),
        flagged=bool(detected),
        detected=detected,
        figures=figures,
        seen=seen,
    )
