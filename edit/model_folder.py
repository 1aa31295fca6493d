"""Read just what an edit needs from a diffusers folder: which weights read the text, and their values.

The UNet is never built: its safetensors headers are read, and then only the K and V tensors.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open

from excise.errors import ModelError, NoCrossAttention

#: ``to_k`` and ``to_v`` of a transformer block's second attention, the one that reads the text.
SITE = re.compile(r"\.attn2\.to_[kv]\.weight$")
WEIGHTS = "diffusion_pytorch_model"
NEEDED = ("model_index.json", "unet/*", "text_encoder/*", "tokenizer/*", "scheduler/*", "vae/*")


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
        patterns = [f"{p[:-1]}*.{e}" if p.endswith("*") else p for p in NEEDED for e in ("json", "safetensors", "txt")]
        return Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{model} is not a folder and can't be had from the hub: {reason}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a model folder.

    Raises:
        ModelError: missing or not JSON.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ModelError(f"{path} is missing: the model folder is incomplete") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} can't be read: {str(error).splitlines()[0]}") from error
    return content


def weight_files(component: Path, stem: str) -> list[Path]:
    """The safetensors files of a component, sharded or not.

    Raises:
        ModelError: none there, or a shard is missing.
    """
    index = component / f"{stem}.safetensors.index.json"
    if index.exists():
        files = sorted({component / name for name in read_json(index)["weight_map"].values()})
    else:
        files = [component / f"{stem}.safetensors"]
        if not files[0].exists():
            half = component / f"{stem}.fp16.safetensors"
            files = [half] if half.exists() else files
    for file in files:
        if not file.exists():
            raise ModelError(f"{file} is missing: the model folder is incomplete, or not in safetensors format")
    return files


def read_tensors(files: list[Path], pattern: re.Pattern[str] | None = None) -> dict[str, torch.Tensor]:
    """The tensors whose names match, read lazily, in the files' dtype.

    Raises:
        ModelError: a file that is damaged or half-written.
    """
    tensors = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a mapping)
                    if pattern is None or pattern.search(name):
                        tensors[name] = opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} can't be read ({error}): it is damaged or half-written") from error
    return tensors


def cross_attention_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every cross-attention K and V weight (o × d) of the UNet, by name, in order of name.

    Raises:
        ModelError: a missing or damaged file.
        NoCrossAttention: nothing in the UNet reads text embeddings.
    """
    read_json(folder / "model_index.json")
    unet = folder / "unet"
    config = read_json(unet / "config.json")
    found = read_tensors(weight_files(unet, WEIGHTS), SITE)
    if not found:
        kind = config.get("_class_name", "unknown")
        raise NoCrossAttention(
            f"{unet} ({kind}) has no cross-attention: no weight is named …attn2.to_k.weight or …attn2.to_v.weight"
        )
    widths = {weight.shape[1] for weight in found.values()}
    expected = config.get("cross_attention_dim")
    if len(widths) != 1 or (isinstance(expected, int) and widths != {expected}):
        raise ModelError(f"{unet} reads text of widths {sorted(widths)}, its config says {expected}: not supported")
    return {name: found[name] for name in sorted(found)}


def as_float32(weights: dict[str, torch.Tensor]) -> dict[str, npt.NDArray[np.float32]]:
    """NumPy float32 copies, exact for float16 and bfloat16."""
    return {name: weight.to(torch.float32).numpy() for name, weight in weights.items()}
