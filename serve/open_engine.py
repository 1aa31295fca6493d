"""An exported folder, opened to be served: which edits requests may choose, by which names, and what makes them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from excise.editfile import Edit, load_edit
from excise.errors import ArtefactError, UsageError
from excise.manifest import NAME, EditEntry, Manifest, hash_file, read_manifest, verify
from excise.serve.batch_engine import BatchEngine
from excise.serve.edit_names import edit_names, erased
from excise.serve.engine import Served, ServedEdit
from excise.serve.onnx_component import Provider
from excise.serve.onnx_runtime import OnnxRuntime


def open_engine(
    folder: Path,
    *,
    edits: Sequence[Path] = (),
    model: str | None = None,
    names: Mapping[str, str] | None = None,
    default: str | None = None,
    with_base: bool = False,
    verify_files: bool = True,
    provider: Provider = "cpu",
    threads: int | None = None,
    device: int = 0,
    tf32: bool = False,
    engine_cache: Path | None = None,
    max_batch: int = 8,
    max_waiting: int = 64,
    batch_delay: float = 0.0,
) -> BatchEngine:
    """An engine on one exported folder.

    Args:
        folder: has a manifest, and a bank of edits, one edit, or with ``with_base`` none.
        edits: an edit file whose edit takes the place of the folder's, in memory alone; one at most.
        model: what clients call the model; the folder's name, as a slug, where None.
        names: what clients call the edits: each with the beginning of an edit's id. The others get what they erase.
        default: the name of the edit for requests that name none; the first one where None.
        with_base: serve the unedited model, too, under the name ``base``.
        verify_files: compare every file with the manifest first.
        provider, threads, device, tf32, engine_cache: of ``OnnxRuntime``.
        max_batch, max_waiting, batch_delay: of ``BatchEngine``.

    Raises:
        ArtefactError: the folder isn't whole, isn't as its manifest says, or can't be loaded.
        EditError: the edit file can't be read, or is of another model.
        ModelError: the model isn't supported.
        UsageError: an option can't be used, or there is nothing but the base to serve and it isn't to be.
    """
    folder = Path(folder)
    if len(edits) > 1:
        files = " ".join(f"--edit {file}" for file in edits)
        raise UsageError(
            f"{len(edits)} edits would be so many models in memory: put them into one, excise bank {folder} {files} "
            "--out BANK, and serve that"
        )
    manifest = read_manifest(folder)
    edit = load_edit(edits[0]) if edits else None
    described = _described(manifest, edit)
    chosen = _choices(folder, described, names, default, with_base)
    if verify_files and (problems := verify(folder)):
        raise ArtefactError(f"{folder} isn't as its manifest says ({len(problems)}): {problems[0]}; export it again")
    runtime = OnnxRuntime(
        folder,
        provider=provider,
        threads=threads,
        batch_size=max_batch,
        edit=edit,
        device=device,
        tf32=tf32,
        engine_cache=engine_cache,
    )
    _check_ids(folder, runtime, chosen)
    served = Served(
        model=model or _slug(folder.absolute().name),
        edits=tuple(chosen),
        image_shape=runtime.image_shape,
        max_prompt_tokens=runtime.tokenizer.max_length,
        manifest=hash_file(folder / NAME),
        concepts={one.name: _concepts(described, one.id) for one in chosen},
    )
    taken: dict[str | None, OnnxRuntime] = {one.id: runtime for one in chosen}
    if runtime.bank is None:
        taken[None] = runtime  # the model as it is loaded, whatever it carries
    return BatchEngine(taken, served, max_batch=max_batch, max_waiting=max_waiting, batch_delay=batch_delay)


def _described(manifest: Manifest, edit: Edit | None) -> Manifest:
    """The manifest as it would be with the edit that is loaded in place of the folder's."""
    if edit is None or manifest.bank:  # a bank refuses it when it is opened
        return manifest
    return manifest.model_copy(update={"edit": EditEntry.of(edit)})


def _choices(
    folder: Path, manifest: Manifest, names: Mapping[str, str] | None, default: str | None, with_base: bool
) -> list[ServedEdit]:
    """What requests may choose, the default first and the base last. Raises ``UsageError`` if that is nothing."""
    summaries = {entry.id: entry.summary for entry in (*manifest.bank, manifest.edit) if entry is not None}
    offered = [
        ServedEdit(name, identity, summaries[identity] if identity is not None else "the unedited model")
        for name, identity in edit_names(manifest, names).items()
        if identity is not None or with_base
    ]
    if not offered:
        raise UsageError(
            f"{folder} carries no edit: put one into it with excise patch, or give --with-base to serve the unedited "
            "model"
        )
    if default is not None and default not in (one.name for one in offered):
        raise UsageError(f"default edit {default!r}: choose one of {', '.join(one.name for one in offered)}")
    return sorted(offered, key=lambda one: (one.name != default, one.id is None))


def _concepts(manifest: Manifest, identity: str | None) -> tuple[str, ...]:
    """What an edit erases; of folders whose manifests don't note it, as far as its summary names it."""
    for entry in (*manifest.bank, manifest.edit):
        if entry is not None and entry.id == identity:
            return entry.concepts or erased(manifest.model_copy(update={"bank": (), "edit": entry}))
    return ()


def _check_ids(folder: Path, runtime: OnnxRuntime, chosen: Sequence[ServedEdit]) -> None:
    """Raise ``ArtefactError`` unless the model holds what its manifest says: clients are told that."""
    held = runtime.bank if runtime.bank is not None else (runtime.edit_id,)
    for one in chosen:
        if one.id not in held:
            what = f"edit {one.id[:12]}" if one.id is not None else "the base"
            raise ArtefactError(f"{folder} says that it holds {what}, and its model doesn't: export it again")


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9._]+", "-", name.lower()).strip("-._") or "model"
