"""What ``excise inspect`` says of a path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from excise.editfile import load_edit
from excise.enginefile import ENGINE, check_engine
from excise.errors import UsageError
from excise.manifest import read_manifest, verify


def inspect_path(path: Path) -> tuple[dict[str, Any], str, bool]:
    """A document, text for people, and whether what was found is sound.

    Raises:
        UsageError: ``path`` doesn't exist.
        EditError, ArtefactError: unreadable.
    """
    if path.is_file():
        edit = load_edit(path)
        metadata = edit.metadata
        lines = [f"{path}: an edit", f"  id        {edit.id}", f"  {edit.summary}"]
        lines += [f"  erase     {concept.erase!r} → {concept.to!r}" for concept in metadata.concepts]
        lines += [f"  on        {before}" for before in metadata.on]
        lines += [f"  part      {part}: {inner.method}" for part, inner in metadata.parts]
        lines += [
            f"  {stage.stream} {stage.stage}: margin {_number(stage.margin)}, kept moved {stage.moved:.2e}"
            + ("" if stage.detected is None else f", detected {stage.detected:.0%}")
            + ("" if stage.detected_after is None else f" → {stage.detected_after:.0%}")
            + ("" if stage.accepted else " (left out)")
            for stage in metadata.stages
        ]
        lines += [f"  {name:<24} {value}" for name, value in {**metadata.recipe, **(metadata.source or {})}.items()]
        document = {"kind": "edit", "path": str(path), "id": edit.id, "metadata": metadata.model_dump(mode="json")}
        return document, "\n".join(lines), True
    if not path.is_dir():
        raise UsageError(f"{path} doesn't exist: name an edit file, an exported folder or a Triton repository")
    manifest = read_manifest(path)
    problems = verify(path)
    for engine in sorted(path.glob(f"*/{ENGINE}")):
        problems += check_engine(engine)
    lines = [f"{path}: {manifest.kind}, {len(manifest.files)} files"]
    lines += (
        [f"  edit      {manifest.edit.id}", f"  {manifest.edit.summary}"] if manifest.edit else ["  edit      none"]
    )
    for index, row in enumerate(manifest.bank):
        lines.append(f"  edit {index:<4} {row.id}\n  {row.summary}" if row else f"  edit {index:<4} the base")
    lines += [f"  problem   {problem}" for problem in problems] or ["  every file matches its SHA-256"]
    report: dict[str, Any] = {
        "kind": "artefact",
        "path": str(path),
        "sound": not problems,
        "problems": [str(problem) for problem in problems],
        "manifest": manifest.model_dump(mode="json"),
    }
    return report, "\n".join(lines), not problems


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"
