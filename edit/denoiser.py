"""A Stable Diffusion's UNet of which some weights are trained, beside the model that it was.

Noise and steps are diffusers' ``DDIMScheduler`` with the pipeline's own noise schedule and prediction type, whatever
sampler the pipeline names. The untrained model isn't a second UNet: it is this one with the original values of the
trained weights in their place, so that training cross-attention costs next to no further memory.

**Prediction types.** The losses here compare what the UNet puts out. With ``x_t = α x₀ + σ ε`` and ``α² + σ² = 1``, a
UNet that puts out ``v = α ε − σ x₀`` predicts the noise ``ε = α v + σ x_t``: affine in v, with the same ``σ x_t`` for
every prompt. Combinations of predictions whose weights sum to 1 (guidance, ESD's target) therefore are the same in
either, and so is the minimiser of a squared distance; only its weight differs by timestep: ``‖Δε‖² = α² ‖Δv‖²``.
Training on the model's own output is also what CA's published code does with such models, and ESD's.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from excise.edit.component_files import read_json, stored_variant, weight_files
from excise.edit.families import family_of
from excise.edit.model_folder import WEIGHTS
from excise.errors import ModelError, NoCrossAttention

#: Settings of a UNet that ask for more than a sample, a timestep and a text.
_CONDITIONS = ("addition_embed_type", "class_embed_type", "num_class_embeds", "time_cond_proj_dim")


class Denoiser:
    """A UNet with trained and original weights; tensors are float32 and on its device.

    Attributes:
        unet: diffusers' ``UNet2DConditionModel``, in evaluation mode: no dropout.
        scheduler: diffusers' ``DDIMScheduler``.
        trained: the parameters that are trained, by name, in order of name.
        original: their values before.
        shape: (channels, height, width) of one image's latents.
    """

    def __init__(self, unet: Any, scheduler: Any, trained: Collection[str]) -> None:
        self.unet, self.scheduler = unet.requires_grad_(False).eval(), scheduler
        parameters: dict[str, torch.nn.Parameter] = dict(unet.named_parameters())
        self.trained = {name: parameters[name] for name in sorted(trained)}
        for weight in self.trained.values():
            weight.requires_grad_(True)
        self.original = {name: weight.detach().clone() for name, weight in self.trained.items()}
        self.device: torch.device = next(iter(parameters.values())).device
        size = unet.config.sample_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        self.shape: tuple[int, int, int] = (unet.config.in_channels, height, width)

    @property
    def num_train_timesteps(self) -> int:
        """The timesteps of the noise schedule, from 0."""
        return int(self.scheduler.config.num_train_timesteps)

    def predict(self, latents: Tensor, timesteps: Tensor, states: Tensor) -> Tensor:
        """What the trained UNet puts out, with the shape of ``latents``.

        Args:
            latents: with shape (b, c, h, w).
            timesteps: with shape (b,) or ().
            states: text embeddings (b, t, d).
        """
        output: Tensor = self.unet(latents, timesteps, states, return_dict=False)[0]
        return output

    @torch.no_grad()
    def predict_original(self, latents: Tensor, timesteps: Tensor, states: Tensor) -> Tensor:
        """As ``predict`` with the original weights, without a gradient."""
        output: Tensor = functional_call(
            self.unet, self.original, (latents, timesteps, states), {"return_dict": False}
        )[0]
        return output

    def noisy(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``α x₀ + σ ε`` at each sample's timestep."""
        latents: Tensor = self.scheduler.add_noise(clean, noise, timesteps)
        return latents

    def denoising_target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a perfect UNet puts out for ``noisy(clean, noise, timesteps)``: ε, v or x₀ by its prediction type."""
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            return noise
        if kind == "sample":
            return clean
        target: Tensor = self.scheduler.get_velocity(clean, noise, timesteps)
        return target

    def timesteps(self, steps: int) -> Tensor:
        """The timesteps of a DDIM run in ``steps`` steps, largest first."""
        self.scheduler.set_timesteps(steps, device=self.device)
        timesteps: Tensor = self.scheduler.timesteps
        return timesteps

    @torch.no_grad()
    def draw(
        self,
        noise: Tensor,
        states: Tensor,
        null: Tensor,
        *,
        steps: int,
        until: int | None = None,
        guidance_scale: float,
    ) -> Tensor:
        """Latents that the original model makes of ``noise`` (b, c, h, w), with classifier-free guidance and η = 0.

        Args:
            noise: standard normal.
            states: text embeddings (b, t, d).
            null: of the empty prompt, (1, t, d).
            steps: of the whole run.
            until: stop before the step of this index, with x_t at ``timesteps(steps)[until]``; None runs to the end.
            guidance_scale: as everywhere: 1 is none.
        """
        latents = noise
        both = torch.cat([null.expand_as(states), states])
        for timestep in self.timesteps(steps)[:until]:
            without, given = self.predict_original(torch.cat([latents, latents]), timestep, both).chunk(2)
            predicted = without + guidance_scale * (given - without)
            latents = self.scheduler.step(predicted, timestep, latents, return_dict=False)[0]
        return latents


def load_unet(folder: Path, *, device: str = "cpu") -> tuple[Any, Any]:
    """The UNet of a diffusers folder in float32, and a DDIM scheduler with its noise schedule.

    Raises:
        ModelError: not a Stable Diffusion 1 or 2 for text alone, incomplete, damaged, or with another kind of noise.
        NoCrossAttention: a UNet that reads no text.
    """
    family = family_of(folder)
    component = folder / family.component
    if family.name != "stable-diffusion":
        raise ModelError(
            f"{folder} is of the family {family.name}: trained methods take Stable Diffusion 1 and 2, "
            "use a closed form such as --method rece"
        )
    config = read_json(component / "config.json")
    for name in _CONDITIONS:
        if config.get(name) is not None:
            raise ModelError(f"{component} has {name} {config[name]!r}: trained methods take a UNet with a text alone")
    if config.get("in_channels") != config.get("out_channels"):
        raise ModelError(
            f"{component} reads {config.get('in_channels')} channels and puts out {config.get('out_channels')}: "
            "trained methods take a UNet that reads latents alone, without a mask or a picture"
        )
    scheduler = _scheduler(folder)
    weight_files(component, WEIGHTS)  # names what is missing
    from diffusers import UNet2DConditionModel

    try:
        unet = UNet2DConditionModel.from_pretrained(
            component,
            torch_dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            variant=stored_variant(component, WEIGHTS),
        )
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError) as error:
        raise ModelError(
            f"{component} can't be read: {(str(error) or type(error).__name__).splitlines()[0]}"
        ) from error
    if not any(".attn2." in name for name, _ in unet.named_parameters()):
        raise NoCrossAttention(f"{component} has no layer that reads text: none is named …attn2…")
    return unet.to(device), scheduler


def _scheduler(folder: Path) -> Any:
    config = read_json(folder / "scheduler" / "scheduler_config.json")
    kind = config.get("prediction_type", "epsilon")
    if "FlowMatch" in str(config.get("_class_name")) or kind not in ("epsilon", "v_prediction", "sample"):
        raise ModelError(
            f"{folder / 'scheduler'} is a {config.get('_class_name')} that predicts {kind}: trained methods take "
            "epsilon, v_prediction or sample"
        )
    from diffusers import DDIMScheduler

    known = set(DDIMScheduler().config) | {"_class_name"}
    return DDIMScheduler.from_config({key: config[key] for key in config if key in known}, clip_sample=False)
