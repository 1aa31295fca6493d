"""Train the demo's ``UNet2DConditionModel`` on the frozen text tower and autoencoder.

v-prediction (Salimans & Ho, 2022) with min-SNR-5 weighting (Hang et al., 2023), captions dropped one time in ten for
classifier-free guidance, and an exponential moving average of the weights, which is what ships.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tqdm import tqdm
from transformers import CLIPModel, CLIPTokenizer

from excise.demo.checkpoint import Training
from excise.demo.composition import Composer
from excise.demo.train_vae import pixels
from excise.demo.vocabulary import ARTISTS, BACKGROUNDS, OBJECTS, all_captions, draw_caption

IMAGES = 20_480
DROPOUT = 0.1


def build() -> UNet2DConditionModel:
    """The untrained UNet: 8 × 8 latents of 16 channels, cross-attention at both resolutions and in the middle."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=16,
        out_channels=16,
        block_out_channels=(112, 192),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=256,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


def encode_images(work: Path) -> tuple[torch.Tensor, np.ndarray]:
    """Scaled latents (n, 16, 8, 8) of ``IMAGES`` composed images, and labels (n, 3); cached in ``latents.npz``."""
    cache = work / "latents.npz"
    if not cache.exists():
        vae = AutoencoderKL.from_pretrained(work / "vae").eval()
        composer = Composer(work / "artwork.npz", seed=3)
        latents, labels = [], []
        for _ in tqdm(range(IMAGES // 256), desc="encode images"):
            batch = composer.draw(256)
            with torch.no_grad():
                mode = vae.encode(pixels(torch.from_numpy(batch.images))).latent_dist.mode()
            latents.append((mode * vae.config.scaling_factor).numpy())
            labels.append(np.stack([batch.objects, batch.artists, batch.colours], 1))
        partial = cache.with_name("latents-partial.npz")
        np.savez(partial, latents=np.concatenate(latents), labels=np.concatenate(labels))
        partial.rename(cache)
    with np.load(cache) as arrays:
        return torch.from_numpy(arrays["latents"]), arrays["labels"]


def encode_captions(work: Path) -> tuple[torch.Tensor, dict[str, int]]:
    """Hidden states (captions, 24, 256) of every caption and of the empty one, and each caption's row."""
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    text = CLIPModel.from_pretrained(work / "clip").text_model.eval()
    captions = ["", *all_captions()]
    rows = []
    with torch.no_grad():
        for start in tqdm(range(0, len(captions), 256), desc="encode captions"):
            tokens = tokenizer(captions[start : start + 256], padding="max_length", return_tensors="pt")
            rows.append(text(input_ids=tokens.input_ids).last_hidden_state)
    return torch.cat(rows), {text_: row for row, text_ in enumerate(captions)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("demo/work"))
    parser.add_argument("--steps", type=int, default=12750)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default 1e-3)")
    parser.add_argument("--start", type=Path, metavar="DIR", help="go on from this UNet's weights")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    latents, labels = encode_images(arguments.work)
    states, row_of = encode_captions(arguments.work)
    objects, artists, colours = list(OBJECTS), list(ARTISTS), list(BACKGROUNDS)
    torch.manual_seed(0)
    unet = build()
    if arguments.start:
        unet.load_state_dict(UNet2DConditionModel.from_pretrained(arguments.start).float().state_dict())
    unet = unet.to(memory_format=torch.channels_last)
    average = build().requires_grad_(False)
    average.load_state_dict(unet.state_dict())
    optimizer = torch.optim.AdamW(unet.parameters(), lr=arguments.lr, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)
    training = Training(
        "unet",
        {"unet": unet, "average": average},
        optimizer,
        checkpoint=arguments.work / "unet.ckpt",
        steps=arguments.steps,
        warmup=200,
    )
    alphas = scheduler().alphas_cumprod
    snr = alphas / (1 - alphas)
    weights = snr.clamp(max=5) / (snr + 1)

    def loss_of_step(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        rng = random.Random(step)
        generator = torch.Generator().manual_seed(step)
        chosen = torch.randint(len(latents), (arguments.batch,), generator=generator)
        rows = [
            0
            if rng.random() < DROPOUT
            else row_of[draw_caption(rng, object=objects[o], artist=artists[a], colour=colours[c])]
            for o, a, c in labels[chosen.numpy()].tolist()
        ]
        clean = latents[chosen]
        noise = torch.randn(clean.shape, generator=generator)
        # Stratified timesteps: one in each of the batch's equal parts of the schedule.
        parts = (torch.arange(arguments.batch) + torch.rand(arguments.batch, generator=generator)) / arguments.batch
        timesteps = (parts * len(alphas)).long()
        signal, sigma = alphas[timesteps].sqrt().view(-1, 1, 1, 1), (1 - alphas[timesteps]).sqrt().view(-1, 1, 1, 1)
        noisy = (signal * clean + sigma * noise).contiguous(memory_format=torch.channels_last)
        target = signal * noise - sigma * clean
        predicted = unet(noisy, timesteps, states[rows]).sample
        squared = (predicted - target).square().mean((1, 2, 3))
        return (weights[timesteps] * squared).mean(), {"v_mse": squared.mean().item()}

    def update_average() -> None:
        decay = min(0.999, (1 + training.step) / (10 + training.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(unet.parameters()), 1 - decay)

    training.run(loss_of_step, update_average)
    average.save_pretrained(arguments.work / "unet")
    return 0


if __name__ == "__main__":
    sys.exit(main())
