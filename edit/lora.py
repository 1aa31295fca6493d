"""An edit as a LoRA (Hu et al., arXiv 2106.09685): ``W_i T_i = W_i + up_i down_i``, exactly.

    T_i − I = L R          up_i down_i = W_i L R

with L (d × r) and R (r × d) the edit's factors, and r at most the number of tokens that it used. The best approximation
of rank k is the first k singular triples of ``W_i L R`` (Eckart and Young, *Psychometrika* 1(3), 1936). They come from
a matrix with r columns: with ``Rᵀ = Q P`` the product is ``(W_i L Pᵀ) Qᵀ``, and Q's columns are orthonormal. Each
factor gets the roots of the singular values.

All weights of a file share one rank, filled up with zeros, since that is what readers agree on: diffusers 0.39 takes
alpha from the first weight and the rank from most of them, drops kohya's alpha of a single ``to_k``, and so scales
weights of unequal ranks wrongly. Alpha is the rank everywhere, so that the scale alpha / rank is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from excise.edit.cholesky import finite, is_finite
from excise.errors import NumericsError, UsageError
from excise.output import new_file

__all__ = ["Lora", "diffusers_state", "kohya_metadata", "kohya_state", "lora", "save_lora"]

#: Singular values that add up to less than this part of the product are rounding: float32's own is 3·10⁻⁸.
_EXACT = 1e-8

#: Where kohya's names and diffusers' differ by their dots alone, and A1111, ComfyUI and diffusers agree on them.
_BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")


@dataclass(frozen=True)
class Lora:
    """``up`` with shape (o, r) and ``down`` with shape (r, d) of every weight by name, r the same for all.

    Attributes:
        factors: in the dtype that the file will have; the unused rows and columns of a weight are 0.
        error: ``√(Σ‖up_i down_i − W_i L R‖² / Σ‖W_i L R‖²)`` over all weights, with the factors as stored.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    error: float

    @property
    def rank(self) -> int:
        """r."""
        return next(iter(self.factors.values()))[1].shape[0]


def lora(
    weights: Mapping[str, Tensor],
    factors: Callable[[str], tuple[Tensor, Tensor]],
    *,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Lora:
    """The LoRA that moves ``weights`` as the edit does.

    Args:
        weights: the original weights (o, d) by name, read one at a time.
        factors: ``left`` (d, r) and ``right`` (r, d) of ``T − I`` for the weight of that name, as
            ``Transform.factors`` gives them.
        rank: at most this rank for each weight, the best of that rank; None is the exact rank.
        dtype: of the result. float16 leaves an error near 3·10⁻⁴, float32 near 4·10⁻⁸.

    Raises:
        UsageError: no weights, a rank below 1, factors of another shape, or an edit that moves nothing.
        NumericsError: inf or nan, or a factor that isn't finite in ``dtype``.
    """
    if not weights:
        raise UsageError("no weights for the LoRA: give those that the edit moves")
    if rank is not None and rank < 1:
        raise UsageError(f"a LoRA of rank {rank}: give 1 or more, or none for the exact rank")
    cut: dict[str, tuple[Tensor, Tensor]] = {}
    missed = moved = 0.0
    known: tuple[Tensor, tuple[Tensor, Tensor]] | None = None
    for name, weight in weights.items():
        left, right = factors(name)
        _check(name, weight, left, right)
        # Weights of one stream share R, and so its decomposition.
        if known is None or known[0] is not right:
            known = right, torch.linalg.qr(right.to(torch.float64).T)
        image = weight.detach().to(torch.float64) @ left.to(torch.float64)
        up, down = (part.to(dtype) for part in _truncated(image, *known[1], rank))
        if not (is_finite(up) and is_finite(down)):
            raise NumericsError(f"the LoRA of {name} isn't finite in {dtype}: use float32")
        exact = image @ right.to(torch.float64)
        missed += float((up.to(torch.float64) @ down.to(torch.float64) - exact).square().sum())
        moved += float(exact.square().sum())
        cut[name] = up, down
    if moved == 0:
        raise UsageError("the edit moves none of these weights: there is nothing to write as a LoRA")
    width = max(up.shape[1] for up, _ in cut.values())
    return Lora({name: _padded(up, down, width) for name, (up, down) in cut.items()}, (missed / moved) ** 0.5)


def _check(name: str, weight: Tensor, left: Tensor, right: Tensor) -> None:
    """Refuse shapes that don't fit, and values that aren't finite."""
    dim = weight.shape[-1]
    if weight.ndim != 2 or left.ndim != 2 or left.shape[0] != dim or right.shape != (left.shape[1], dim):
        shapes = ", ".join(str(tuple(part.shape)) for part in (weight, left, right))
        raise UsageError(f"{name}, left and right have shapes {shapes}: give (o, d), (d, r), (r, d)")
    for part in (weight, left, right):
        finite(part)


def _truncated(image: Tensor, basis: Tensor, mixed: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """The best ``up`` (o, k) and ``down`` (k, d) of ``image (basis mixed)ᵀ``, k its rank or ``rank``."""
    left, values, right = torch.linalg.svd(image @ mixed.T, full_matrices=False)
    tails = values.square().flip(0).cumsum(0).flip(0)
    count = int((tails > _EXACT**2 * tails[:1]).sum())
    if rank is not None:
        count = min(count, rank)
    root = values[:count].sqrt()
    return left[:, :count] * root, (root[:, None] * right[:count]) @ basis.T


def _padded(up: Tensor, down: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The same product with ``width`` columns and rows."""
    more = width - up.shape[1]
    return torch.nn.functional.pad(up, (0, more)).contiguous(), torch.nn.functional.pad(down, (0, 0, 0, more))


def _module(name: str) -> str:
    """The module of a weight. Raises ``UsageError`` for what isn't a weight."""
    if not name.endswith(".weight"):
        raise UsageError(f"{name!r} isn't a module's weight: a LoRA holds names that end in .weight")
    return name.removesuffix(".weight")


def diffusers_state(lora: Lora, component: str = "unet") -> dict[str, Tensor]:
    """The layout that diffusers' ``load_lora_weights`` reads (PEFT's): ``unet.….to_k.lora_A.weight`` is ``down``.

    Args:
        component: ``unet``, or ``transformer`` for families that have one.

    Raises:
        UsageError: a name that doesn't end in ``.weight``.
    """
    state = {}
    for name, (up, down) in lora.factors.items():
        state[f"{component}.{_module(name)}.lora_A.weight"] = down
        state[f"{component}.{_module(name)}.lora_B.weight"] = up
    return state


def kohya_state(lora: Lora) -> dict[str, Tensor]:
    """The layout of kohya-ss/sd-scripts, which A1111, ComfyUI and diffusers read.

    ``lora_unet_<module, dots as underscores>`` with ``.lora_up.weight``, ``.lora_down.weight`` and ``.alpha``.

    Raises:
        UsageError: a weight that isn't in a UNet's blocks.
    """
    state = {}
    for name, (up, down) in lora.factors.items():
        module = _module(name)
        if not module.startswith(_BLOCKS):
            raise UsageError(f"{name} is in no block of a UNet: kohya's layout has no name for it, use diffusers'")
        stem = "lora_unet_" + module.replace(".", "_")
        state[f"{stem}.lora_up.weight"] = up
        state[f"{stem}.lora_down.weight"] = down
        state[f"{stem}.alpha"] = torch.tensor(float(lora.rank))
    return state


def kohya_metadata(lora: Lora, base_model_version: str | None = None) -> dict[str, str]:
    """What kohya's files say of themselves; ``base_model_version`` is ``sd_v1``, ``sd_v2``, ``sdxl_base_v1-0``, …"""
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(lora.rank),
        "ss_network_alpha": str(lora.rank),
    }
    return metadata | ({"ss_base_model_version": base_model_version} if base_model_version else {})


def save_lora(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a LoRA file; it appears whole or not at all.

    Raises:
        UsageError: ``path`` doesn't end in ``.safetensors``.
        OutputError: ``path`` exists or can't be written.
    """
    if path.suffix != ".safetensors":
        raise UsageError(f"{path} must end in .safetensors: that is what readers of a LoRA look for")
    with new_file(path) as partial:
        save_file(dict(state), partial, {**(metadata or {}), "format": "pt"})
