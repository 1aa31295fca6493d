"""Names by which requests choose edits: those that the operator gives, otherwise what the edit erases, as a slug."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from excise.errors import UsageError
from excise.manifest import EditEntry, Manifest

BASE = "base"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ERASED = re.compile(r"""(?:'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)") →""")
_LENGTH = 40


def edit_names(manifest: Manifest, given: Mapping[str, str] | None = None) -> dict[str, str | None]:
    """Ids by name of the edits that an artefact holds, in the order of its bank.

    The base is ``base``, with id None, and comes last: the first is what a request gets that names none.

    Args:
        manifest: The artefact's.
        given: Names of the operator's choice, each with the beginning of an edit's id.

    Raises:
        UsageError: A given name can't be used, or its id is no edit's here, or that of several.
    """
    edits: Sequence[EditEntry | None] = manifest.bank or (manifest.edit,)
    chosen: dict[str, str] = {}
    for name, prefix in (given or {}).items():
        if not _NAME.fullmatch(name) or name == BASE:
            raise UsageError(f"edit name {name!r}: give letters, digits, '.', '_' and '-', and not {BASE!r}")
        found = [edit.id for edit in edits if edit is not None and prefix and edit.id.startswith(prefix)]
        if len(found) != 1 or found[0] in chosen:
            held = ", ".join(edit.id[:12] for edit in edits if edit is not None) or "none"
            raise UsageError(f"edit name {name}={prefix}: give the beginning of one edit's id, once (here: {held})")
        chosen[found[0]] = name
    names: dict[str, str | None] = {}
    for edit in sorted(edits, key=lambda one: one is None):
        name = BASE if edit is None else chosen.get(edit.id) or _slug(edit)
        if name in names or (edit is not None and edit.id not in chosen and name in (*chosen.values(), BASE)):
            name = f"{name}-{edit.id[:8]}" if edit is not None else name
        names[name] = edit.id if edit is not None else None
    return names


def erased(manifest: Manifest) -> tuple[str, ...]:
    """What the edits of an artefact erase, as far as they name it."""
    edits = manifest.bank or (manifest.edit,)
    return tuple(dict.fromkeys(text for edit in edits if edit is not None for text in _erased(edit)))


def _erased(edit: EditEntry) -> list[str]:
    return [*edit.concepts] or ["".join(pair) for pair in _ERASED.findall(edit.summary)]


def _slug(edit: EditEntry) -> str:
    """What an edit erases, such as ``gun-knife``, from its summary; its id where that says nothing."""
    texts: list[str] = []
    for text in _erased(edit):  # "a picture of a gun" says nothing beside "gun"
        if not any(set(one.split()) <= set(text.split()) for one in texts):
            texts.append(text)
    words = re.sub(r"[^a-z0-9]+", "-", "-".join(texts).lower()).strip("-")
    return words[:_LENGTH].strip("-") or edit.id[:12]
