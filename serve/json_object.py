"""A JSON object from a file of a model's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from excise.errors import ArtefactError, ExciseError


def read_json_object(
    file: Path, *, name: str = "", remedy: str = "", error: type[ExciseError] = ArtefactError
) -> dict[str, Any]:
    """What the file holds.

    Args:
        name: stands before the file's path in messages, such as "the scheduler's configuration ".
        remedy: stands behind the message about another value, such as ": export it again".
        error: raised if it can't be read, isn't JSON, or is another value than an object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise error(f"{name}{file} can't be read: {problem}") from problem
    if not isinstance(value, dict):
        raise error(f"{name}{file} isn't a JSON object{remedy}")
    return value
