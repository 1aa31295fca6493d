"""CA: let a model predict for a concept what it predicts for an anchor.

Kumari, Zhang, Wang, Shechtman, Zhang, Zhu, *Ablating Concepts in Text-to-Image Diffusion Models*, ICCV 2023,
arXiv 2303.13516, eq. 5 (the model-based variant, its default), as published in nupurkmr9/concept-ablation (c11fb1b).
With c* the concept, c the anchor, x an image of the anchor and sg no gradient:

    L = mean over samples of  Σ m (ε_θ(x_t, c*) − sg ε_θ(x_t, c))² / Σ m          m has one channel

The anchor's prediction is the current model's. m masks what the published code's resizing leaves empty; it resizes
objects only, and here images stay as they are: m = 1. 200 images of the anchor, AdamW with weight decay 0.01, gradients
clipped to norm 1, t uniform. ``ca`` trains K and V of cross-attention: 100 steps of 8 samples at 2e-6 times the batch,
as the code scales it. ``ca-full`` trains everything: 400 steps at 2e-7 times the batch. The published prior loss, for
anchors that are part of the concept's words, isn't here.

Images are the original model's latents before the autoencoder (50 DDIM steps, guidance 6), where the published code
decodes and encodes them again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from excise.edit.denoiser import Denoiser
from excise.edit.draws import generator
from excise.edit.parameters import CaParameters


def ca_loss(predicted: Tensor, anchor: Tensor, mask: Tensor | None = None) -> Tensor:
    """The masked squared distance, a scalar; no gradient flows through ``anchor``.

    Args:
        predicted: for the concept, (b, c, h, w).
        anchor: for the anchor, (b, c, h, w).
        mask: 1 where a sample counts, 0 elsewhere, (b, 1, h, w) and not 0 all over; None counts everything.
    """
    # A sum over channels, as published: the clipping of gradients sees the scale of a loss.
    squared = (predicted - anchor.detach()).square().sum(1, keepdim=True)
    if mask is None:
        return squared.mean()
    return ((squared * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))).mean()


def ca_weights(unet: nn.Module, *, full: bool) -> tuple[str, ...]:
    """Names of the parameters that are trained: K and V of cross-attention, or all."""
    names = (name for name, _ in unet.named_parameters())
    return tuple(name for name in names if full or ".attn2.to_k." in name or ".attn2.to_v." in name)


def ca_step(
    denoiser: Denoiser,
    images: Tensor,
    concepts: Tensor,
    anchors: Tensor,
    pairs: Sequence[int],
    figures: CaParameters,
    iteration: int,
) -> Tensor:
    """The loss of one iteration, a scalar with a gradient.

    Args:
        denoiser: the model.
        images: latents of the anchors, (n, c, h, w), on the CPU.
        concepts: text embeddings of the concepts, (k, t, d).
        anchors: of their anchors, (k, t, d).
        pairs: for each image, the index of its anchor and concept.
        figures: the recipe's.
        iteration: decides the draws, from 0.
    """
    draws = generator(figures.seed, "ca", iteration)
    chosen = torch.randint(len(images), (figures.batch_size,), generator=draws)
    timesteps = torch.randint(denoiser.num_train_timesteps, (figures.batch_size,), generator=draws)
    noise = torch.randn(figures.batch_size, *denoiser.shape, generator=draws).to(denoiser.device)
    clean, timesteps = images[chosen].to(denoiser.device), timesteps.to(denoiser.device)
    rows = torch.tensor(pairs)[chosen].to(concepts.device)
    latents = denoiser.noisy(clean, noise, timesteps)
    with torch.no_grad():
        anchor = denoiser.predict(latents, timesteps, anchors[rows])
    return ca_loss(denoiser.predict(latents, timesteps, concepts[rows]), anchor)
