"""Edited checkpoints of other programs: read them, and find what they moved.

Where a method multiplied all K and V weights by one matrix (UCE, arXiv 2308.14761; RECE, arXiv 2407.12383), it is
the least-squares solution over the weights that moved, of least norm where G is singular:

    T = argmin Σ_i ‖W_i T − W_i'‖²          G (T − I) = Σ_i W_iᵀ (W_i' − W_i)          G = Σ_i W_iᵀ W_i

Everything else is kept as it is, as a difference. A checkpoint is data of unknown origin: a pickle is read by
``torch.load(weights_only=True)``, which builds tensors and containers and calls nothing else, or it is refused.
"""

from __future__ import annotations

import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from excise.edit.cholesky import is_finite
from excise.edit.component_files import Tensors
from excise.errors import EditError, ModelError, UsageError

Weights = Mapping[str, Tensor]

#: Of each weight's movement, what one matrix may leave out. The published code solves every layer in float32 by an
#: explicit inverse: at d = 768 and random embeddings that is 2.6·10⁻³ away from one matrix. Noise is 0.9 away.
TOLERANCE = 1e-2

_EPS = torch.finfo(torch.float64).eps
_SITE = re.compile(r"\.attn2\.to_[kv]\.weight$")
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
        raise EditError(f"{path} holds more than {prefix[:-1]} ({_few(others)}): only a denoiser can be imported")
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
        raise EditError(f"{path} has {len(left)} names that no such UNet has ({_few(left)}): is it another model's?")
    return {new: names[old] for new, old in converted.items()}


def _few(names: Collection[str]) -> str:
    """The first names, and how many more."""
    return ", ".join(repr(name) for name in list(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@dataclass(frozen=True)
class Moved:
    """What a checkpoint changed.

    Attributes:
        compared: how many weights the checkpoint has.
        moved: names of those that differ by more than the rounding to the coarser dtype, in order of name.
        share: part of all the base's parameters that is in them.
        largest: name and value of the largest ``‖W' − W‖ / ‖W‖``.
        sites: those of ``moved`` that read the text.
        shared: ``T`` with shape (d, d), float64, that moves all ``sites``; None where no one matrix does.
        residual: the largest ``‖W_i T − W_i'‖ / ‖W_i' − W_i‖`` over ``sites``; None where T isn't determined.
        rank: of ``T − I``, above what the residual accounts for; None without ``shared``.
        deltas: ``W' − W``, float32, of all of ``moved`` that ``shared`` doesn't move.
    """

    compared: int
    moved: tuple[str, ...]
    share: float
    largest: tuple[str, float]
    sites: tuple[str, ...]
    shared: Tensor | None
    residual: float | None
    rank: int | None
    deltas: dict[str, Tensor] = field(repr=False)

    @property
    def document(self) -> dict[str, Any]:
        """As plain data, without the tensors."""
        return {
            "compared": self.compared,
            "moved": len(self.moved),
            "share_of_parameters": self.share,
            "text_sites_moved": len(self.sites),
            "shared": self.shared is not None,
            "residual": self.residual,
            "rank": self.rank,
            "largest_relative_change": self.largest[1],
        }

    @property
    def report(self) -> list[str]:
        """Lines for people."""
        left = "undetermined" if self.residual is None else f"{self.residual:.2g} of a movement left out"
        same = "no matrix" if self.shared is None else f"one matrix of rank {self.rank}"
        return [
            f"{self.compared} weights compared, {len(self.moved)} moved ({100 * self.share:.3g} % of the parameters)",
            *([f"{len(self.sites)} of them read the text and share {same} ({left})"] if self.sites else []),
            *([f"{len(self.deltas)} kept as differences"] if self.deltas else []),
            f"largest relative change {self.largest[1]:.3g}: {self.largest[0]}",
        ]


def compare(
    base: Weights, new: Weights, *, sites: Collection[str] | None = None, tolerance: float = TOLERANCE
) -> Moved:
    """What ``new`` changes of ``base``; both may read lazily: a few weights are held at a time.

    Args:
        base: the original denoiser's weights, all of them.
        new: the checkpoint's, some or all.
        sites: names of the weights that read the text, all of one width; by default K and V of every ``attn2``.
        tolerance: part of each site's movement that ``shared`` may leave out, besides the rounding of its dtype.

    Raises:
        EditError: weights that the base doesn't have, of another shape, or not finite; nothing in it, or nothing moved.
        UsageError: sites of several widths.
    """
    if unknown := [name for name in new if name not in base]:
        raise EditError(f"{len(unknown)} of {len(new)} weights aren't the base model's: {_few(unknown)}")
    moved: list[str] = []
    reads: list[str] = []
    deltas, counted, largest, gram, cross = {}, 0, ("", 0.0), torch.zeros(()), torch.zeros(())
    for name in sorted(new):
        old, now, coarse = _pair(name, base, new)
        # A copy in another precision didn't move.
        if torch.equal(old.to(coarse), now.to(coarse)):
            continue
        moved.append(name)
        change, counted = now - old, counted + old.numel()
        relative = float(change.norm() / old.norm()) if bool(old.any()) else math.inf
        largest = max(largest, (name, relative), key=lambda pair: pair[1])
        if not (_SITE.search(name) if sites is None else name in sites):
            deltas[name] = change.to(torch.float32)
            continue
        if reads and old.shape[1] != len(gram):
            raise UsageError(f"{name} reads text of width {old.shape[1]}, {reads[0]} of {len(gram)}: give one stream")
        reads.append(name)
        gram, cross = gram + old.T @ old, cross + old.T @ change
    if not moved:
        raise EditError(f"none of the checkpoint's {len(new)} weights differs from the base model's: nothing to import")
    shared, residual, rank = _shared(base, new, reads, gram, cross, tolerance) if reads else (None, None, None)
    if shared is None:
        pairs = ((name, _pair(name, base, new)) for name in reads)
        deltas |= {name: (now - old).to(torch.float32) for name, (old, now, _) in pairs}
    share = counted / sum(base[name].numel() for name in base)
    return Moved(len(new), tuple(moved), share, largest, tuple(reads), shared, residual, rank, deltas)


def _pair(name: str, base: Weights, new: Weights) -> tuple[Tensor, Tensor, torch.dtype]:
    """Both weights in float64, and the coarser of their dtypes."""
    old, now = base[name], new[name]
    if old.shape != now.shape:
        raise EditError(f"{name} has shape {tuple(now.shape)}, the base model's {tuple(old.shape)}: it's another model")
    if not is_finite(now):
        raise EditError(f"{name} of the checkpoint holds inf or nan: it is damaged")
    coarse = max(old.dtype, now.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    return old.to(torch.float64), now.to(torch.float64), coarse


def _shared(
    base: Weights, new: Weights, names: Collection[str], gram: Tensor, cross: Tensor, tolerance: float
) -> tuple[Tensor | None, float | None, int | None]:
    """``T``, the largest relative residual and the rank, from ``G`` and ``Σ WᵀΔW`` with shape (d, d)."""
    values, vectors = torch.linalg.eigh(gram)
    used = values > len(gram) * _EPS * values[-1]
    # With no more rows than unknowns, any change whatever is a multiplication.
    if sum(len(base[name]) for name in names) <= int(used.sum()):
        return None, None, None
    change = vectors[:, used] @ ((vectors[:, used].T @ cross) / values[used, None])
    worst, total, fits = 0.0, 0.0, True
    for name in names:
        old, now, coarse = _pair(name, base, new)
        missed, step = float((old + old @ change - now).norm()), float((now - old).norm())
        worst, total = max(worst, missed / step), total + missed**2
        fits &= missed <= tolerance * step + torch.finfo(coarse).eps / 2 * float(now.norm())
    if not fits:
        return None, worst, None
    singular = torch.linalg.svdvals(change)
    # The most that what is left out can add to T, or rounding.
    noise = max(math.sqrt(total / float(values[used][0])), len(gram) * _EPS * float(singular[0]))
    return change + torch.eye(len(gram), dtype=torch.float64), worst, int((singular > noise).sum())
