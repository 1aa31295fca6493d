"""A new edit in an exported model without exporting it again.

A patch writes three files: the initialisers that an edit can move (``unet/edit.onnx_data``), the graph with the edit's
id, and the manifest. The others are hard links. Neither PyTorch nor the onnx package is needed, but the latter once for
a folder that plain Optimum wrote, and once for an edit of weights that aren't in that file: they are put there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from excise.edited_initializers import edited_initializers
from excise.editfile import Edit
from excise.enginefile import ENGINE
from excise.errors import ArtefactError, ExciseError, OutputError
from excise.export.conversion import convert, extend
from excise.export.layout import EDITED, write_aligned
from excise.manifest import NAME, EditEntry, FileEntry, Manifest, WeightEntry, read_manifest, write_manifest
from excise.onnx_metadata import EDIT_ID, write_metadata
from excise.output import hard_linked, new_folder, replaced_folder


def patch(
    folder: Path,
    edit: Edit,
    *,
    out: Path | None = None,
    force: bool = False,
    link: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Manifest:
    """Write ``folder`` with ``edit`` in place of the edit that it carries, if any.

    Every file equals that of a fresh export with the edit on the same machine; parity isn't measured again, so the
    manifest has no parity figures. Once a folder holds more weights where an edit can move them (a trained edit moved
    them), it stays so: a later edit of fewer then gives the values of a fresh export, in other files. Memory doesn't
    grow with the model, but with what its edits move.

    Args:
        folder: What ``excise export`` or a patch wrote, or a plain Optimum export.
        edit: Made for the unedited model.
        out: A new folder; by default ``folder`` itself is replaced, in one step. An engine of the denoiser holds the
            present edit and doesn't come along.
        force: Apply the edit although it was made for other weights.
        link: Share unchanged files by hard links; ONNX Runtime and TensorRT read those, the onnx package from 1.21 on
            refuses them as external data.
        progress: Told each step, one line at a time.

    Returns:
        The new manifest.

    Raises:
        ArtefactError: ``folder`` is incomplete or altered, or its unedited weights weren't kept.
        EditError: The edit is for another component (FingerprintMismatch: it was made for another model).
        NumericsError: An edited weight isn't finite in the model's dtype.
        OutputError: ``out`` holds something, or ``folder`` can't be replaced in one step here or holds an engine.
    """
    say = progress or (lambda message: None)
    if not folder.is_dir():
        raise ArtefactError(f"{folder} isn't a folder: name one that excise export or Optimum wrote")
    engine = f"{edit.metadata.component}/{ENGINE}"
    if out is None and (folder / engine).exists():
        raise OutputError(
            f"{folder / engine} holds the present edit: name a new folder with --out, or use excise refit"
        )
    place: AbstractContextManager[Path] = replaced_folder(folder) if out is None else new_folder(out)
    with place as partial, named_as(folder, partial):
        fill(folder, partial, link=link, leave=(engine, f"{engine}.json"))
        manifest = read_manifest(partial) if (partial / NAME).exists() else convert(partial, folder.name, edit, say)
        if not manifest.weights:
            raise ArtefactError(f"{folder} has no map of its weights in excise.json: export the model again")
        if edit.metadata.component == _component(manifest) and not {*edit.sites} <= {*manifest.weights}:
            manifest = extend(partial, manifest, edit, say, force=force)
        say(f"writing {edit.summary}")
        return _write(partial, manifest, edit, force)


def _write(folder: Path, manifest: Manifest, edit: Edit, force: bool) -> Manifest:
    """Write what differs between two edits, each file anew, never through the link that it replaces."""
    data, models = data_file(manifest), {entry.file for entry in manifest.weights.values()}
    (folder / data).unlink(missing_ok=True)
    weights, written = write_edited(folder, folder / data, manifest, edit, force=force)
    for model in models:
        partial = folder / f"{model}.partial"
        write_metadata(folder / model, partial, {EDIT_ID: edit.id})
        os.replace(partial, folder / model)
    (folder / NAME).unlink(missing_ok=True)
    unchanged = {name: entry for name, entry in manifest.files.items() if name not in models}
    new = write_manifest(
        folder,
        kind=manifest.kind,
        base=manifest.base,
        edit=EditEntry.of(edit),
        weights=weights,
        base_weights=manifest.base_weights,
        tools=manifest.tools,
        known={**unchanged, data: written},
    )
    for name in (data, *models, NAME):
        with (folder / name).open("rb") as stream:
            os.fsync(stream.fileno())
    return new


@contextmanager
def named_as(folder: Path, partial: Path) -> Iterator[None]:
    """Have errors name ``folder``, not the half-finished copy of it that is gone when they are read."""
    try:
        yield
    except ExciseError as error:
        error.args = tuple(str(part).replace(str(partial), str(folder)) for part in error.args)
        raise


def _component(manifest: Manifest) -> str:
    """Folder of the denoiser."""
    return next(iter(manifest.weights.values())).file.partition("/")[0]


def data_file(manifest: Manifest) -> str:
    """The one file that holds every initialiser that a patch writes.

    Raises:
        ArtefactError: They lie in several files, or in the ONNX file itself.
    """
    files = {
        entry.data for entry in manifest.weights.values() if entry.data and PurePosixPath(entry.data).name == EDITED
    }
    if len(files) != 1:
        raise ArtefactError(f"the weights that an edit can move don't lie in one {EDITED}: export the model again")
    return str(files.pop())


def write_edited(
    folder: Path, target: Path, manifest: Manifest, edit: Edit | None, *, force: bool = False
) -> tuple[dict[str, WeightEntry], FileEntry]:
    """Write the edited initialisers to the new file ``target``, each at its offset.

    Returns:
        The weight map with the new hashes, and the file's size and hash.

    Raises:
        ArtefactError, EditError, NumericsError: as ``patch``.
    """
    entries: dict[str, WeightEntry] = {}
    total = hashlib.sha256()
    with target.open("xb") as stream:
        values = edited_initializers(folder, manifest, edit, force=force)
        for name, place, array in tqdm(values, total=len(manifest.weights), desc="patch", leave=False, delay=2):
            before = stream.tell()
            data = array.data.cast("B")
            if write_aligned(stream, data) != place.offset:
                raise ArtefactError(
                    f"{folder} has {place.initializer} at byte {place.offset}, not where a patch puts it"
                )
            total.update(bytes(place.offset - before))
            total.update(data)
            entries[name] = place.model_copy(update={"sha256": hashlib.sha256(data).hexdigest(), "engine_weight": None})
        size = stream.tell()
    return entries, FileEntry(size=size, sha256=total.hexdigest())


def fill(folder: Path, target: Path, *, link: bool, leave: Collection[str] = ()) -> None:
    """Fill the empty folder ``target`` with hard links to the files of ``folder``, or copies where links don't work.

    Everything that lies in the folder comes along, what isn't in its manifest too, but for the files of ``leave``.
    """
    for source in sorted(folder.rglob("*")):
        if source.relative_to(folder).as_posix() in leave:
            continue
        place = target / source.relative_to(folder)
        if source.is_dir() and not source.is_symlink():
            place.mkdir()
            continue
        try:
            if link and hard_linked(source, place):
                continue
        except FileNotFoundError as error:
            raise OutputError(f"{source} vanished while it was copied: try again") from error
        shutil.copy2(source, place, follow_symlinks=False)
