"""The output filters of runtimes by name: ``filter=nudenet``, ``filter=safety-checker:DIR``."""

from __future__ import annotations

from pathlib import Path

from excise.serve.output_filter import NudeNetFilter, OutputFilter

_CHECKER = "safety-checker:"


def check_output_filter(name: str | None) -> None:
    """Look for what can be missing. Raises ``ModelError`` for a folder without a safety checker; None needs nothing."""
    if name is not None and name.startswith(_CHECKER):
        from excise.eval.safety_checker import check_safety_checker

        check_safety_checker(Path(name.removeprefix(_CHECKER)))


def open_output_filter(name: str) -> OutputFilter:
    """The filter, loaded.

    Raises:
        ModelError: the folder holds no safety checker, or none that can be read.
        MissingExtra: nudenet isn't installed.
    """
    if name.startswith(_CHECKER):
        from excise.eval.safety_checker import SafetyChecker

        return SafetyChecker(Path(name.removeprefix(_CHECKER)))
    return NudeNetFilter()
