"""The bundled demo model: what it knows, how it was trained, and where its files are."""

from __future__ import annotations

from pathlib import Path

#: The bundled diffusers folder.
MODEL = Path(__file__).parent / "model"
#: The bundled CLIP, a transformers folder: detector, CLIP score and FID features.
CLIP = Path(__file__).parent / "clip"
