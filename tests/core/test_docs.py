"""The written command-line reference is what ``--help`` says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parent.parent.parent / "docs"


def test_the_reference_is_current() -> None:
    """In a process of its own: click keeps a command's help option as the first context in a process made it."""
    script = f"import runpy, sys; sys.stdout.write(runpy.run_path({str(DOCS / 'write_cli.py')!r})['page']())"
    page = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, encoding="utf-8").stdout
    assert (DOCS / "cli.md").read_text(encoding="utf-8") == page, "run make docs"
