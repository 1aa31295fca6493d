"""SA, selective amnesia: learn a surrogate for a concept, replay the rest, and hold the weights that the rest needs.

Heng & Soh, *Selective Amnesia: A Continual Learning Approach to Forgetting in Deep Generative Models*, NeurIPS 2023,
arXiv 2305.10120, eq. 8, as published in clear-nus/selective-amnesia (b736571, ``sd``). With q images of the target,
given out as images of the concept c_f, r images of kept prompts c_r, θ* the original weights, ε̂ the noise in x_t:

    L = E_q (ε_θ(x_t, c_f) − ε̂)² + γ E_r (ε_θ(x_t, c_r) − ε̂)² + λ Σ_i F_i (θ_i − θ*_i)²

    F = mean over r of  (∇_θ Σ_t (ε_θ*(x_t, c_r) − ε̂)²)²          one noise for each of all timesteps

γ = 1, λ = 50; 1000 images q, 5000 images r (50 DDIM steps, guidance 7.5); AdamW with weight decay 0.01 at 1e-5 times
4 GPUs of 4 samples, as the code scales it; 200 passes over q. ``sa`` trains everything, as published for celebrities;
``sa-u`` everything but cross-attention, the output layers and the timestep's embedding, as published for nudity (there
called noxattn, and 500 passes).

r are images of the recipe's kept prompts, one after the other; published are 5000 prompts of a language model. Images
are the original model's latents before the autoencoder, where the published code decodes and encodes them again. With
fewer than all timesteps, F is of as many evenly spaced ones, the sum scaled up to all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from excise.edit.denoiser import Denoiser
from excise.edit.draws import generator
from excise.edit.parameters import SaParameters

#: Timesteps in one backward pass for the Fisher information.
CHUNK = 50

#: What ``sa-u`` leaves alone, by diffusers' names.
_HELD = ("conv_norm_out.", "conv_out.", "time_embedding.")

Weights = Mapping[str, Tensor]


def sa_loss(surrogate: Tensor, replay: Tensor, penalty: Tensor, *, gamma: float, lambda_: float) -> Tensor:
    """The three terms together, scalars."""
    return surrogate + gamma * replay + lambda_ * penalty


def fisher_penalty(trained: Weights, original: Weights, fisher: Weights) -> Tensor:
    """``Σ F (θ − θ*)²`` over all weights, a scalar."""
    terms = [(fisher[name] * (weight - original[name]).square()).sum() for name, weight in trained.items()]
    return torch.stack(terms).sum()


def add_fisher(fisher: dict[str, Tensor], gradients: Weights, images: int) -> None:
    """Add one image of ``images`` to the mean of the squared gradients, in place."""
    for name, gradient in gradients.items():
        fisher[name] += gradient.square() / images


def sa_weights(unet: nn.Module, *, held: bool) -> tuple[str, ...]:
    """Names of the parameters that are trained: all, or all but those that ``sa-u`` holds."""
    names = (name for name, _ in unet.named_parameters())
    return tuple(name for name in names if not held or not ("attn2" in name or name.startswith(_HELD)))


def denoising_loss(denoiser: Denoiser, clean: Tensor, noise: Tensor, timesteps: Tensor, states: Tensor) -> Tensor:
    """Each sample's mean squared distance to what a perfect model puts out, with shape (b,)."""
    predicted = denoiser.predict(denoiser.noisy(clean, noise, timesteps), timesteps, states)
    return (predicted - denoiser.denoising_target(clean, noise, timesteps)).square().mean((1, 2, 3))


def fisher_gradients(denoiser: Denoiser, image: Tensor, states: Tensor, figures: SaParameters, number: int) -> Weights:
    """The gradient of one image's loss over the timesteps, by weight.

    Args:
        denoiser: the model, not yet trained.
        image: latents (c, h, w), on the CPU.
        states: of its prompt, (1, t, d).
        figures: the recipe's.
        number: of the image; decides the noise.
    """
    draws, total = generator(figures.seed, "fisher", number), denoiser.num_train_timesteps
    count = min(figures.fisher_timesteps, total)
    timesteps = torch.arange(count) * total // count
    parameters = list(denoiser.trained.values())
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    for chunk in torch.split(timesteps, CHUNK):
        noise = torch.randn(len(chunk), *denoiser.shape, generator=draws).to(denoiser.device)
        clean = image.to(denoiser.device).expand(len(chunk), *denoiser.shape)
        losses = denoising_loss(
            denoiser, clean, noise, chunk.to(denoiser.device), states.expand(len(chunk), *states.shape[1:])
        )
        for place, gradient in zip(sums, torch.autograd.grad(losses.sum(), parameters), strict=True):
            place += gradient * (total / count)
    return dict(zip(denoiser.trained, sums, strict=True))


def fisher_information(
    denoiser: Denoiser,
    images: Tensor,
    states: Callable[[int], Tensor],
    figures: SaParameters,
    *,
    done: int = 0,
    fisher: Weights | None = None,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """F image by image: how many are in it, and what it is so far, the same tensors every time.

    Args:
        denoiser: the model, not yet trained.
        images: latents of the kept prompts, (n, c, h, w), on the CPU.
        states: the text embeddings (1, t, d) of each image's prompt, by its number.
        figures: the recipe's.
        done: the images that ``fisher`` has already.
        fisher: where to go on from.
    """
    zero = {name: torch.zeros_like(weight) for name, weight in denoiser.original.items()}
    sums = zero if fisher is None else {name: fisher[name].to(denoiser.device) for name in denoiser.original}
    for number in range(done, len(images)):
        add_fisher(sums, fisher_gradients(denoiser, images[number], states(number), figures, number), len(images))
        yield number + 1, sums


def sa_step(
    denoiser: Denoiser,
    surrogate: tuple[Tensor, Callable[[Sequence[int]], Tensor]],
    replay: tuple[Tensor, Callable[[Sequence[int]], Tensor]],
    fisher: Weights,
    figures: SaParameters,
    iteration: int,
) -> Tensor:
    """The loss of one iteration, a scalar with a gradient.

    Args:
        denoiser: the model.
        surrogate: latents of the targets (n, c, h, w) on the CPU, and the concepts' text embeddings (b, t, d) by
            numbers of images.
        replay: latents of the kept prompts, and their text embeddings.
        fisher: F by weight.
        figures: the recipe's.
        iteration: decides the draws, from 0.
    """
    draws = generator(figures.seed, "sa", iteration)

    def loss(images: Tensor, states: Callable[[Sequence[int]], Tensor]) -> Tensor:
        chosen = torch.randint(len(images), (figures.batch_size,), generator=draws)
        timesteps = torch.randint(denoiser.num_train_timesteps, (figures.batch_size,), generator=draws)
        noise = torch.randn(figures.batch_size, *denoiser.shape, generator=draws)
        clean, noise, timesteps = (each.to(denoiser.device) for each in (images[chosen], noise, timesteps))
        return denoising_loss(denoiser, clean, noise, timesteps, states(chosen.tolist())).mean()

    penalty = fisher_penalty(denoiser.trained, denoiser.original, fisher)
    return sa_loss(loss(*surrogate), loss(*replay), penalty, gamma=figures.gamma, lambda_=figures.lambda_)
