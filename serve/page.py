"""The embedded server's page for people: one HTML document, with its script and style inside."""

from __future__ import annotations

from pathlib import Path


def page() -> str:
    """The document for ``create_app``'s ``page``."""
    return Path(__file__).with_name("page.html").read_text(encoding="utf-8")
