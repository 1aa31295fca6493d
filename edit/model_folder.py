"""Read just what an edit needs from a diffusers folder: which weights read the text, and their values.

The denoiser is never built: its safetensors headers are read, and then only the tensors that are sites.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from excise.edit.component_files import PLAIN, Tensors, read_json, weight_files
from excise.edit.families import Family, family_of
from excise.errors import ModelError, NoCrossAttention, UsageError

WEIGHTS = "diffusion_pytorch_model"

#: What a download takes of a pipeline.
_FOLDERS = ("unet", "transformer", "text_encoder*", "tokenizer*", "scheduler", "vae")
_ENDINGS = ("json", "safetensors", "txt", "model")
NEEDED = ("model_index.json", *(f"{folder}/*.{ending}" for folder in _FOLDERS for ending in _ENDINGS))


def resolve(model: str) -> Path:
    """A local folder for ``model``: a path, ``demo:model`` (the bundled one), or a hub id (downloaded when absent).

    Raises:
        ModelError: no such folder, and no such model on the hub or no network.
    """
    if model == "demo:model":
        from excise.demo import MODEL

        return MODEL
    folder = Path(model)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise ModelError(f"{model} is not a folder: name a diffusers folder or a hub id such as owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=list(NEEDED)))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{model} is not a folder and can't be had from the hub: {reason}") from error


def denoiser_weights(folder: Path) -> Tensors:
    """All weights of the denoiser in a diffusers folder, each read when it is asked for.

    Raises:
        ModelError: an unknown, incomplete or damaged model.
    """
    return Tensors(weight_files(folder / family_of(folder).component, WEIGHTS))


@dataclass(frozen=True)
class Sites:
    """The weights of a model that read text.

    ``streams`` maps a stream's name to its weights by name, in order of name, each (o, d) in the stored dtype.
    """

    family: Family
    streams: dict[str, dict[str, Tensor]]


def read_sites(folder: Path, *, select: Callable[[str], bool] = lambda name: True) -> Sites:
    """Every weight that reads text, stream by stream; nothing else of the denoiser is read.

    Args:
        folder: a diffusers folder.
        select: which of the sites to read, by name.

    Raises:
        ModelError: an unknown, incomplete, damaged or quantised model; sites that aren't matrices, of several widths
            in one stream, or of several dtypes.
        NoCrossAttention: the denoiser has no site.
        UsageError: ``select`` leaves no site.
    """
    family = family_of(folder)
    component = folder / family.component
    config = read_json(component / "config.json")
    if config.get("quantization_config"):
        raise ModelError(f"{component} is quantised (its config has quantization_config): use the original weights")
    stored = Tensors(weight_files(component, WEIGHTS))
    sites = {name: stream for name in stored if (stream := family.stream_of(name, config)) is not None}
    if not sites:
        kind = config.get("_class_name")
        raise NoCrossAttention(f"{component} ({kind}) has no layer that reads text: none is named {family.sought}")
    chosen = {name: stream for name, stream in sites.items() if select(name)}
    if not chosen:
        raise UsageError(f"none of the {len(sites)} layers that read text is selected; one is {next(iter(sites))}")
    _check_headers(component, chosen, stored)
    streams: dict[str, dict[str, Tensor]] = {stream.name: {} for stream in family.streams_of(config)}
    for name, stream in chosen.items():
        streams[stream][name] = stored[name]
    return Sites(family, {stream: weights for stream, weights in streams.items() if weights})


def _check_headers(component: Path, sites: dict[str, str], stored: Tensors) -> None:
    """Refuse, before a value is read, what is quantised, not a matrix, or of several widths or dtypes."""
    headers = {name: stored.header(name) for name in sites}
    first = next(iter(headers))
    widths: dict[str, str] = {}
    for name, (dtype, shape) in headers.items():
        if dtype not in PLAIN:
            raise ModelError(f"{component}: {name} is quantised (dtype {dtype}): use the original weights")
        if len(shape) != 2 or 0 in shape:
            raise ModelError(f"{component}: {name} has shape {shape}: only matrices (o, d) can be edited")
        other = widths.setdefault(sites[name], name)
        if shape[1] != headers[other][1][1]:
            raise ModelError(
                f"{component}: {name} reads text of width {shape[1]}, {other} of width {headers[other][1][1]}: "
                "not supported"
            )
        if dtype != headers[first][0]:
            raise ModelError(f"{component}: {name} is {dtype}, {first} is {headers[first][0]}: store all in one dtype")
