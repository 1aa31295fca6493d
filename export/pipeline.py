"""Load a diffusers pipeline, edited if asked, after checks that need no heavy import."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from excise.editfile import Edit
from excise.errors import FingerprintMismatch, MissingExtra, ModelError
from excise.export.quiet import quiet

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_ONE_OF = {
    "scheduler": ("scheduler_config.json",),
    "tokenizer": ("tokenizer.json", "vocab.json", "spiece.model"),
    "feature_extractor": ("preprocessor_config.json",),
    "image_processor": ("preprocessor_config.json",),
}
_OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")
_WEIGHTS = "diffusion_pytorch_model"
_DENOISERS = ("unet", "transformer")


def check_model(model: Path) -> tuple[str, ...]:
    """Check that a diffusers folder is whole: every component's configuration, and weights whose files are complete.

    Only headers are read.

    Returns:
        The components that model_index.json lists, that aren't there, and that a pipeline runs without.

    Raises:
        ModelError: Something is missing, cut off, or not what is needed; the message names the file.
    """
    if not model.is_dir():
        raise ModelError(f"{model} doesn't exist: name a diffusers folder, or a hub id such as owner/name")
    index = _read_index(model)
    components = {
        name: value
        for name, value in index.items()
        if not name.startswith("_") and isinstance(value, list) and len(value) == 2 and value[1] is not None
    }
    if not any(name in components for name in _DENOISERS):
        found = ", ".join(sorted(components)) or "nothing"
        raise ModelError(
            f"{model} has no unet and no transformer (model_index.json lists {found}): there is nothing to edit"
        )
    absent = tuple(name for name in components if name in _OPTIONAL and not (model / name).exists())
    for name in components:
        if name not in absent:
            _check_component(model / name, name)
    return absent


def _read_index(model: Path) -> dict[str, Any]:
    """``model_index.json``: the pipeline's class and its components."""
    return _read_json(model / "model_index.json", f"{model} is not a diffusers folder: it has no model_index.json")


def _read_json(path: Path, missing: str) -> dict[str, Any]:
    """A JSON object from a file; ``missing`` is the message if there is no such file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelError(missing) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} can't be read as JSON ({error}): download or save the model again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not a JSON object: download or save the model again")
    return value


def _check_component(folder: Path, name: str) -> None:
    """Raise ``ModelError`` unless a component's files are there and whole."""
    if not folder.is_dir():
        raise ModelError(f"{folder} is missing, and model_index.json lists it: download or save the model again")
    kind = next((kind for kind in _ONE_OF if name.startswith(kind)), None)
    if kind is not None:
        if not any((folder / file).is_file() for file in _ONE_OF[kind]):
            raise ModelError(f"{folder} has no {' or '.join(_ONE_OF[kind])}: download or save the model again")
        return
    _read_json(folder / "config.json", f"{folder} has no config.json: download or save the model again")
    shards = sorted(folder.glob("*.safetensors"))
    for listing in folder.glob("*.safetensors.index.json"):
        named = set(_read_json(listing, f"{listing} is missing").get("weight_map", {}).values())
        if absent := sorted(named - {shard.name for shard in shards}):
            raise ModelError(f"{folder / absent[0]} is missing, and {listing.name} lists it: download the model again")
    if not shards:
        other = any(folder.glob("*.bin"))
        how = "convert its .bin weights, which excise doesn't load" if other else "download or save the model again"
        raise ModelError(f"{folder} has no safetensors weights: {how}")
    for shard in shards:
        check_safetensors(shard)


def check_safetensors(path: Path) -> None:
    """Raise ``ModelError`` unless a safetensors file's header parses and the file is as long as it says."""
    size = path.stat().st_size
    again = "download or save the model again"
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise ModelError(f"{path} is cut off in its header ({size} bytes): {again}")
        try:
            header = json.loads(stream.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise ModelError(f"{path} isn't a safetensors file: {again}") from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise ModelError(f"{path} is cut off or altered ({size} bytes, its header says {expected}): {again}")


def pipeline_class(model: Path) -> str:
    """Class of the pipeline in a diffusers folder, by ``model_index.json``.

    Raises:
        ModelError: There is no such file, or it doesn't say.
    """
    return str(_read_index(model).get("_class_name"))


def is_local(model: Path | str) -> bool:
    """Whether ``model`` is to be found on this machine, rather than a hub id."""
    return Path(model).exists() or not _HUB_ID.match(str(model))


def load_pipeline(model: Path | str, edit: Edit | None = None, *, force: bool = False) -> Any:
    """Load a diffusers pipeline in float32 on the CPU, from safetensors only, and apply ``edit`` to its denoiser.

    Args:
        model: A diffusers folder, or a hub id (``owner/name``) if there is no such folder.
        edit: The edit to apply.
        force: Apply it although it was made for other weights.

    Returns:
        The ``DiffusionPipeline``.

    Raises:
        ModelError: The folder is missing, half-written or of the wrong kind.
        FingerprintMismatch: ``edit`` was made for another model.
        MissingExtra: diffusers isn't installed.
    """
    local = is_local(model)
    options: dict[str, Any] = {}
    if local:
        options |= dict.fromkeys([*check_model(Path(model)), *_left_out(Path(model))])
        if _only_half(Path(model)):
            options["variant"] = "fp16"
    if "safety_checker" in options:
        options["requires_safety_checker"] = False
    try:
        with quiet():
            import torch
            from diffusers import DiffusionPipeline
    except ModuleNotFoundError as error:
        raise MissingExtra((error.name or "diffusers").partition(".")[0], "export") from error
    try:
        with quiet():
            pipe = DiffusionPipeline.from_pretrained(
                str(model), torch_dtype=torch.float32, use_safetensors=True, local_files_only=local, **options
            )
    except MemoryError:
        raise
    except Exception as error:
        raise ModelError(f"{model} can't be loaded: {first_line(error)}") from error
    component = next((name for name in _DENOISERS if getattr(pipe, name, None) is not None), None)
    if component is None:
        raise ModelError(f"{model} has no unet and no transformer: there is nothing to edit")
    getattr(pipe, component).eval()
    if edit is not None:
        apply_edit(denoiser_for(pipe, edit), edit, force=force)
    return pipe


def _left_out(model: Path) -> list[str]:
    """Components that model_index.json has as null: diffusers wants to be told, where they aren't optional to it."""
    return [name for name, value in _read_index(model).items() if value == [None, None]]


def _only_half(model: Path) -> bool:
    """Whether a denoiser's weights are there as the variant ``fp16`` alone."""
    return any(
        any((model / name).glob(f"{_WEIGHTS}.fp16*.safetensors"))
        and not (model / name / f"{_WEIGHTS}.safetensors").is_file()
        and not (model / name / f"{_WEIGHTS}.safetensors.index.json").is_file()
        for name in _DENOISERS
    )


def denoiser_for(pipe: Any, edit: Edit) -> Any:
    """The torch denoiser that an edit moves.

    Raises:
        FingerprintMismatch: The pipeline has another one.
    """
    denoiser = getattr(pipe, edit.metadata.component, None)
    if denoiser is None:
        raise FingerprintMismatch(f"the edit is for another model: this one has no {edit.metadata.component}")
    return denoiser


def read_weights(denoiser: Any, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Views of a denoiser's parameters as NumPy arrays.

    Raises:
        FingerprintMismatch: The denoiser has no parameter of that name.
    """
    parameters = dict(denoiser.named_parameters())
    if absent := [name for name in names if name not in parameters]:
        raise FingerprintMismatch(f"the edit is for another model: this one has no {absent[0]}")
    return {name: parameters[name].detach().cpu().numpy() for name in names}


def apply_edit(denoiser: Any, edit: Edit, *, force: bool = False) -> None:
    """Move a torch denoiser's weights in place.

    Raises:
        FingerprintMismatch: The edit was made for another model.
    """
    import torch

    before = read_weights(denoiser, edit.sites)
    after = edit.apply(before, force=force)
    if wrong := [name for name in before if name not in after or after[name].shape != before[name].shape]:
        raise FingerprintMismatch(
            f"the edit is for another model: it gives no {wrong[0]} of shape {before[wrong[0]].shape}"
        )
    parameters = dict(denoiser.named_parameters())
    with torch.no_grad():
        for name, values in before.items():
            parameters[name].copy_(torch.from_numpy(np.array(after[name], dtype=values.dtype)))


def cross_attention(unet: Any) -> tuple[str, ...]:
    """Names of a UNet's cross-attention key and value weights, in the order of its parameters."""
    ends = (".attn2.to_k.weight", ".attn2.to_v.weight")
    return tuple(name for name, _ in unet.named_parameters() if name.endswith(ends))


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something, or the error's type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
