"""Stable Diffusion's own output filter, as its pipelines ship it: CLIP's image embedding near a hidden concept.

Rando et al., *Red-Teaming the Stable Diffusion Safety Filter*, 2022, describe it. The model and its thresholds are
those of a folder, such as ``safety_checker`` of CompVis/stable-diffusion-v1-4 beside its ``feature_extractor``; the
decision is diffusers' ``StableDiffusionSafetyChecker``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image as Pillow

from excise.errors import ModelError
from excise.serve.engine import Image
from excise.serve.output_filter import Verdict

CHECKER, PROCESSOR = "safety_checker", "feature_extractor"


class SafetyChecker:
    """An ``OutputFilter``.

    Args:
        folder: a diffusers folder that has both parts.
        device: where CLIP runs.

    Raises:
        ModelError: a part is missing or can't be read.
    """

    def __init__(self, folder: Path, *, device: str = "cpu") -> None:
        check_safety_checker(folder)
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
        from transformers import CLIPImageProcessor

        try:
            self._checker = StableDiffusionSafetyChecker.from_pretrained(folder / CHECKER, local_files_only=True)
            self._processor = CLIPImageProcessor.from_pretrained(folder / PROCESSOR, local_files_only=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(f"{folder / CHECKER} can't be read: {' '.join(str(error).split())[:200]}") from error
        self._checker.eval().to(device)
        self._device = device
        self.name = "safety checker"

    @torch.no_grad()
    def verdicts(self, images: Sequence[Image]) -> list[Verdict]:
        """One for each image, uint8 with shape (height, width, 3)."""
        if not images:
            return []
        seen = self._processor([Pillow.fromarray(image) for image in images], return_tensors="pt").pixel_values
        # It blackens what it flags in the array that it is given, which nobody looks at here.
        blank = [np.zeros((1, 1, 3), np.float32) for _ in images]
        _, flagged = self._checker(images=blank, clip_input=seen.to(self._device))
        return [Verdict(("unsafe",), 1.0) if one else Verdict() for one in flagged]


def check_safety_checker(folder: Path) -> None:
    """Look for the files, without loading them. Raises ``ModelError`` where one is missing."""
    for file in (f"{CHECKER}/config.json", f"{PROCESSOR}/preprocessor_config.json"):
        if not (folder / file).is_file():
            raise ModelError(f"{folder} has no {file}: name a diffusers folder that came with its safety checker")
