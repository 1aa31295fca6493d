"""Edited checkpoints of other programs, read by diffusers' names.

A checkpoint is data of unknown origin: a pickle is read by ``torch.load(weights_only=True)``, which builds tensors and
containers and calls nothing else, or it is refused.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from excise.edit.component_files import Tensors
from excise.errors import EditError, ModelError

Weights = Mapping[str, Tensor]

_PICKLES = (".pt", ".pth", ".ckpt", ".bin")
_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_HEADER_LIMIT = 64 * 2**20
_LDM = "model.diffusion_model."
_LDM_PART = re.compile(r"(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)\.\d+\.")
#: Linear layers, which some editors list without ``.weight``.
_BARE = re.compile(r"(^|\.)(to_[kqv]|to_out\.0|linear(_\d+)?|context_embedder)$")


class Checkpoint(Weights):
    """A checkpoint's weights by diffusers' names, read when asked for; ``EditError`` at one that isn't plain floats."""

    def __init__(self, path: Path, stored: Mapping[str, Any], names: Mapping[str, str]) -> None:
        self._path, self._stored, self._names = path, stored, dict(sorted(names.items()))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> Tensor:
        try:
            tensor = self._stored[self._names[name]]
        except ModelError as error:
            raise EditError(str(error)) from error
        if not isinstance(tensor, Tensor):
            raise EditError(f"{self._path}: {name!r} is a {type(tensor).__name__}, not a tensor: give a state dict")
        if tensor.dtype not in _PLAIN or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise EditError(f"{self._path}: {name!r} is {tensor.dtype}, {tensor.layout}: give unquantised weights")
        return tensor.detach()


def read_checkpoint(path: Path, config: Mapping[str, Any] | None = None) -> Checkpoint:
    """Read a full or edited-only denoiser from a .safetensors file or a PyTorch pickle.

    ``{"state_dict": …}`` and ``{"unet": …}`` are unwrapped, prefixes such as ``unet.`` dropped, ``.weight`` is added to
    bare modules. The original Stable Diffusion's names need ``config``, the UNet's ``config.json``, to be converted; of
    its full checkpoints only the denoiser is read, without its moving average.

    Raises:
        EditError: missing, damaged, a pickle that would run code, no state dict, or names that can't be converted.
    """
    if not path.is_file() or path.suffix not in (".safetensors", *_PICKLES):
        raise EditError(f"{path} is not such a file: name one that ends in .safetensors, {', '.join(_PICKLES)}")
    stored: Mapping[str, Any]
    if path.suffix == ".safetensors":
        with path.open("rb") as opened:
            if int.from_bytes(opened.read(8), "little") > _HEADER_LIMIT:
                raise EditError(f"{path} can't be read as safetensors (its header is too large): it is damaged")
        try:
            stored = Tensors([path])
        except ModelError as error:
            raise EditError(str(error)) from error
    else:
        stored = _state_dict(path, _unpickled(path))
    return Checkpoint(path, stored, _names(path, stored, config))


def _unpickled(path: Path) -> Any:
    """The content of a PyTorch file, its tensors mapped from the disk where the format allows it."""
    with path.open("rb") as opened:
        zipped = opened.read(4) == b"PK\x03\x04"
    try:
        if zipped:
            with zipfile.ZipFile(path) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ValueError("compressed, which PyTorch never writes and which could fill the memory")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        called = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"asks for {called[1]}" if called else "holds more than tensors, or is damaged"
        raise EditError(f"{path} {what}: opening it could run code, so it wasn't; get it as safetensors") from error
    # The unpickler interprets a program of unknown origin: it can fail in any way.
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise EditError(f"{path} can't be read ({reason}): it is damaged or not a PyTorch file") from error


def _state_dict(path: Path, content: Any) -> dict[str, Any]:
    """The tensors by name, out of what they are wrapped in."""
    # No real file nests deeper, and a hostile one may hold itself.
    for _ in range(3):
        if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
            raise EditError(f"{path} holds a {type(content).__name__}, not tensors by name: give a state dict")
        inner = next((key for key in ("state_dict", "unet") if isinstance(content.get(key), dict)), None)
        if inner is None:
            return content
        beside = [key for key in content if key.startswith(("text_encoder", "vae"))]
        if beside:
            raise EditError(f"{path} holds {beside[0]!r} beside {inner!r}: only an edited denoiser can be imported")
        content = content[inner]
    raise EditError(f"{path} nests state dicts too deeply: give the denoiser's own")


def _names(path: Path, stored: Collection[str], config: Mapping[str, Any] | None) -> dict[str, str]:
    """diffusers' name → stored name."""
    if any(".lora_" in name or name.startswith("lora_") for name in stored):
        raise EditError(f"{path} is a LoRA: give the whole edited weights")
    plain = [(name.removeprefix("module."), name) for name in stored]
    known = (_LDM, "unet.", "transformer.")
    prefix = next((start for start in known if any(name.startswith(start) for name, _ in plain)), "")
    others = [name for name, _ in plain if not name.startswith(prefix)]
    if others and prefix != _LDM:
        raise EditError(f"{path} holds more than {prefix[:-1]} ({few(others)}): only a denoiser can be imported")
    names: dict[str, str] = {}
    for name, saved in plain:
        whole = name.removeprefix(prefix) + (".weight" if _BARE.search(name) else "")
        if name.startswith(prefix) and names.setdefault(whole, saved) != saved:
            raise EditError(f"{path} has {whole!r} twice, as {names[whole]!r} and {saved!r}: remove one")
    return _from_ldm(path, names, config) if any(map(_LDM_PART.match, names)) else names


def _from_ldm(path: Path, names: Mapping[str, str], config: Mapping[str, Any] | None) -> dict[str, str]:
    """The original Stable Diffusion's names by diffusers' own converter, which only moves what it is given: names.

    It counts the blocks that it sees and wants biases with weights, so an edited-only checkpoint is filled with blanks.
    """
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    if config is None or not isinstance(layers := config.get("layers_per_block", 2), int):
        raise EditError(f"{path} has the original names of Stable Diffusion: give the config.json of such a UNet")
    count = len(config.get("block_out_channels", (0,) * 4)) * (layers + 1)
    blanks = [f"{side}_blocks.{i}.blank" for side in ("input", "output") for i in range(count)]
    blanks += [f"middle_block.{i}.blank" for i in range(3)]
    modules = {"label_emb.0.0", "label_emb.0.2", *(name.rpartition(".")[0] for name in names)}
    blanks += [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]
    given = dict.fromkeys((_LDM + name for name in blanks), "") | {_LDM + name: name for name in names}
    converted = {new: old for new, old in convert_ldm_unet_checkpoint(given, {**config}).items() if old}
    left = sorted(names.keys() - set(converted.values()))
    if left:
        raise EditError(f"{path} has {len(left)} names that no such UNet has ({few(left)}): is it another model's?")
    return {new: names[old] for new, old in converted.items()}


def few(names: Collection[str]) -> str:
    """The first names, and how many more."""
    return ", ".join(repr(name) for name in list(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
