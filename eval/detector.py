"""Zero-shot detection with a CLIP: which label's prompts an image is nearest to.

Radford et al., 2021, arXiv 2103.00020, §3.1. One model serves as detector, as CLIP score and as the features of the
Fréchet distance. Nothing is specific to the demo's small CLIP: any transformers ``CLIPModel`` folder works.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from excise.errors import ModelError, PromptTooLong, UsageError


class ClipDetector:
    """A frozen CLIP with the labels it chooses from.

    Args:
        folder: a transformers folder with ``config.json``, weights and a CLIP tokenizer. With a
            ``preprocessor_config.json`` images are resized, cropped and normalised as it says; without one they are
            resized (bicubic) to the model's ``image_size`` and mapped to [-1, 1].
        labels: label → the prompts that describe it. A label's embedding is the mean of its prompts' unit embeddings,
            normalised again (§3.1.4 of the paper).
        batch_size: images or prompts encoded together.
        device: where the model runs.

    Raises:
        ModelError: ``folder`` is not a CLIP.
        UsageError: no labels, or a label without prompts.
        PromptTooLong: a prompt has more tokens than the text tower reads.
    """

    def __init__(
        self,
        folder: Path,
        labels: Mapping[str, Sequence[str]],
        *,
        name: str | None = None,
        batch_size: int = 64,
        device: str = "cpu",
    ) -> None:
        for label, prompts in labels.items():
            if isinstance(prompts, str) or not prompts:
                raise UsageError(f"label {label!r} needs a list of at least one prompt, not {prompts!r}")
        if not labels:
            raise UsageError("a detector needs at least one label")
        self.name = name or folder.name  #: as in reports
        self.labels: tuple[str, ...] = tuple(labels)
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
        self._scale = np.float32(self._model.logit_scale.exp().item())
        means = np.stack([self.text_features(prompts).mean(0) for prompts in labels.values()])
        self._label_features: npt.NDArray[np.float32] = means / np.linalg.norm(means, axis=1, keepdims=True)

    @property
    def dimension(self) -> int:
        """The width d of the features."""
        return int(self._model.config.projection_dim)

    def detect(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.intp]:
        """The index into ``labels`` of each image's top label, with shape (n,)."""
        indices: npt.NDArray[np.intp] = np.argmax(self.logits(images), axis=1)
        return indices

    def logits(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Logits with shape (n, labels) of uint8 images with shape (n, height, width, 3)."""
        return self.label_logits(self.image_features(images))

    def label_logits(self, features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Logits with shape (n, labels) of image features (n, d): the cosines times CLIP's ``logit_scale``."""
        return (self._scale * features @ self._label_features.T).astype(np.float32, copy=False)

    def image_features(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Projected image embeddings of unit length, with shape (n, d)."""
        rows = [np.zeros((0, self.dimension), np.float32)]
        with torch.inference_mode():
            for start in range(0, len(images), self._batch_size):
                pixels = torch.from_numpy(self.preprocess(images[start : start + self._batch_size]))
                rows.append(_unit_rows(self._model.get_image_features(pixel_values=pixels.to(self._device))))
        return np.concatenate(rows)

    def text_features(self, prompts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Projected text embeddings of unit length, with shape (m, d).

        Raises:
            PromptTooLong: a prompt has more tokens than the text tower reads.
        """
        limit = min(self._tokenizer.model_max_length, self._model.config.text_config.max_position_embeddings)
        rows = [np.zeros((0, self.dimension), np.float32)]
        with torch.inference_mode():
            for start in range(0, len(prompts), self._batch_size):
                batch = list(prompts[start : start + self._batch_size])
                tokens = self._tokenizer(batch, padding=True, truncation=False, return_tensors="pt")
                for prompt, mask in zip(batch, tokens["attention_mask"], strict=True):
                    if (length := int(mask.sum())) > limit:
                        raise PromptTooLong(f"the detector reads {limit} tokens, not {length}: shorten {prompt!r}")
                rows.append(_unit_rows(self._model.get_text_features(**tokens.to(self._device))))
        return np.concatenate(rows)

    def preprocess(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """What the vision tower reads: float32 with shape (n, 3, image_size, image_size)."""
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise UsageError(
                f"images must be uint8 with shape (n, height, width, 3), not {images.dtype} with shape {images.shape}"
            )
        if self._processor is not None:
            pillow = [Image.fromarray(image) for image in images]
            return np.stack(self._processor(pillow, return_tensors="np")["pixel_values"]).astype(np.float32)
        size = (self._image_size, self._image_size)
        if images.shape[1:3] != size:
            images = np.stack(
                [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in images]
            )
        return np.ascontiguousarray((images.astype(np.float32) / np.float32(127.5) - 1).transpose(0, 3, 1, 2))


def _unit_rows(embeddings: torch.Tensor) -> npt.NDArray[np.float32]:
    rows: npt.NDArray[np.float32] = torch.nn.functional.normalize(embeddings.float(), dim=-1).cpu().numpy()
    return rows


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
