"""A frozen CLIP: images and prompts to unit vectors of one space.

Radford et al., 2021, arXiv 2103.00020. Any transformers ``CLIPModel`` folder works: OpenAI's ViT-L/14 and ViT-B/32 as
well as the demo's small one. One model serves as detector, as CLIP score and as the features of a Fréchet distance.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from excise.editfile import fingerprint as weights_fingerprint
from excise.errors import ModelError, PromptTooLong
from excise.eval.feature_extractor import Fingerprint, Images, full_batches


class ClipEncoder:
    """A ``FeatureExtractor`` that reads prompts too.

    Args:
        folder: a transformers folder with ``config.json``, weights and a CLIP tokenizer. With a
            ``preprocessor_config.json`` images are resized, cropped and normalised as it says; without one they are
            resized (bicubic) to the model's ``image_size`` and mapped to [-1, 1]. Nothing is downloaded.
        name: as in reports; None takes the folder's.
        batch_size: images in each batch; a last, smaller one is filled up. Prompts are encoded one by one.
        device: where the model runs.

    Raises:
        ModelError: ``folder`` is not a CLIP.
    """

    def __init__(self, folder: Path, *, name: str | None = None, batch_size: int = 16, device: str = "cpu") -> None:
        self.name = name or folder.name
        self._batch_size, self._device = batch_size, torch.device(device)
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder} is not a CLIP: it has no config.json")
        try:
            model = CLIPModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
            self._tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            raise ModelError(f"{folder} is not a CLIP that transformers can load: {_first_line(error)}") from error
        self._model = model.eval().requires_grad_(False).to(self._device)
        self._image_size: int = self._model.config.vision_config.image_size
        self._processor = (
            CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
            if (folder / "preprocessor_config.json").is_file()
            else None
        )
        self._texts: dict[str, npt.NDArray[np.float32]] = {}

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """What the features depend on. It hashes all weights, which not every use of a CLIP needs."""
        weights = {key: tensor.cpu().numpy() for key, tensor in self._model.state_dict().items()}
        return Fingerprint(
            name=self.name,
            weights=weights_fingerprint(weights),
            preprocessing=f"bicubic to {self._image_size}, x / 127.5 − 1"
            if self._processor is None
            else json.dumps(self._processor.to_dict(), sort_keys=True, default=str),
        )

    @property
    def dimension(self) -> int:
        """The width d of the features."""
        return int(self._model.config.projection_dim)

    @property
    def logit_scale(self) -> float:
        """What CLIP multiplies cosines by."""
        return float(self._model.logit_scale.exp().item())

    @property
    def prompt_limit(self) -> int:
        """The most tokens that the text tower reads, start and end included."""
        return int(min(self._tokenizer.model_max_length, self._model.config.text_config.max_position_embeddings))

    def image_features(self, images: Images) -> npt.NDArray[np.float32]:
        """Projected image embeddings of unit length, with shape (n, d).

        Raises:
            UsageError: an image isn't uint8 RGB.
        """
        rows = [np.zeros((0, self.dimension), np.float32)]
        with torch.inference_mode():
            for batch, counted in full_batches(images, self._batch_size):
                pixels = torch.from_numpy(self.preprocess(batch))
                rows.append(_unit_rows(self._model.get_image_features(pixel_values=pixels.to(self._device)))[:counted])
        return np.concatenate(rows)

    def text_features(self, prompts: Sequence[str], *, truncate: bool = False) -> npt.NDArray[np.float32]:
        """Projected text embeddings of unit length, with shape (m, d).

        Prompts are encoded one by one, unpadded, and remembered: a prompt's features never depend on its company.

        Args:
            truncate: read only the first ``prompt_limit`` tokens of a longer prompt, the last of them the end token.

        Raises:
            PromptTooLong: a prompt has more tokens than the text tower reads, and ``truncate`` isn't set.
        """
        rows = np.zeros((len(prompts), self.dimension), np.float32)
        for number, prompt in enumerate(prompts):
            # One text is one vector whether it was cut or not; only a refusal depends on the option.
            if not truncate:
                self._check_length(prompt)
            if prompt not in self._texts:
                self._texts[prompt] = self._encode(prompt)
            rows[number] = self._texts[prompt]
        return rows

    def token_count(self, prompt: str) -> int:
        """The tokens of a prompt, start and end included, before any truncation."""
        return len(self._tokenizer(prompt, truncation=False, verbose=False)["input_ids"])

    def preprocess(self, images: Images) -> npt.NDArray[np.float32]:
        """What the vision tower reads: float32 with shape (n, 3, image_size, image_size)."""
        pillow = [Image.fromarray(image) for image in images]
        if self._processor is not None:
            pixels = np.stack(self._processor(pillow, return_tensors="np")["pixel_values"])
            return pixels.astype(np.float32, copy=False)
        size = (self._image_size, self._image_size)
        resized = [one if one.size == size else one.resize(size, Image.Resampling.BICUBIC) for one in pillow]
        pixels = np.stack([np.asarray(one) for one in resized]).astype(np.float32)
        return np.ascontiguousarray((pixels / np.float32(127.5) - 1).transpose(0, 3, 1, 2))

    def _encode(self, prompt: str) -> npt.NDArray[np.float32]:
        tokens = self._tokenizer(prompt, truncation=True, max_length=self.prompt_limit, return_tensors="pt")
        with torch.inference_mode():
            row: npt.NDArray[np.float32] = _unit_rows(self._model.get_text_features(**tokens.to(self._device)))[0]
        return row

    def _check_length(self, prompt: str) -> None:
        if (length := self.token_count(prompt)) > self.prompt_limit:
            raise PromptTooLong(f"{self.name} reads {self.prompt_limit} tokens, not {length}: shorten {prompt!r}")


def _unit_rows(embeddings: torch.Tensor) -> npt.NDArray[np.float32]:
    rows: npt.NDArray[np.float32] = torch.nn.functional.normalize(embeddings.float(), dim=-1).cpu().numpy()
    return rows


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
