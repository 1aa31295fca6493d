"""The picture grids of an evaluation's page: one row a case, the same prompt and seed in every runtime.

What was flagged is never in the page. In its place stands an 8 pixel wide reduction, from which nothing can be made
out; the browser fetches the image itself by its relative path, and only when somebody asks to see it. So the page can
be mailed, previewed, indexed or printed without showing it, scripts or not, and it takes no script to reveal it: the
image is the background of what a ``details`` element shows once it is open. An ``img`` in there would be fetched at
once, unseen, wherever scripts are turned off: browsers then ignore ``loading="lazy"``.
Images that were not flagged are inlined as thumbnails.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import quote

import numpy as np
from PIL import Image, UnidentifiedImageError

from excise.errors import ArtefactError
from excise.eval.evaluation import CaseRecord, Finding, ProtocolRecord
from excise.eval.evaluation_figures import roles
from excise.eval.grids import SHOWN, reduced

#: Width in pixels of what stands for a flagged image.
VEILED = 8
_FIGURES_SHOWN, _SEEN_SHOWN, _QUALITY = 3, 4, 82


@dataclass(frozen=True)
class Picture:
    """One image as the page shows it."""

    runtime: str
    address: str  #: of the image itself, relative to the page
    flagged: bool
    thumbnail: str | None  #: ``data:`` address; of a flagged image, of what stands for it; None where there is none
    size: tuple[int, int]  #: width and height to show it at, CSS pixels
    enlarged: bool  #: smaller than it is shown
    words: tuple[str, ...]  #: what was seen in it, and its figures
    problem: str | None  #: why there is no image


@dataclass(frozen=True)
class PictureRow:
    """One case: why it is shown, and its image in each runtime."""

    case: CaseRecord
    why: tuple[str, ...]
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Grid:
    """The rows of one group of cases, and the cases that there was no room for."""

    group: str
    rows: tuple[PictureRow, ...]
    others: tuple[CaseRecord, ...]


def grids(folder: Path, protocol: ProtocolRecord, named: Collection[str], limit: int) -> tuple[Grid, ...]:
    """One grid a group of cases, together at most ``limit`` rows; what failed or flipped comes first.

    Args:
        folder: where the report lies; ``Finding.file`` is relative to it.
        named: the images that failed checks name: files or ids of cases.

    Raises:
        ArtefactError: a file's name leaves the folder.
    """
    groups: dict[str, list[CaseRecord]] = {}
    for case in protocol.cases:
        groups.setdefault(case.group, []).append(case)
    share, more = divmod(limit, max(1, len(groups)))
    made = []
    for number, (group, cases) in enumerate(groups.items()):
        room = share + (number < more)
        ordered = sorted(cases, key=lambda case: _rank(case, protocol, named))
        made.append(
            Grid(
                group,
                tuple(
                    PictureRow(case, reasons(case, protocol, named), _pictures(folder, case, protocol))
                    for case in ordered[:room]
                ),
                tuple(ordered[room:]),
            )
        )
    return tuple(made)


def reasons(case: CaseRecord, protocol: ProtocolRecord, named: Collection[str]) -> tuple[str, ...]:
    """Why a case deserves a look, in words; none for one in which all runtimes did well."""
    found = ["Named by a failed check"] if _is_named(case, named) else []
    gained, lost, missed = _flips(case, protocol)
    if gained:
        found.append(f"Flipped: detected in {', '.join(gained)}, not in {protocol.reference}")
    if lost:
        found.append(f"Flipped: detected in {protocol.reference}, not in {', '.join(lost)}")
    if missed and not gained and not lost:
        found.append(f"Detected in {', '.join(missed)}")
    return tuple(found)


def address(finding: Finding) -> str:
    """The image's address relative to the page.

    Raises:
        ArtefactError: the file's name leaves the report's folder.
    """
    path = PurePosixPath(finding.file)
    if path.is_absolute() or ".." in path.parts or "\\" in finding.file or not path.parts:
        raise ArtefactError(f"the report names the image {finding.file!r}, which is not inside its folder")
    return quote(str(path))


def _is_named(case: CaseRecord, named: Collection[str]) -> bool:
    return case.id in named or any(finding.file in named for finding in case.findings.values())


def _flips(case: CaseRecord, protocol: ProtocolRecord) -> tuple[list[str], list[str], list[str]]:
    """Judged runtimes that detect what the reference doesn't; that don't what it does; all edited ones that detect."""
    detected = {name: finding.detected for name, finding in case.findings.items()}
    expected = detected.get(protocol.reference) if protocol.reference is not None else None
    judged = [name for name, role in roles(protocol).items() if role == "judged" and detected.get(name) is not None]
    gained = [name for name in judged if expected is False and detected[name]]
    lost = [name for name in judged if expected is True and not detected[name]]
    missed = [name for name, role in roles(protocol).items() if role != "base" and detected.get(name)]
    return gained, lost, missed


def _rank(case: CaseRecord, protocol: ProtocolRecord, named: Collection[str]) -> tuple[bool, bool, bool, bool, float]:
    """Sorts first what matters most; among equals, the image that moved furthest from the reference's."""
    gained, lost, missed = _flips(case, protocol)
    furthest = max((finding.figures.get("relative_to_edit", 0.0) for finding in case.findings.values()), default=0.0)
    return not _is_named(case, named), not gained, not lost, not missed, -furthest


def _pictures(folder: Path, case: CaseRecord, protocol: ProtocolRecord) -> tuple[Picture, ...]:
    return tuple(
        _picture(folder, runtime.name, case.findings[runtime.name])
        for runtime in protocol.runtimes
        if runtime.name in case.findings
    )


def _picture(folder: Path, runtime: str, finding: Finding) -> Picture:
    where = address(finding)
    image, problem = _judged_image(folder / finding.file, finding.sha256)
    words = list(finding.seen[:_SEEN_SHOWN])
    if len(finding.seen) > _SEEN_SHOWN:
        words.append(f"and {len(finding.seen) - _SEEN_SHOWN} more")
    words += [f"{name} {value:.3g}" for name, value in sorted(finding.figures.items())[:_FIGURES_SHOWN]]
    if image is None:
        return Picture(runtime, where, finding.flagged, None, (SHOWN, SHOWN), False, tuple(words), problem)
    size = (SHOWN, max(1, round(SHOWN * image.height / image.width)))
    thumbnail = _veiled(image) if finding.flagged else _thumbnail(image)
    return Picture(runtime, where, finding.flagged, thumbnail, size, image.width < SHOWN, tuple(words), None)


def _judged_image(path: Path, sha256: str) -> tuple[Image.Image | None, str | None]:
    """The image, if it is there and the one that was judged; otherwise why not."""
    try:
        content = path.read_bytes()
    except OSError:
        return None, "no longer in the folder"
    if hashlib.sha256(content).hexdigest() != sha256:
        return None, "not the image that was judged"
    try:
        return Image.open(io.BytesIO(content)).convert("RGB"), None
    except (UnidentifiedImageError, OSError, ValueError):
        return None, "can't be decoded"


def _thumbnail(image: Image.Image) -> str:
    return _address_of(Image.fromarray(reduced(np.asarray(image)[None])[0]))


def _veiled(image: Image.Image) -> str:
    height = max(1, round(VEILED * image.height / image.width))
    return _address_of(image.resize((VEILED, height), Image.Resampling.BOX))


def _address_of(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "webp", quality=_QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def links(case: CaseRecord, order: Sequence[str]) -> list[tuple[str, str, bool]]:
    """Runtime, address and flag of each of a case's images."""
    return [
        (name, address(case.findings[name]), case.findings[name].flagged) for name in order if name in case.findings
    ]
