"""Where a model lay on the machine that saved it is nobody's business."""

from __future__ import annotations

import json
from pathlib import Path


def remove_local_paths(folder: Path) -> None:
    """Drop ``_name_or_path`` from every configuration: it would publish where the model lay on this machine."""
    for path in folder.rglob("*.json"):
        document = json.loads(path.read_bytes())
        if isinstance(document, dict) and document.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")
