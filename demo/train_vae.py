"""Train the demo model's ``AutoencoderKL`` (factor 8, 16 latent channels) on random crops of composed images.

Loss: L1 + L1 of the horizontal and vertical differences (edges) + 1e-6 KL. The encoder's latents are then scaled to
unit variance through ``scaling_factor``, as in latent diffusion (Rombach et al., 2022, appendix G).
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from excise.demo.checkpoint import Training
from excise.demo.composition import IMAGE_SIZE, Composer

CROP = 32
BLOCK = 20  #: steps that share one composed pool of images


def build() -> AutoencoderKL:
    """The untrained autoencoder."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=16,
        block_out_channels=(16, 32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=IMAGE_SIZE,
    )


def pixels(images: torch.Tensor) -> torch.Tensor:
    """uint8 images (n, h, w, 3) as float32 in [-1, 1] with shape (n, 3, h, w), channels last in memory."""
    return (images.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def edges(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences of neighbouring pixels down and across."""
    return images[:, :, 1:] - images[:, :, :-1], images[:, :, :, 1:] - images[:, :, :, :-1]


def reconstruction(decoded: torch.Tensor, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
    """L1 of pixels plus L1 of edges, and both figures."""
    l1 = (decoded - images).abs().mean()
    edge = sum((a - b).abs().mean() for a, b in zip(edges(decoded), edges(images), strict=True))
    return l1 + edge, {"l1": l1.item(), "edge": float(edge)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("demo/work"))
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    vae = build().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    training = Training(
        "vae", {"vae": vae}, optimizer, checkpoint=arguments.work / "vae.ckpt", steps=arguments.steps, warmup=200
    )

    @functools.lru_cache(maxsize=1)
    def images_of_block(first: int) -> torch.Tensor:
        """Images that ``BLOCK`` steps from ``first`` on draw from; a resumed run composes the same ones."""
        composer = Composer(arguments.work / "artwork.npz", seed=1_000_000 + first)
        return torch.from_numpy(composer.draw(BLOCK * arguments.batch).images)

    def loss_of_step(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        generator = torch.Generator().manual_seed(step)
        pool = images_of_block(step - step % BLOCK)
        chosen = pool[torch.randint(len(pool), (arguments.batch,), generator=generator)]
        corners = torch.randint(0, (IMAGE_SIZE - CROP) // 8 + 1, (arguments.batch, 2), generator=generator) * 8
        crops = torch.stack([i[y : y + CROP, x : x + CROP] for i, (y, x) in zip(chosen, corners.tolist(), strict=True)])
        images = pixels(crops)
        posterior = vae.encode(images).latent_dist
        torch.manual_seed(step)
        decoded = vae.decode(posterior.sample()).sample
        loss, figures = reconstruction(decoded, images)
        kl = posterior.kl().mean()
        return loss + 1e-6 * kl, {**figures, "kl": kl.item()}

    training.run(loss_of_step, lambda: None)
    vae.eval()
    with torch.no_grad():
        batch = pixels(torch.from_numpy(Composer(arguments.work / "artwork.npz", seed=7).draw(512).images))
        latents = vae.encode(batch).latent_dist.sample()
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    vae.save_pretrained(arguments.work / "vae")
    print(f"vae: scaling_factor {vae.config.scaling_factor:.4f}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
