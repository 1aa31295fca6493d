"""Exported folders whose edits act on the text: a bank of them, or one behind the text encoder.

Like a patch, each writes one ONNX file and the manifest; every other file is a hard link. Their manifests map no
weights: a patch would edit the weights beneath the edit of the text, and is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from excise.editfile import Edit
from excise.enginefile import ENGINE
from excise.errors import ArtefactError, FingerprintMismatch, UsageError
from excise.export.bank import BankDescription, add_bank
from excise.export.behind_text_encoder import fuse_behind_text_encoder
from excise.export.layout import MODEL
from excise.export.patch import fill, named_as
from excise.manifest import NAME, EditEntry, Manifest, read_manifest, write_manifest
from excise.output import check_free, new_folder

BANK_KIND = "onnx-bank"
FUSED_KIND = "onnx-fused"

Say = Callable[[str], None]


def bank_folder(
    folder: Path,
    out: Path,
    edits: Sequence[Edit],
    *,
    with_base: bool = False,
    link: bool = True,
    progress: Say | None = None,
) -> tuple[Manifest, BankDescription]:
    """Write ``folder`` to the new folder ``out`` with a bank of edits in its denoiser; see ``add_bank``.

    Raises:
        ArtefactError: ``folder`` has no manifest, or its denoiser can't hold a bank.
        UsageError, EditError, NumericsError, OutputError: as ``add_bank``.
    """
    if not edits:
        raise UsageError("a bank of no edits: give one or more")
    say = progress or (lambda message: None)
    check_free(out)
    manifest = _manifest(folder)
    file = f"{edits[0].metadata.component}/{MODEL}"
    with new_folder(out) as partial, named_as(folder, partial):
        _fill(folder, partial, file, link, say)
        changed = partial / f"{file}.bank"
        told = lambda message: say(message.replace(str(partial), str(out)))  # noqa: E731
        try:
            description = add_bank(partial / file, changed, edits, with_base=with_base, progress=told)
        except FingerprintMismatch as mismatch:
            raise _mismatch(folder, manifest, mismatch) from mismatch
        os.replace(changed, partial / file)
        rows = [None, *edits] if with_base else edits
        bank = [EditEntry.of(e) if e else None for e in rows]
        return _finish(partial, manifest, file, BANK_KIND, manifest.edit, say, bank), description


def fused_folder(folder: Path, out: Path, edit: Edit, *, link: bool = True, progress: Say | None = None) -> Manifest:
    """Write ``folder`` to the new folder ``out`` with ``edit`` behind its text encoder: the UNet's files stay shared.

    Raises:
        ArtefactError: ``folder`` has no manifest, or carries an edit.
        EditError, NumericsError, OutputError: as ``fuse_behind_text_encoder``.
    """
    say = progress or (lambda message: None)
    check_free(out)
    manifest = _manifest(folder)
    if manifest.edit is not None:
        raise ArtefactError(f"{folder} carries edit {manifest.edit.id[:12]} already: start from the unedited export")
    file = f"text_encoder/{MODEL}"
    with new_folder(out) as partial, named_as(folder, partial):
        _fill(folder, partial, file, link, say)
        say(f"writing {file}")
        changed = partial / f"{file}.fused"
        try:
            fuse_behind_text_encoder(partial / file, changed, edit)
        except FingerprintMismatch as mismatch:
            raise _mismatch(folder, manifest, mismatch) from mismatch
        os.replace(changed, partial / file)
        entry = EditEntry.of(edit)
        return _finish(partial, manifest, file, FUSED_KIND, entry, say)


def _fill(folder: Path, partial: Path, file: str, link: bool, say: Say) -> None:
    """Bring everything along but the engine of the model that changes: it has the old one in it."""
    engine = f"{PurePosixPath(file).parent}/{ENGINE}"
    if (folder / engine).exists():
        say(f"leaving {engine} out: it was built of the model as it was; run excise engines on the new folder")
    fill(folder, partial, link=link, leave=(engine, f"{engine}.json"))


def _mismatch(folder: Path, manifest: Manifest, mismatch: FingerprintMismatch) -> FingerprintMismatch:
    """Why the edits don't fit, with what can be done about it here, where there is no --force."""
    reason = str(mismatch).partition(": make an edit")[0]
    if manifest.edit is not None:
        return FingerprintMismatch(
            f"{folder} carries edit {manifest.edit.id[:12]}, and {reason}: start from the unedited export"
        )
    return FingerprintMismatch(f"{reason}: make an edit for this one, or name the export of the edit's model")


def _manifest(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    if manifest.kind in (BANK_KIND, FUSED_KIND):
        raise ArtefactError(f"{folder} has edits of the text already ({manifest.kind}): start from the plain export")
    return manifest


def _finish(
    folder: Path,
    manifest: Manifest,
    changed: str,
    kind: str,
    edit: EditEntry | None,
    say: Say,
    bank: Sequence[EditEntry | None] = (),
) -> Manifest:
    """Write the manifest anew, never through the link to the old one; only ``changed`` is hashed."""
    (folder / NAME).unlink()
    known = {path: entry for path, entry in manifest.files.items() if path != changed}
    if manifest.base_weights is not None:
        (folder / manifest.base_weights).unlink()
        known.pop(manifest.base_weights)
    say("hashing")
    return write_manifest(
        folder, kind=kind, base=manifest.base, edit=edit, bank=bank, tools=manifest.tools, known=known
    )
