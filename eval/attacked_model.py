"""The PyTorch model that a white-box attack searches: text to noise prediction, differentiable in the token embeddings.

**Which loss.** The published attacks were written for models that predict the noise ε. For a model that predicts
v = √ᾱ ε − √(1−ᾱ) x₀ (Salimans & Ho, arXiv 2202.00512), the losses here are of the model's own output, which is what it
was trained on; for an ε model that is the published loss exactly. A loss of v converted to ε would be ᾱ_t times as
large: it would weigh the noisiest steps, which decide what an image shows, next to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from excise.errors import ModelError, PromptTooLong, UsageError
from excise.eval.attack import Candidate
from excise.eval.case_image import Image
from excise.eval.prompt_tokens import PromptTokens
from excise.eval.token_vocabulary import TokenVocabulary, VocabularyKind, token_vocabulary
from excise.eval.verification_sides import LoadPipeline, SideSpec, open_side

#: Of a scheduler's configuration: what the UNet predicts.
PredictionType = Literal["epsilon", "v_prediction"]


class AttackedModel:
    """A Stable Diffusion 1 or 2 pipeline, frozen: only what is fed to it has gradients.

    Args:
        pipeline: a diffusers pipeline with ``tokenizer``, ``text_encoder``, ``unet``, ``vae`` and ``scheduler``, edited
            or not. Its parameters' ``requires_grad`` is switched off, and its modules are put in evaluation mode;
            nothing else of it changes, so that a ``TorchRuntime`` can share it.

    Raises:
        UsageError: its parts aren't PyTorch modules.
        ModelError: it has another text encoder, denoiser or prediction type.
    """

    def __init__(self, pipeline: Any) -> None:
        _check(pipeline)
        self._tokenizer, self._text_encoder = pipeline.tokenizer, pipeline.text_encoder
        self._unet, self._vae = pipeline.unet, pipeline.vae
        for module in (self._text_encoder, self._unet, self._vae):
            module.requires_grad_(False).eval()
        self._embedding: torch.nn.Embedding = self._text_encoder.get_input_embeddings()
        self._alphas: Tensor = pipeline.scheduler.alphas_cumprod.detach().cpu().double()
        self._vocabularies: dict[VocabularyKind, TokenVocabulary] = {}
        self.prediction_type: PredictionType = pipeline.scheduler.config.prediction_type
        #: Timesteps are 0 to this − 1.
        self.num_train_timesteps = len(self._alphas)
        #: Positions of a prompt, start and end included.
        self.context = int(min(self._tokenizer.model_max_length, self._text_encoder.config.max_position_embeddings))
        self._tokens = PromptTokens(self._tokenizer, context=self.context, rows=self._embedding.num_embeddings)

    @property
    def device(self) -> torch.device:
        """Where the text encoder is, and what is searched."""
        return self._embedding.weight.device

    @property
    def room(self) -> int:
        """The most tokens between start and end."""
        return self._tokens.room

    @property
    def token_embeddings(self) -> Tensor:
        """The table, float32 with shape (tokens, d_tok)."""
        return self._embedding.weight.detach().float()

    def vocabulary(self, kind: VocabularyKind) -> TokenVocabulary:
        """The tokens that a search may use; see ``token_vocabulary``."""
        if kind not in self._vocabularies:
            self._vocabularies[kind] = token_vocabulary(self._tokenizer, self.token_embeddings, kind)
        return self._vocabularies[kind]

    def tokenize(self, prompt: str) -> tuple[int, ...]:
        """A prompt's token ids, without start, end and padding; any number of them."""
        return self._tokens.tokenize(prompt)

    def candidate(self, ids: Sequence[int]) -> Candidate:
        """The text of token ids, as published: special tokens are spelt out, but end tokens are left out."""
        spelt = [one for one in ids if one != self._tokenizer.eos_token_id]
        return Candidate(prompt=self._tokens.candidate(spelt).prompt, token_ids=tuple(ids))

    def survives(self, candidate: Candidate) -> bool:
        """Whether a candidate's text gives the very tokens again that were searched.

        Many don't: a piece of a word that stands alone is another token. The image of such a candidate is its *text's*.
        """
        return self._tokens.survives(candidate)

    def fits(self, candidate: Candidate) -> bool:
        """Whether a candidate's text is short enough to be sent: 16 tokens' text may be more than 16 tokens."""
        return self._tokens.fits(candidate)

    def check_room(self, learnable: int, prompt: Sequence[int] = ()) -> None:
        """Check that so many tokens fit.

        Raises:
            PromptTooLong: they don't.
        """
        if learnable + len(prompt) > self.room:
            beside = f" beside the prompt's {len(prompt)}" if prompt else ""
            raise PromptTooLong(
                f"{learnable} learnable tokens{beside}, where the text encoder has room for {self.room}: "
                f"give fewer tokens{' or a shorter prompt' if prompt else ''}"
            )

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Token embeddings, float32 with shape (len(ids), d_tok)."""
        rows = self._embedding.weight.detach()[torch.tensor(ids, dtype=torch.long, device=self.device)]
        return rows.float()

    def framed(self, tokens: Tensor, *, padding: int | None = None) -> Tensor:
        """Start, the tokens, end, and padding to the whole context.

        Args:
            tokens: embeddings with shape (m, d_tok), m at most ``room``.
            padding: a token's id; None is what the pipeline pads with.

        Returns:
            With shape (1, context, d_tok).
        """
        pad = self._tokenizer.pad_token_id if padding is None else padding
        after = [self._tokenizer.eos_token_id] + [pad] * (self.room - len(tokens))
        return torch.cat([self.embed([self._tokenizer.bos_token_id]), tokens, self.embed(after)]).unsqueeze(0)

    def encode(self, token_embeddings: Tensor) -> Tensor:
        """Hidden states with shape (n, t, d), with gradients to the token embeddings (n, t, d_tok).

        transformers' CLIPTextModel reads ids only. While this call runs, the output of this one model's embedding layer
        is replaced; positions, mask and layers are the model's own code.
        """

        def instead(module: torch.nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
            return token_embeddings.to(output.device, output.dtype)

        # The ids' values decide the pooled output alone, which nothing reads.
        ids = torch.full(token_embeddings.shape[:2], self._tokenizer.eos_token_id, device=self.device)
        handle = self._embedding.register_forward_hook(instead)
        try:
            states: Tensor = self._text_encoder(ids)[0]
        finally:
            handle.remove()
        return states

    @torch.no_grad()
    def encode_prompt(self, prompt: str) -> Tensor:
        """A prompt's hidden states with shape (1, context, d).

        Raises:
            PromptTooLong: more tokens than the text encoder reads.
        """
        ids = self.tokenize(prompt)
        if len(ids) > self.room:
            raise PromptTooLong(f"a prompt of {len(ids)} tokens, where the text encoder reads {self.room}: shorten it")
        return self.encode(self.framed(self.embed(ids)))

    def predict(self, noisy: Tensor, timestep: int, states: Tensor) -> Tensor:
        """The UNet's output, float32 with the shape of ``noisy`` (n, c, h, w), for hidden states (n, t, d)."""
        device, dtype = self._unet.device, self._unet.dtype
        at = torch.tensor(timestep, device=device)
        output: Tensor = self._unet(noisy.to(device, dtype), at, states.to(device, dtype), return_dict=False)[0]
        return output.float()

    @torch.no_grad()
    def latents(self, image: Image, *, generator: torch.Generator | None = None, unit_range: bool = False) -> Tensor:
        """An image's latents, float32 with shape (1, c, h, w).

        Args:
            image: uint8 with shape (height, width, 3).
            generator: draws from the VAE's distribution; without one its mean is taken.
            unit_range: feed pixels from 0 to 1, as P4D's code does, where the VAE was trained on −1 to 1.
        """
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1).unsqueeze(0).float() / 255
        pixels = pixels if unit_range else 2 * pixels - 1
        distribution = self._vae.encode(pixels.to(self._vae.device, self._vae.dtype)).latent_dist
        drawn = distribution.mean if generator is None else distribution.sample(generator)
        scaled: Tensor = drawn.float() * self._vae.config.scaling_factor
        return scaled

    def noised(self, latents: Tensor, noise: Tensor, timestep: int) -> Tensor:
        """x_t = √ᾱ_t x₀ + √(1−ᾱ_t) ε."""
        signal, spread = self._scales(timestep)
        return signal * latents + spread * noise

    def training_target(self, latents: Tensor, noise: Tensor, timestep: int) -> Tensor:
        """What the UNet was trained to put out for ``noised``: ε, or v of a model that predicts v."""
        if self.prediction_type == "epsilon":
            return noise
        signal, spread = self._scales(timestep)
        return signal * noise - spread * latents

    def _scales(self, timestep: int) -> tuple[float, float]:
        alpha = float(self._alphas[timestep])
        return alpha**0.5, (1 - alpha) ** 0.5


def open_attacked(spec: SideSpec, load_pipeline: LoadPipeline) -> AttackedModel:
    """The model of ``torch:DIR?edit=FILE``, in memory.

    Args:
        spec: as ``parse_side`` reads it.
        load_pipeline: such as ``excise.export.pipeline.load_pipeline``.

    Raises:
        UsageError: an exported model, or a device that this machine hasn't.
        ModelError: the folder isn't a pipeline that can be attacked.
        EditError: ``edit=FILE`` can't be read, or is another model's.
    """
    if spec.kind != "torch":
        raise UsageError(
            f"{spec} has no gradients to attack by: attack the PyTorch model (torch:DIR?edit=FILE), "
            "then replay the prompts that it finds against this one"
        )
    return AttackedModel(open_side(spec, load_pipeline).runtime.pipeline)  # type: ignore[attr-defined]


def _check(pipeline: Any) -> None:
    name = type(pipeline).__name__
    for part in ("text_encoder", "unet", "vae"):
        if not isinstance(getattr(pipeline, part, None), torch.nn.Module):
            raise UsageError(
                f"{name} has no PyTorch {part}, so no gradients to attack by: attack the PyTorch model "
                "(torch:DIR?edit=FILE), then replay the prompts that it finds against this one"
            )
    if getattr(pipeline, "text_encoder_2", None) is not None or not hasattr(pipeline.text_encoder, "text_model"):
        raise ModelError(f"{name} hasn't one CLIP text encoder: only Stable Diffusion 1 and 2 can be attacked")
    if getattr(pipeline.text_encoder.config, "use_attention_mask", False):
        raise ModelError(f"{name} masks its prompts' padding: only Stable Diffusion 1 and 2 can be attacked")
    prediction = pipeline.scheduler.config.get("prediction_type")
    if prediction not in ("epsilon", "v_prediction") or not hasattr(pipeline.scheduler, "alphas_cumprod"):
        raise ModelError(f"{name} predicts {prediction!r}: only models of epsilon and v_prediction can be attacked")
