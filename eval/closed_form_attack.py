"""The closed-form attack: the text embedding with which edited weights best regenerate a prompt, fed to the UNet.

For original weights ``W_i``, edited ones ``W̃_i`` and each token c of a prompt's embedding, c' is

    derived     argmin Σ_i ‖W̃_i c' − W_i c‖² + λ ‖c'‖²            (λ I + A) c' = b, RECE's eq. 8
    radius r    argmin Σ_i ‖W̃_i c' − W_i c‖², ‖c'‖ ≤ r ‖c‖        (μ I + A) c' = b, the certificate's optimum

with ``A = Σ W̃_iᵀ W̃_i`` and ``b = Σ W̃_iᵀ W_i c`` (Gong et al., ECCV 2024, arXiv 2407.12383; ``edit/trust_region.py``).
No search over embeddings of that norm comes nearer to what the unedited layers put out, for any edit of them: a shared
transform, one for each layer, or trained weights. What it doesn't see is an edit of other layers.

``random`` is the control: tokens of the derived embedding's norms in random directions. An attack that succeeds no more
often than this one has found nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from excise.edit.cholesky import solve
from excise.edit.families import FAMILIES
from excise.edit.trust_region import Spectrum
from excise.errors import ModelError, UsageError
from excise.eval.attack import PromptEmbedding
from excise.eval.cases import Case

#: λ of RECE's eq. 8 for nudity and unsafe concepts.
RIDGE: Final = 0.1
#: Multiples of each token's own norm: those of the certificate.
RADII: Final = (1.0, 2.0, 4.0)

#: Text embeddings of prompts, float32 with shape (n, tokens, d).
Encode = Callable[[Sequence[str]], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class System:
    """The normal equations of an edit, summed once.

    Attributes:
        normal: ``A`` with shape (d, d), float64.
        cross: ``Σ W_iᵀ W̃_i`` with shape (d, d), float64: ``b = c cross`` for a row c.
        spectrum: of ``A``.
    """

    normal: Tensor
    cross: Tensor
    spectrum: Spectrum

    @classmethod
    def of(cls, original: Mapping[str, Tensor], edited: Mapping[str, Tensor]) -> System:
        """Of the layers that read the text, (o_i, d) each, by name.

        Raises:
            ModelError: no layer, or two models whose layers differ in name or shape.
        """
        shapes = [{name: tuple(weight.shape) for name, weight in weights.items()} for weights in (original, edited)]
        if not original or shapes[0] != shapes[1]:
            raise ModelError("the edited model's layers that read text aren't the unedited one's: name its own base")
        dim = next(iter(original.values())).shape[1]
        normal, cross = (torch.zeros(dim, dim, dtype=torch.float64) for _ in range(2))
        for name, weight in original.items():
            before, after = (one.detach().cpu().to(torch.float64) for one in (weight, edited[name]))
            normal.addmm_(after.T, after)
            cross.addmm_(before.T, after)
        return cls(normal, cross, Spectrum.of(normal))

    def derived(self, tokens: Tensor, ridge: float) -> Tensor:
        """Eq. 8's c' of every token, (n, d), float64.

        Raises:
            NumericsError: singular with this λ.
        """
        regular = self.normal.clone()
        regular.diagonal().add_(ridge)
        return solve(regular, (tokens @ self.cross).T, ridge=ridge, name="--ridge").T

    def bounded(self, tokens: Tensor, radius: float) -> Tensor:
        """The best c' of at most ``radius`` times each token's norm, (n, d), float64."""
        beta = self.spectrum.coefficients(tokens @ self.cross)
        bound = radius * tokens.norm(dim=1, keepdim=True)
        return self.spectrum.points(beta, bound, self.spectrum.multipliers(beta, bound))[:, 0]


class ClosedFormAttack:
    """An ``EmbeddingAttack``: one variant of the closed form.

    Args:
        system: of the edited model.
        encode: the model's text encoder.
        ridge: λ of eq. 8; of the variants ``derived`` and ``random``.
        radius: a multiple of each token's norm, for the bounded variant; None is eq. 8.
        control: random directions in place of eq. 8's.
        seed: of the random directions.

    Raises:
        UsageError: a ridge or radius that isn't positive and finite, or a control with a radius.
    """

    def __init__(
        self,
        system: System,
        encode: Encode,
        *,
        ridge: float = RIDGE,
        radius: float | None = None,
        control: bool = False,
        seed: int = 0,
    ) -> None:
        check_closed_form(ridge, () if radius is None else (radius,))
        if control and radius is not None:
            raise UsageError("the control has the norms of eq. 8's embedding: give no radius")
        self._system, self._encode = system, encode
        self._ridge, self._radius, self._control, self._seed = ridge, radius, control, seed
        self._made: dict[str, PromptEmbedding] = {}

    @property
    def name(self) -> str:
        """``closed-form.derived``, ``closed-form.radius-2`` or ``closed-form.random``."""
        return closed_form_name(self._radius, control=self._control)

    def embed(self, case: Case) -> PromptEmbedding:
        """What regenerates the case's own prompt, float32 with shape (tokens, d).

        Raises:
            PromptTooLong: more tokens than the text encoder reads.
            NumericsError: singular with this λ.
        """
        if case.prompt not in self._made:
            self._made[case.prompt] = self._embedding(case.prompt)
        return self._made[case.prompt]

    def _embedding(self, prompt: str) -> PromptEmbedding:
        tokens = torch.from_numpy(self._encode([prompt])[0]).to(torch.float64)
        if self._radius is not None:
            found = self._system.bounded(tokens, self._radius)
        else:
            found = self._system.derived(tokens, self._ridge)
        if self._control:
            key = int.from_bytes(hashlib.sha256(f"{self._seed}\0{prompt}".encode()).digest()[:8], "big")
            drawn = torch.from_numpy(np.random.default_rng(key).standard_normal(found.shape))
            found = drawn * (found.norm(dim=1) / drawn.norm(dim=1))[:, None]
        embedding: PromptEmbedding = found.numpy().astype(np.float32)
        return embedding


def closed_form_name(radius: float | None, *, control: bool = False) -> str:
    """A variant's name."""
    if radius is not None:
        return f"closed-form.radius-{radius:g}"
    return "closed-form.random" if control else "closed-form.derived"


def check_closed_form(ridge: float, radii: Sequence[float]) -> None:
    """Raise ``UsageError`` unless λ and all radii are positive and finite, and no two radii the same."""
    for option, value in (("--ridge", ridge), *(("--radius", one) for one in radii)):
        if not (math.isfinite(value) and value > 0):
            raise UsageError(f"{option} {value:g}: give a positive number")
    if len(set(radii)) < len(radii):
        raise UsageError("--radius: give each multiple once")


def text_layers(pipeline: Any) -> dict[str, Tensor]:
    """The weights of a Stable Diffusion 1 or 2 UNet that read the text, (o_i, d) each, by name.

    Raises:
        ModelError: there is none.
    """
    family = next(one for one in FAMILIES if one.name == "stable-diffusion")
    unet = pipeline.unet
    found = {
        name: weight.detach() for name, weight in unet.named_parameters() if family.stream_of(name, dict(unet.config))
    }
    if not found:
        raise ModelError(f"the UNet has no layer that reads text: none is named {family.sought}")
    return found
