"""Export a diffusers pipeline to ONNX (float32) through Optimum, with the edit in it and a manifest beside it."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from excise.errors import ArtefactError, ExciseError, MissingExtra, ModelError, NoCrossAttention
from excise.export.layout import BASE, separate, write_base
from excise.export.local_paths import remove_local_paths
from excise.export.parity import make_inputs, onnx_outputs, parity, text_states, torch_outputs
from excise.export.pipeline import WeightEdit, apply_edit, cross_attention, first_line, load_pipeline, read_weights
from excise.export.quiet import quiet
from excise.export.tokenizer import write_fast_tokenizer
from excise.export.weight_map import map_weights, unshare
from excise.manifest import BaseEntry, EditEntry, Manifest, hash_file, write_manifest
from excise.onnx_metadata import EDIT_ID, write_metadata
from excise.output import check_free, new_folder

KIND = "onnx-pipeline"
UNET = "unet/model.onnx"
BASE_WEIGHTS = f"unet/{BASE}"
PROMPTS = ("", "a photo of a dog", "an oil painting of a house")
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


def _say(message: str) -> None:
    """Drop progress that nobody asked for."""


def export_pipeline(
    model: Path | str,
    out: Path,
    *,
    edit: WeightEdit | None = None,
    force: bool = False,
    progress: Callable[[str], None] | None = None,
    prompts: Sequence[str] | None = None,
) -> Manifest:
    """Export ``model`` to ONNX in the new folder ``out``, which appears whole or not at all.

    The folder is Optimum's, with ``tokenizer/tokenizer.json`` and ``excise.json`` added and the UNet's files laid out
    for patching (``export.layout``). Every weight that the edit moves, or that another edit could, is found again in
    ``unet/model.onnx`` and compared exactly.
    A safety checker is left out: Optimum doesn't export it.

    Args:
        model: A diffusers folder, or a hub id (``owner/name``).
        out: Must not exist, or be empty.
        edit: Applied to the UNet before the export.
        force: Apply it although it was made for other weights.
        progress: Told each step, one line at a time.
        prompts: What parity is measured on; by default the edit's summary, which names its concepts, and ``PROMPTS``.

    Returns:
        The manifest as written.

    Raises:
        OutputError: ``out`` holds something or can't be written.
        ModelError: ``model`` is missing, half-written or has no UNet (NoCrossAttention: a UNet without text).
        EditError: The edit was made for another model (FingerprintMismatch).
        ArtefactError: Optimum failed, or the exported weights aren't the edited ones.
        NumericsError: The edit changes nothing, or the outputs aren't finite.
        MissingExtra: optimum-onnx or one of its companions isn't installed.
    """
    say = progress or _say
    check_free(out)
    say(f"loading {model}")
    pipe = load_pipeline(model)
    _check_supported(model, pipe)
    movable = cross_attention(pipe.unet)
    if not movable:
        raise NoCrossAttention(f"{model} has no cross-attention: there is nothing to edit")
    unedited = {name: np.array(values) for name, values in read_weights(pipe.unet, movable).items()}
    sites = movable if edit is None else tuple(dict.fromkeys([*movable, *edit.sites]))
    before = after = inputs = None
    if edit is not None:
        say(f"applying {edit.summary}")
        inputs = make_inputs(pipe.unet, text_states(pipe, prompts or (edit.summary, *PROMPTS)))
        before = torch_outputs(pipe.unet, inputs)
        apply_edit(pipe.unet, edit, force=force)
        after = torch_outputs(pipe.unet, inputs)
        parity(before, after, after)  # refuses an edit without effect before the long part
    # Copies: the exporter may free or cast the parameters.
    weights = {name: np.array(values) for name, values in read_weights(pipe.unet, sites).items()}
    base = _describe(model, pipe)
    with new_folder(out) as folder:
        say("exporting to ONNX")
        for message in _export(pipe, folder):
            say(message)
        write_base(folder / BASE_WEIGHTS, unedited)
        entries = _finish_unet(folder, weights, movable, edit)
        if not write_fast_tokenizer(folder / "tokenizer", pipe.tokenizer):
            say("tokenizer.json left out: it doesn't give the ids of the pipeline's tokenizer")
        remove_local_paths(folder)
        figures: dict[str, float] = {}
        if before is not None and after is not None and inputs is not None:
            say("measuring parity with PyTorch")
            measured = parity(before, after, onnx_outputs(folder / UNET, inputs))
            figures = {f"unet_{name}": value for name, value in measured.dict().items()}
        described = None if edit is None else EditEntry(id=edit.id, summary=edit.summary, sites=edit.sites)
        say("hashing")
        return write_manifest(
            folder,
            kind=KIND,
            base=base,
            edit=described,
            weights=entries,
            base_weights=BASE_WEIGHTS,
            parity=figures,
        )


def _check_supported(model: Path | str, pipe: Any) -> None:
    """Raise ``ModelError`` if the UNet reads more than latents, a timestep and one text encoder's states."""
    if getattr(pipe, "text_encoder", None) is None or getattr(pipe, "tokenizer", None) is None:
        raise ModelError(f"{model} has no text encoder or no tokenizer: a Stable Diffusion 1 or 2 pipeline is needed")
    for option in ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type"):
        if (value := getattr(pipe.unet.config, option, None)) is not None:
            raise ModelError(
                f"{model} has a UNet with {option} {value!r}, which can't be exported yet: "
                "a Stable Diffusion 1 or 2 pipeline is needed"
            )


def _export(pipe: Any, folder: Path) -> list[str]:
    """Run Optimum without a word on the terminal; its own checks' warnings are returned.

    Raises:
        ArtefactError: It failed; the message is the cause's first line.
        MissingExtra: It isn't installed.
    """
    try:
        with quiet():
            from optimum.exporters.onnx import onnx_export_from_model
    except ImportError as error:
        raise MissingExtra("optimum-onnx", "export") from error
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.register_modules(safety_checker=None)
        pipe.register_to_config(requires_safety_checker=False)
    try:
        with quiet() as messages:
            onnx_export_from_model(pipe, folder, task="text-to-image")
    except (ExciseError, MemoryError):
        raise
    except Exception as error:
        cause = _innermost(error)
        if isinstance(cause, OSError) and cause.errno in _OF_THE_DISK:
            raise cause from error
        raise ArtefactError(f"the export to ONNX failed: {first_line(cause)}") from error
    if not (folder / UNET).is_file():
        raise ArtefactError(f"the export to ONNX failed: Optimum wrote no {UNET}")
    told = (message for message in messages if message.startswith("The ONNX export succeeded with"))
    return [" ".join(message.partition("The exported model was saved")[0].split()) for message in told]


def _innermost(error: BaseException) -> BaseException:
    """What went wrong in the first place: Optimum wraps it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _finish_unet(
    folder: Path, weights: dict[str, NDArray[Any]], movable: Sequence[str], edit: WeightEdit | None
) -> dict[str, Any]:
    """Separate merged initialisers, lay the files out for patching, map and check every weight, store the edit's id."""
    path = folder / UNET
    unshare(path, weights)
    separate(path, movable)
    if edit is not None:
        partial = path.with_suffix(".partial")
        write_metadata(path, partial, {EDIT_ID: edit.id})
        partial.replace(path)
    return dict(map_weights(path, weights, file=UNET))


def _describe(model: Path | str, pipe: Any) -> BaseEntry:
    """The unedited model, without the machine's paths."""
    folder = Path(model)
    local = folder.is_dir()
    files = sorted((folder / "unet").glob("*.safetensors")) if local else []
    return BaseEntry(
        name=_model_name(folder.resolve()) if local else str(model),
        pipeline=type(pipe).__name__,
        weights={f"unet/{file.name}": hash_file(file) for file in files},
    )


def _model_name(folder: Path) -> str:
    """A folder's name; in the hub's cache, ``owner/name@revision``."""
    cached = folder.parent.parent.name
    if folder.parent.name == "snapshots" and cached.startswith("models--"):
        return f"{cached.removeprefix('models--').replace('--', '/')}@{folder.name}"
    return folder.name
