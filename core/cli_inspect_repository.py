"""What ``excise inspect`` says of a Triton repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def inspect_repository(path: Path) -> tuple[dict[str, Any], str, bool]:
    """A document, text for people, and whether a repository is sound, as ``excise serve check`` sees it.

    Raises:
        ArtefactError: This is no repository of excise, or its record is damaged.
    """
    from excise.serve.repository_check import check
    from excise.serve.repository_record import read_record
    from excise.serve.repository_text import record_lines

    found, record = check(path), read_record(path)
    lines = [f"{path}: a Triton repository", *record_lines(record)]
    lines += [f"  problem   {problem}" for problem in found.problems] or ["  every file matches its SHA-256"]
    lines += [f"  note      {note}" for note in found.notes]
    report: dict[str, Any] = {
        "kind": "triton-repository",
        "path": str(path),
        "sound": not found.problems,
        **found.to_json(),
        "repository": record.model_dump(mode="json"),
    }
    return report, "\n".join(lines), not found.problems
