"""Apply an edit to a diffusers folder: only the shards that hold edited weights are written anew.

Other large files are hard-linked where the disk allows it and copied where it doesn't; small ones, which people edit by
hand, are always copied. Pickled weights and stored variants that the edit wasn't applied to are left out: they would
bring the concept back.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from excise.edit.component_files import Float32, read_json, weight_files
from excise.edit.families import family_of
from excise.edit.model_folder import WEIGHTS, denoiser_weights
from excise.editfile import Array, Edit
from excise.errors import FingerprintMismatch, ModelError
from excise.output import check_free, hard_linked, new_folder

#: Key of the edits' ids, in order, in the metadata of an edited shard.
EDITS = "excise_edits"

#: Larger files are linked: a pipeline's configs and tokenizers stay below it.
_LARGE = 16 * 2**20

_PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5")


def carried(folder: Path) -> tuple[str, ...]:
    """Ids of the edits that a model folder's weights carry already, in order."""
    component = folder / family_of(folder).component
    ids: dict[str, None] = {}
    for file in weight_files(component, WEIGHTS):
        with safe_open(file, framework="pt") as opened:
            ids |= dict.fromkeys(json.loads((opened.metadata() or {}).get(EDITS, "[]")))
    return tuple(ids)


def edited_weights(folder: Path, edit: Edit, *, force: bool = False) -> dict[str, torch.Tensor]:
    """The weights that an edit moves, after it, by name and in their stored dtype.

    Raises:
        ModelError: a missing or damaged file.
        FingerprintMismatch: the edit is for another model, or for another stack of edits.
        NumericsError: not finite in the stored dtype.
    """
    family = family_of(folder)
    if edit.metadata.component != family.component:
        raise FingerprintMismatch(
            f"the edit is for a {edit.metadata.family} {edit.metadata.component}, {folder} is a {family.name}"
        )
    stored = denoiser_weights(folder)
    try:
        edited = edit.apply(_arrays(stored, edit.sites), force=force)
    except FingerprintMismatch as mismatch:
        raise _explain_order(carried(folder), edit, mismatch) from mismatch
    return {name: torch.from_numpy(array).to(stored[name].dtype) for name, array in edited.items()}


def stored_arrays(folder: Path, sites: Iterable[str]) -> dict[str, Array]:
    """Weights of a model folder by name, without those that it lacks; bfloat16, which NumPy lacks, as float32."""
    return _arrays(denoiser_weights(folder), sites)


def _arrays(stored: Mapping[str, torch.Tensor], sites: Iterable[str]) -> dict[str, Array]:
    weights = {site: stored[site] for site in sites if site in stored}
    wide = Float32(weights)
    return {n: wide[n] if weight.dtype == torch.bfloat16 else weight.numpy() for n, weight in weights.items()}


def apply_edit(
    folder: Path,
    edit: Edit,
    out: Path,
    *,
    force: bool = False,
    link: bool = True,
    progress: Callable[[str], None] = lambda message: None,
) -> None:
    """Write an edited diffusers pipeline to ``out``; ``folder`` is left as it is.

    Args:
        folder: a diffusers folder.
        edit: what to apply.
        out: must not exist, or be empty.
        force: apply although the model isn't the one that the edit was made for.
        link: hard-link large files that don't change.
        progress: told each step.

    Raises:
        OutputError: ``out`` holds something already or can't be written.
        FingerprintMismatch: the edit is for another model.
    """
    check_free(out)
    progress("editing")
    edited = edited_weights(folder, edit, force=force)
    component = folder / family_of(folder).component
    shards = weight_files(component, WEIGHTS)
    chain = json.dumps([*carried(folder), edit.id])
    with new_folder(out) as partial:
        for source in sorted(path for path in folder.rglob("*") if path.is_file()):
            relative = source.relative_to(folder)
            if any(part.startswith(".") for part in relative.parts) or _left_out(source, component, shards):
                continue
            target = partial / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            if source not in shards or not _rewrite(source, target, edited, chain):
                _place(source, target, link)
            else:
                progress(f"wrote {relative}")
        _check_whole(folder, partial)


def _explain_order(present: tuple[str, ...], edit: Edit, mismatch: FingerprintMismatch) -> FingerprintMismatch:
    """A mismatch that comes from the edits that a model carries says so."""
    if edit.id in present:
        return FingerprintMismatch(f"the model carries this edit already ({edit.id[:12]})")
    if edit.metadata.on == present:
        return mismatch
    wanted, found = (", ".join(i[:12] for i in ids) or "no edits" for ids in (edit.metadata.on, present))
    return FingerprintMismatch(
        f"the edit was made for a model with {wanted}, this one carries {found}: apply edits in order, or use --force"
    )


def _rewrite(source: Path, target: Path, edited: Mapping[str, torch.Tensor], chain: str) -> bool:
    """A shard with its edited tensors; False where it has none."""
    with safe_open(source, framework="pt") as opened:
        names = list(opened.keys())
        if not any(name in edited for name in names):
            return False
        tensors = {name: edited[name].contiguous() if name in edited else opened.get_tensor(name) for name in names}
        document = {"format": "pt", **(opened.metadata() or {}), EDITS: chain}
        save_file(tensors, target, document)
    target.chmod(0o644)
    return True


def _left_out(source: Path, component: Path, shards: list[Path]) -> bool:
    """Pickles, single-file checkpoints, and stored variants of the edited component that weren't edited."""
    if source.suffix in _PICKLED:
        return True
    if source.suffix != ".safetensors":
        index = source.name.startswith(f"{WEIGHTS}.safetensors.index")
        return source.parent == component and index and not _names_shards(source, shards)
    return (source.parent == component and source not in shards) or source.parent == component.parent


def _names_shards(index: Path, shards: list[Path]) -> bool:
    return {index.parent / name for name in read_json(index).get("weight_map", {}).values()} == set(shards)


def _place(source: Path, target: Path, link: bool) -> None:
    """Link or copy; a cache's symbolic links are followed."""
    source = source.resolve()
    if not (link and source.stat().st_size >= _LARGE and hard_linked(source, target)):
        shutil.copyfile(source, target)


def _check_whole(folder: Path, partial: Path) -> None:
    """Every model of the pipeline still has weights: one that was stored as a pickle alone has none left."""
    for name, entry in read_json(folder / "model_index.json").items():
        source = folder / name
        if not isinstance(entry, list) or not source.is_dir():
            continue
        pickled = any(path.suffix in _PICKLED for path in source.iterdir())
        if pickled and not any((partial / name).glob("*.safetensors")):
            raise ModelError(f"{source} has its weights as a pickle only: save the pipeline as safetensors first")
