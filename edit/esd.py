"""ESD: move a model's prediction for a concept away from the concept.

Gandikota, Materzyńska, Fiotto-Kaufman, Bau, *Erasing Concepts from Diffusion Models*, ICCV 2023, arXiv 2303.07345,
eq. 7, as published in rohitgandikota/erasing (25613d2). With ε* the frozen model, c the concept, c₀ the prompt that it
is erased from (the concept itself unless one says otherwise) and ∅ the empty prompt:

    ε_target = ε*(x_t, c₀) − η (ε*(x_t, c) − ε*(x_t, ∅))          L = mean (ε_θ(x_t, c₀) − ε_target)²

The frozen model makes x_t by running the first i of 50 steps with guidance 3 for c₀, i uniform from 0 to 49. Adam 5e-5,
200 steps of one sample, η = 2. The weights are those of the published code, weights and biases of linear and
convolutional layers: ``esd-x`` trains cross-attention (K, V, Q and output of ``attn2``), ``esd-u`` all others,
``esd-full`` both (there called esd-all); norms stay. The published code erases a list as one prompt; here every sample
draws one of the recipe's concepts.

The paper's weights sum to 1 in ε*, so on a model that predicts v it is the same target: see ``excise.edit.denoiser``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from excise.edit.denoiser import Denoiser
from excise.edit.draws import generator
from excise.edit.parameters import EsdParameters

Variant = Literal["esd-x", "esd-u", "esd-full"]


def esd_target(erased_from: Tensor, concept: Tensor, null: Tensor, *, negative_guidance: float) -> Tensor:
    """What the trained model is to predict for c₀, with the shape of each of the frozen model's predictions."""
    return erased_from - negative_guidance * (concept - null)


def esd_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """The mean squared distance, a scalar."""
    return (predicted - target).square().mean()


def esd_weights(unet: nn.Module, variant: Variant) -> tuple[str, ...]:
    """Names of the parameters that a variant trains."""
    chosen = {"esd-x": (True,), "esd-u": (False,), "esd-full": (True, False)}[variant]
    return tuple(
        f"{layer}.{name}"
        for layer, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and ("attn2" in layer) in chosen
        for name, _ in module.named_parameters(recurse=False)
    )


def esd_step(denoiser: Denoiser, concepts: Tensor, null: Tensor, figures: EsdParameters, iteration: int) -> Tensor:
    """The loss of one iteration, a scalar with a gradient.

    Args:
        denoiser: the model.
        concepts: text embeddings of the concepts, (n, t, d).
        null: of the empty prompt, (1, t, d).
        figures: the recipe's.
        iteration: decides the draws, from 0.
    """
    draws = generator(figures.seed, "esd", iteration)
    until = int(torch.randint(figures.num_inference_steps, (), generator=draws))
    chosen = torch.randint(len(concepts), (figures.batch_size,), generator=draws)
    noise = torch.randn(figures.batch_size, *denoiser.shape, generator=draws).to(denoiser.device)
    states = concepts[chosen.to(concepts.device)]
    latents = denoiser.draw(
        noise,
        states,
        null,
        steps=figures.num_inference_steps,
        until=until,
        guidance_scale=figures.guidance_scale,
    )
    timestep = denoiser.timesteps(figures.num_inference_steps)[until]
    both = torch.cat([states, null.expand_as(states)])
    concept, without = denoiser.predict_original(torch.cat([latents, latents]), timestep, both).chunk(2)
    target = esd_target(concept, concept, without, negative_guidance=figures.negative_guidance)
    return esd_loss(denoiser.predict(latents, timestep, states), target)
