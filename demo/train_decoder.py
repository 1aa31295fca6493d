"""Sharpen the autoencoder's decoder with the encoder frozen: on the latents that the UNet is trained to make.

The autoencoder learns to decode noisy samples of its posterior; generation ends at clean latents. As Stable Diffusion's
later decoders did, this trains the decoder alone on them (whole images; L1 and edges), with a little noise so that it
forgives the UNet's errors. The latent space stays as it is, so the UNet isn't affected.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from excise.demo.checkpoint import Training
from excise.demo.composition import Composer
from excise.demo.train_vae import pixels, reconstruction

NOISE = 0.1  #: standard deviation, in units of the scaled latents


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("demo/work"))
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    vae = AutoencoderKL.from_pretrained(arguments.work / "vae").to(memory_format=torch.channels_last)
    vae.requires_grad_(False)
    scale: float = vae.config.scaling_factor
    trained = torch.nn.ModuleDict({"post_quant_conv": vae.post_quant_conv, "decoder": vae.decoder})
    trained.requires_grad_(True)
    training = Training(
        "decoder",
        {"decoder": trained},
        torch.optim.AdamW(trained.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4),
        checkpoint=arguments.work / "decoder.ckpt",
        steps=arguments.steps,
        warmup=100,
    )

    def loss_of_step(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        batch = Composer(arguments.work / "artwork.npz", seed=4_000_000 + step).draw(arguments.batch)
        images = pixels(torch.from_numpy(batch.images))
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.mode()
        latents = latents + torch.randn(latents.shape, generator=generator) * NOISE / scale
        return reconstruction(vae.decode(latents).sample, images)

    training.run(loss_of_step, lambda: None)
    vae.eval().save_pretrained(arguments.work / "vae-sharp")
    return 0


if __name__ == "__main__":
    sys.exit(main())
