"""Export a diffusers pipeline to ONNX through Optimum, with the edit in it and a manifest beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from excise.editfile import Edit
from excise.errors import NoCrossAttention, NumericsError
from excise.export.components import export_components, fixed_sizes
from excise.export.denoisers import Denoiser, check_exportable, family_of, make_inputs
from excise.export.layout import BASE, MODEL, separate, write_base
from excise.export.local_paths import remove_local_paths
from excise.export.options import ExportOptions, Precision, make_options
from excise.export.parity import DenoiserInputs, onnx_outputs, torch_outputs
from excise.export.pipeline import (
    apply_edit,
    denoiser_for,
    is_local,
    load_pipeline,
    pipeline_class,
    read_weights,
)
from excise.export.tokenizer import write_fast_tokenizer
from excise.export.weight_map import map_weights, unshare
from excise.manifest import BaseEntry, EditEntry, Manifest, WeightEntry, hash_file, write_manifest
from excise.onnx_metadata import EDIT_ID, write_metadata
from excise.output import check_free, new_folder
from excise.parity import parity

KIND = "onnx-pipeline"
PROMPTS = ("", "a photo of a dog", "an oil painting of a house")
Weights = dict[str, NDArray[Any]]


def _say(message: str) -> None:
    """Drop progress that nobody asked for."""


def export_pipeline(
    model: Path | str,
    out: Path,
    *,
    edit: Edit | None = None,
    force: bool = False,
    progress: Callable[[str], None] | None = None,
    prompts: Sequence[str] | None = None,
    dtype: Precision | None = None,
    options: ExportOptions | None = None,
) -> Manifest:
    """Export ``model`` to ONNX in the new folder ``out``, which appears whole or not at all.

    The folder is Optimum's, with each ``tokenizer.json`` and ``excise.json`` added and the denoiser's files laid out
    for patching (``export.layout``). Every weight that the edit moves, or that ``options`` have another edit move, is
    found again in the denoiser's ``model.onnx`` and compared exactly. The edit is applied in float32; in float16 its
    result is rounded once. A safety checker is left out: Optimum doesn't export it.

    Args:
        model: A diffusers folder, or a hub id (``owner/name``), of a family of ``export.denoisers``.
        out: Must not exist, or be empty.
        edit: Applied to the denoiser before the export.
        force: Apply it although it was made for other weights.
        progress: Told each step, one line at a time.
        prompts: What parity is measured on; by default the edit's summary, which names its concepts, and ``PROMPTS``.
        dtype: In place of ``options``'.
        options: Precisions, operator set and shapes; by default float32 with dynamic shapes.

    Returns:
        The manifest as written. Its parity figures are named after the denoiser's folder; with
        ``…_fp16_computed_in_fp32`` among them they come from ONNX Runtime's CPU provider, which computes float16 in
        float32: they hold the rounding of weights, not that of a GPU's arithmetic.

    Raises:
        OutputError: ``out`` holds something or can't be written.
        UsageError: A shape that the family doesn't have.
        ModelError: ``model`` is missing, half-written or can't be exported (NoCrossAttention: a UNet without text).
        EditError: The edit was made for another model (FingerprintMismatch).
        ArtefactError: Optimum failed, or the exported weights aren't the edited ones.
        NumericsError: The edit changes nothing, or the weights or outputs aren't finite.
        MissingExtra: optimum-onnx or one of its companions isn't installed.
    """
    say = progress or _say
    chosen = make_options(options, dtype=dtype)
    check_free(out)
    if is_local(model) and Path(model).is_dir():
        family_of(model, pipeline_class(Path(model)))
    say(f"loading {model}")
    pipe = load_pipeline(model)
    family = check_exportable(model, pipe)
    denoiser = getattr(pipe, family.component)
    movable = family.sites_of(denoiser)
    if not movable:
        raise NoCrossAttention(f"{model} has no weights that read the text: there is nothing to edit")
    if chosen.editable == "all":
        movable = tuple(name for name, _ in denoiser.named_parameters())
    if edit is not None:
        denoiser_for(pipe, edit)  # of another component, it would be missed weight by weight
        movable = tuple(dict.fromkeys([*movable, *edit.sites]))
    unedited = _copies(denoiser, movable)
    sizes = None if chosen.static is None else fixed_sizes(pipe, family, chosen.static)
    reference = None
    if edit is not None:
        say(f"applying {edit.summary}")
        inputs = make_inputs(
            pipe, family, prompts or (edit.summary, *PROMPTS), size=None if sizes is None else sizes.latents
        )
        reference = _apply(denoiser_for(pipe, edit), edit, inputs, force=force)
    weights = _copies(denoiser, movable)
    _check_range(weights, chosen.dtype)
    base = _describe(model, pipe, family)
    del denoiser  # the exporter lets go of what it has exported
    with new_folder(out) as folder:
        export_components(pipe, folder, chosen, say, sizes, scattered=family.component)
        file = f"{family.component}/{MODEL}"
        write_base(folder / family.component / BASE, unedited)
        entries = _finish_denoiser(folder, file, weights, edit)
        _write_tokenizers(folder, pipe, say)
        remove_local_paths(folder)
        figures = {}
        if reference is not None:
            say("measuring parity with PyTorch")
            figures = _measure(folder / file, reference, family.component, chosen.dtype, say)
        say("hashing")
        return write_manifest(
            folder,
            kind=KIND,
            base=base,
            edit=None if edit is None else EditEntry.of(edit),
            weights=entries,
            base_weights=f"{family.component}/{BASE}",
            parity=figures,
        )


@dataclass(frozen=True)
class _Reference:
    """What the torch denoiser gives before and after the edit, in float32."""

    inputs: DenoiserInputs
    before: NDArray[np.float32]
    after: NDArray[np.float32]


def _apply(denoiser: Any, edit: Edit, inputs: DenoiserInputs, *, force: bool) -> _Reference:
    """Edit the torch denoiser; an edit without effect is refused before the long part."""
    before = torch_outputs(denoiser, inputs)
    apply_edit(denoiser, edit, force=force)
    after = torch_outputs(denoiser, inputs)
    parity(before, after, after)
    return _Reference(inputs, before, after)


def _copies(denoiser: Any, names: Sequence[str]) -> Weights:
    """Copies of a torch denoiser's weights: the exporter casts and frees the parameters."""
    return {name: np.array(values) for name, values in read_weights(denoiser, names).items()}


def _check_range(weights: Weights, dtype: Precision) -> None:
    """Raise ``NumericsError`` for a weight that isn't finite in the export's precision."""
    limit = np.finfo(np.float16 if dtype == "fp16" else np.float32).max
    for name, values in weights.items():
        if not (np.abs(values) <= limit).all():
            raise NumericsError(f"{name} isn't finite in {dtype}: use a larger --regularization, or dtype fp32")


def _measure(
    path: Path, reference: _Reference, component: str, dtype: Precision, say: Callable[[str], None]
) -> dict[str, float]:
    """Parity of the exported denoiser, by the names of the manifest."""
    measured = parity(reference.before, reference.after, onnx_outputs(path, reference.inputs))
    figures = {f"{component}_{name}": value for name, value in measured.dict().items()}
    if dtype == "fp16":
        say("ONNX Runtime's CPU provider computes fp16 in fp32: parity shows the weights' rounding, not a GPU's")
        figures[f"{component}_fp16_computed_in_fp32"] = 1.0
    return figures


def _finish_denoiser(folder: Path, file: str, weights: Weights, edit: Edit | None) -> dict[str, WeightEntry]:
    """Separate merged initialisers, lay the files out for patching, map and check every weight, store the edit's id."""
    path = folder / file
    unshare(path)
    separate(path, weights)
    if edit is not None:
        partial = path.with_suffix(".partial")
        write_metadata(path, partial, {EDIT_ID: edit.id})
        partial.replace(path)
    return map_weights(path, weights, file=file)


def _write_tokenizers(folder: Path, pipe: Any, say: Callable[[str], None]) -> None:
    """Write ``tokenizer.json`` beside each tokenizer's own files."""
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        tokenizer = getattr(pipe, name, None)
        if tokenizer is not None and not write_fast_tokenizer(folder / name, tokenizer):
            say(f"{name}/tokenizer.json left out: it doesn't give the ids of the pipeline's tokenizer")


def _describe(model: Path | str, pipe: Any, family: Denoiser) -> BaseEntry:
    """The unedited model, without the machine's paths."""
    folder = Path(model)
    local = folder.is_dir()
    files = sorted((folder / family.component).glob("*.safetensors")) if local else []
    return BaseEntry(
        name=_model_name(folder.resolve()) if local else str(model),
        pipeline=type(pipe).__name__,
        weights={f"{family.component}/{file.name}": hash_file(file) for file in files},
    )


def _model_name(folder: Path) -> str:
    """A folder's name; in the hub's cache, ``owner/name@revision``."""
    cached = folder.parent.parent.name
    if folder.parent.name == "snapshots" and cached.startswith("models--"):
        return f"{cached.removeprefix('models--').replace('--', '/')}@{folder.name}"
    return folder.name
