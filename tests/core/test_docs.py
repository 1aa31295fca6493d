"""The written command-line reference is what ``--help`` says."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def test_the_reference_is_current() -> None:
    path = Path(__file__).parent.parent.parent / "docs" / "write_cli.py"
    spec = importlib.util.spec_from_file_location("write_cli", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text() == module.page(), "run make docs"
