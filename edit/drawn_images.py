"""Images that the original model draws, as latents before the autoencoder: what CA and SA train on.

Each is decided by its number and the run's seed. They are kept in the folder of the training as they come, so that a
resumed run draws none of them again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from excise.edit.denoiser import Denoiser
from excise.edit.draws import generator
from excise.edit.parameters import TrainingParameters
from excise.edit.training_folder import TrainingFolder

#: Images drawn, and kept, at a time.
CHUNK = 8


def drawn_images(
    denoiser: Denoiser,
    states: Callable[[Sequence[int]], Tensor],
    null: Tensor,
    count: int,
    figures: TrainingParameters,
    *,
    name: str,
    folder: TrainingFolder | None = None,
) -> Tensor:
    """Latents with shape (count, c, h, w), on the CPU.

    Args:
        denoiser: the model; its original weights draw.
        states: text embeddings (b, t, d) of the prompts of some images, by their numbers.
        null: of the empty prompt, (1, t, d).
        count: how many.
        figures: steps, guidance and seed.
        name: what they are, as in file names.
        folder: where they are kept, and found.
    """
    parts: list[Tensor] = []
    for start in tqdm(range(0, count, CHUNK), desc=f"{name} images", unit=f"× {CHUNK}", delay=2):
        numbers = range(start, min(start + CHUNK, count))
        file = f"{name}-{start:06d}"
        found = folder.read(file) if folder is not None else None
        if found is None:
            noise = torch.stack(
                [torch.randn(denoiser.shape, generator=generator(figures.seed, name, n)) for n in numbers]
            )
            latents = denoiser.draw(
                noise.to(denoiser.device),
                states(numbers),
                null,
                steps=figures.num_inference_steps,
                guidance_scale=figures.guidance_scale,
            ).cpu()
            if folder is not None:
                folder.write(file, {"latents": latents}, {})
        else:
            latents = found[0]["latents"]
        parts.append(latents)
    return torch.cat(parts)
